//! Runs kernels for NVIDIA's GPUs on this processor: all cases of a test become one C++ program, which gets buffers and gives them back.
//!
//! Every case runs twice, its threads in two orders and its asynchronous copies late and early; results of different bits are a race.

use cutover_kernels::cuda::{Argument, DEVICE, Element, HOST, Kernel};
use std::{
    fmt::Write as _,
    io::{Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

/// A kernel with what it reads, and what it has to give.
pub struct Case {
    pub name: String,
    pub kernel: Kernel,
    pub inputs: Vec<Vec<u8>>,
    pub extras: Vec<Vec<u8>>,
    /// Bytes of each output.
    pub outputs: Vec<usize>,
    /// Fails with what is wrong about the outputs.
    pub check: Box<dyn Fn(&[Vec<u8>]) -> Result<(), String>>,
}

/// Builds the cases' kernels in one program and runs them; a machine without a C++ compiler skips them.
pub fn run(test: &str, cases: &[Case]) {
    if Command::new("c++").arg("--version").output().is_err() {
        println!("skipped: {test} needs a C++ compiler");
        return;
    }
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, program) = (folder.join(format!("{test}.cpp")), folder.join(test));
    std::fs::write(&source, text(cases)).unwrap();
    let flags = ["-std=c++17", "-O1", "-w", "-ffp-contract=off"];
    let built = Command::new("c++").args(flags).arg(&source).arg("-o").arg(&program).output().unwrap();
    let errors = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{test} does not compile:\n{}", &errors[..errors.len().min(4000)]);

    let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut failures = Vec::new();
    for (at, case) in cases.iter().enumerate() {
        let runs: Vec<_> = [0, 2 * at as u64 + 1].map(|seed| exchange(&mut to, &mut from, at, case, seed)).into();
        let Some(runs) = runs.into_iter().collect::<Option<Vec<_>>>() else {
            let status = child.wait().unwrap();
            panic!("{}: the program ended: {status}", case.name);
        };
        if runs[0] != runs[1] {
            failures.push(format!("{}: a race: two orders of its threads differ", case.name));
        }
        if let Err(wrong) = (case.check)(&runs[0]) {
            failures.push(format!("{}: {wrong}", case.name));
        }
    }
    drop(to);
    assert!(child.wait().unwrap().success());
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// Sends a case's buffers, in the order of its arguments, and gives its outputs as they come back.
fn exchange(to: &mut impl Write, from: &mut impl Read, at: usize, case: &Case, seed: u64) -> Option<Vec<Vec<u8>>> {
    let buffers = case.kernel.arguments.iter().map(|argument| match *argument {
        Argument::Input(n) => case.inputs[n].clone(),
        Argument::Extra(n) => case.extras[n].clone(),
        Argument::Output(n) => vec![0xff; case.outputs[n]],
        Argument::Workspace => vec![0xff; case.kernel.workspace_bytes],
    });
    let buffers: Vec<Vec<u8>> = buffers.collect();
    let mut message = Vec::new();
    message.extend((at as u64).to_le_bytes());
    message.extend(seed.to_le_bytes());
    message.extend((buffers.len() as u64).to_le_bytes());
    for buffer in &buffers {
        message.extend((buffer.len() as u64).to_le_bytes());
        message.extend(buffer);
    }
    to.write_all(&message).and_then(|()| to.flush()).ok()?;
    let mut outputs = vec![Vec::new(); case.outputs.len()];
    for (argument, buffer) in case.kernel.arguments.iter().zip(buffers) {
        let mut back = vec![0; buffer.len()];
        from.read_exact(&mut back).ok()?;
        match *argument {
            Argument::Output(n) => outputs[n] = back,
            Argument::Workspace => {}
            _ => assert!(back == buffer, "{}: an operand was written", case.name),
        }
    }
    Some(outputs)
}

fn text(cases: &[Case]) -> String {
    let mut text = format!("{HOST}\n{DEVICE}\n");
    let mut table = String::new();
    for (at, case) in cases.iter().enumerate() {
        let mut source =
            case.kernel.source.strip_prefix(DEVICE).expect("the device's functions come first").to_string();
        let mut entries: Vec<&str> = case.kernel.launches.iter().map(|launch| launch.entry.as_str()).collect();
        entries.sort_by_key(|entry| entry.len());
        // C's functions have no namespace: every case has its own names.
        if let Some(first) = entries.first() {
            source = source.replace(*first, &format!("case{at}_{first}"));
        }
        let _ = writeln!(text, "namespace case{at} {{\n{source}");
        let _ = write!(table, "static const Step steps{at}[] = {{");
        for (n, launch) in case.kernel.launches.iter().enumerate() {
            let _ = writeln!(
                text,
                "static void step{n}(const void* o) {{ case{at}_{}(*static_cast<const Operands*>(o)); }}",
                launch.entry
            );
            let [x, y, z] = launch.grid;
            let (block, shared) = (launch.block, launch.shared_bytes);
            let _ = write!(table, "{{case{at}::step{n}, {{{x}, {y}, {z}}}, {block}, {shared}}}, ");
        }
        let _ = writeln!(text, "}}");
        let _ = writeln!(table, "{{nullptr, {{0, 0, 0}}, 0, 0}}}};");
    }
    let all: Vec<String> = (0..cases.len()).map(|at| format!("steps{at}")).collect();
    text + MAIN_BEGIN + &table + &format!("static const Step* const CASES[] = {{{}}};\n", all.join(", ")) + MAIN
}

const MAIN_BEGIN: &str = "
struct Step {
    void (*run)(const void*);
    dim3 grid;
    unsigned block;
    size_t shared_bytes;
};
";

const MAIN: &str = r#"
static bool get(void* to, size_t bytes) { return bytes == 0 || fread(to, bytes, 1, stdin) == 1; }
int main() {
    uint64_t head[3];
    while (get(head, sizeof(head))) {
        char* buffers[16];
        uint64_t bytes[16];
        if (head[2] > 16) return 2;
        for (uint64_t i = 0; i < head[2]; i++) {
            if (!get(&bytes[i], 8)) return 2;
            buffers[i] = host_guarded(bytes[i]);
            if (!get(buffers[i], bytes[i])) return 2;
        }
        for (const Step* step = CASES[head[0]]; step->run != nullptr; step++)
            host::launch(step->run, buffers, step->grid, {step->block, 1, 1}, step->shared_bytes, head[1]);
        for (uint64_t i = 0; i < head[2]; i++) {
            fwrite(buffers[i], 1, bytes[i], stdout);
            host_release(buffers[i], bytes[i]);
        }
        fflush(stdout);
    }
}
"#;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[(self.bits() % of.len() as u64) as usize].clone()
    }

    /// `count` elements, as bytes and as numbers: of floats uniform in [-1, 1), of integers all that there are.
    pub fn elements(&mut self, element: Element, count: usize) -> (Vec<u8>, Vec<f64>) {
        let mut bytes = Vec::new();
        for _ in 0..count {
            let unit = (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            match element {
                Element::F32 => bytes.extend(unit.to_le_bytes()),
                Element::F16 => {
                    bytes.extend(((self.bits() % 0x3c00) as u16 | (self.bits() as u16 & 0x8000)).to_le_bytes())
                }
                Element::BF16 => bytes.extend(((unit.to_bits() >> 16) as u16).to_le_bytes()),
                Element::I32 => bytes.extend((self.bits() as i32).to_le_bytes()),
                Element::I8 | Element::U8 => bytes.push(self.bits() as u8),
            }
        }
        let numbers = numbers(element, &bytes);
        (bytes, numbers)
    }
}

pub fn numbers(element: Element, bytes: &[u8]) -> Vec<f64> {
    let each = bytes.chunks_exact(element.bytes());
    each.map(|b| match element {
        Element::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Element::F16 => from_f16(u16::from_le_bytes([b[0], b[1]])),
        Element::BF16 => f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)),
        Element::I32 => f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Element::I8 => f64::from(b[0] as i8),
        Element::U8 => f64::from(b[0]),
    })
    .collect()
}

fn from_f16(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let size = match exponent {
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        0 => fraction * 2f64.powi(-24),
        _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
    };
    if bits >> 15 == 1 { -size } else { size }
}

/// Half a unit in the last place of a number near 1, or of integers nothing.
pub fn rounding(element: Element) -> f64 {
    match element {
        Element::F32 => 2f64.powi(-24),
        Element::F16 => 2f64.powi(-11),
        Element::BF16 => 2f64.powi(-8),
        Element::I32 | Element::I8 | Element::U8 => 0.0,
    }
}

/// Fails with the first of `actual` that is further from `expected` than `tolerance(i)`.
pub fn near(actual: &[f64], expected: &[f64], tolerance: impl Fn(usize) -> f64) -> Result<(), String> {
    if actual.len() != expected.len() {
        return Err(format!("{} elements, not {}", actual.len(), expected.len()));
    }
    for (i, (&x, &y)) in actual.iter().zip(expected).enumerate() {
        // NaN is near nothing.
        let is_near = (x - y).abs() <= tolerance(i) || x == y;
        if !is_near {
            return Err(format!("element {i} of {} is {x}, not {y}", actual.len()));
        }
    }
    Ok(())
}
