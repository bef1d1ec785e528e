//! What a device gets out of short kernels.

use super::Limits;
use crate::Peak;

/// Multiplications and additions of floats and of bytes in registers, without tensor cores, and bytes read from memory, each the best of some short kernels. `timed` gives the seconds of one run of a
/// kernel with one binding, over so many bytes, of so many groups.
pub(crate) fn peak(limits: &Limits, timed: impl Fn(&str, u64, u32) -> Option<f64>) -> Option<Peak> {
    const GROUP: u64 = 64;
    const CHAINS: u64 = 16;
    // The most that a loop over `CHAINS` independent sums does, of `each` operations a statement.
    let in_registers = |kind: &str, statement: &dyn Fn(u64) -> String, each: u64| {
        // Enough for milliseconds on what a processor imitates, and for a fraction of one on a GPU, so then more.
        let (mut groups, mut rounds) = (256u64, 64u64);
        let mut most: f64 = 0.0;
        for _ in 0..6 {
            let mut body = String::new();
            (0..CHAINS).for_each(|c| body += &format!("var a{c} = x + {kind}({c});\n"));
            body += &format!("for (var r = 0u; r < {rounds}u; r = r + 1u) {{\n");
            (0..CHAINS).for_each(|c| body += &statement(c));
            body += "}\n";
            let sum: Vec<String> = (0..CHAINS).map(|c| format!("a{c}")).collect();
            let source = format!(
                "@group(0) @binding(0) var<storage, read_write> b0: array<{kind}>;\n@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\nlet x = b0[0];\n{body}b0[at.x] = {};\n}}\n",
                sum.join(" + ")
            );
            let seconds = timed(&source, groups * GROUP * 16, groups as u32)?;
            most = most.max((groups * GROUP * rounds * CHAINS * each) as f64 / seconds);
            if seconds > 0.01 {
                break;
            }
            (groups, rounds) = ((groups * 2).min(1 << 14), rounds * 4);
        }
        Some(most)
    };
    let floats = |c: u64| format!("a{c} = fma(a{c}, x, vec4<f32>(0.5));\n");
    let operations_per_second = in_registers("vec4<f32>", &floats, 8)?;
    // A product of four bytes with four, and their sum added to another.
    let bytes = |c: u64| format!("a{c} = a{c} + u32(dot4I8Packed(a{c}, x));\n");
    let integer_operations_per_second = in_registers("u32", &bytes, 8)?;
    let mut bytes_per_second: f64 = 0.0;
    let bytes = (64u64 << 20).min(limits.binding_bytes);
    for _ in 0..3 {
        let (count, stride) = (bytes / 16, bytes / 16 / 16);
        let groups = (stride / GROUP).min(32768);
        let source = format!(
            "@group(0) @binding(0) var<storage, read_write> b0: array<vec4<f32>>;\n@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\nvar a = vec4<f32>(0.0);\nfor (var r = at.x; r < {count}u; r = r + {}u) {{ a = a + b0[r]; }}\nif (a.x == 1.5) {{ b0[at.x] = a; }}\n}}\n",
            groups * GROUP
        );
        let seconds = timed(&source, bytes, groups as u32)?;
        bytes_per_second = bytes_per_second.max(bytes as f64 / seconds);
    }
    Some(Peak { operations_per_second, integer_operations_per_second, bytes_per_second })
}
