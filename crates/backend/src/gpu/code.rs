//! Shader text: values as functions of a place, and kernels made of them.
//!
//! A value that nobody has computed yet is a [`Function`] from the index of an element, row-major, to the element. What reads it may
//! compute it there and then, which is how chains of operators become one kernel; an operand that lies in memory looks the same.

use super::{
    device::Limits,
    plan::{BufferId, FAULTS},
};
use cutover_kernels::wgsl::MATH;
use cutover_tensor::DType;
use std::{
    collections::{HashMap, HashSet},
    fmt::Write,
    rc::Rc,
};

/// Invocations of a group of a kernel that gives one element each.
pub(super) const GROUP: u32 = 64;

/// What a value's elements are in functions: bytes and halves are computed with as words.
pub(super) fn value_type(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::F32 | DType::F16 | DType::BF16 => "f32",
        DType::I8 | DType::I16 | DType::I32 => "i32",
        DType::U8 | DType::U16 | DType::U32 => "u32",
        DType::I64 => "i64",
        DType::U64 => "u64",
        DType::Bool => "bool",
        _ => return None,
    })
}

/// What they are in memory.
pub(super) fn storage_type(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "f16",
        DType::Bool => "u32",
        other => value_type(other).unwrap_or("u32"),
    }
}

pub(super) fn storage_bytes(dtype: DType) -> usize {
    match dtype {
        DType::F16 => 2,
        DType::I64 | DType::U64 => 8,
        _ => 4,
    }
}

/// Whether elements of `dtype` may lie four to a word, see [`Operand::Bytes`].
pub(super) fn is_byte(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::I8 | DType::Bool)
}

/// The byte that `value`, an element of `dtype` as functions give it, is, as a `u32`.
pub(super) fn byte(dtype: DType, value: &str) -> String {
    match dtype {
        DType::Bool => format!("select(0u, 1u, {value})"),
        _ => format!("(u32({value}) & 0xffu)"),
    }
}

/// `value` of the type that functions give, as an element in memory.
pub(super) fn stored(dtype: DType, value: &str) -> String {
    match dtype {
        DType::F16 => format!("f16({value})"),
        DType::Bool => format!("select(0u, 1u, {value})"),
        _ => value.to_string(),
    }
}

/// `value` brought back into what `dtype` holds, where a word holds more.
pub(super) fn wrapped(dtype: DType, value: &str) -> String {
    match dtype {
        DType::BF16 => format!("to_bf16({value})"),
        DType::F16 => format!("f32(f16({value}))"),
        DType::U8 => format!("(({value}) & 0xffu)"),
        DType::U16 => format!("(({value}) & 0xffffu)"),
        DType::I8 => format!("((({value}) << 24u) >> 24u)"),
        DType::I16 => format!("((({value}) << 16u) >> 16u)"),
        _ => value.to_string(),
    }
}

/// A number as WGSL writes it.
pub(super) fn float(value: f32) -> String {
    match value {
        v if v.is_nan() => "not_a_number()".to_string(),
        v if v.is_infinite() => if v > 0.0 { "infinity()" } else { "(-infinity())" }.to_string(),
        v if v < 0.0 || v.is_sign_negative() => format!("({v:?}f)"),
        v => format!("{v:?}f"),
    }
}

/// A whole number of `dtype`, a bool, or a float.
pub(super) fn integer(dtype: DType, value: i128) -> String {
    match dtype {
        DType::Bool => if value != 0 { "true" } else { "false" }.to_string(),
        DType::I64 if value == i128::from(i64::MIN) => "(-9223372036854775807li - 1li)".to_string(),
        DType::I64 => format!("({value}li)"),
        DType::U64 => format!("{value}lu"),
        DType::U8 | DType::U16 | DType::U32 => format!("{value}u"),
        DType::F32 | DType::F16 | DType::BF16 => float(value as f32),
        _ => format!("i32({value})"),
    }
}

/// What an element is, as a function of its index `i: u32`.
pub(super) struct Function {
    pub dtype: DType,
    /// The function's statements; `$0(…)` is the element of operand 0 at an index.
    pub body: String,
    pub operands: Vec<Operand>,
    /// Buffers that computing it reads.
    pub buffers: usize,
    /// Functions that it is made of, itself included.
    pub depth: usize,
    /// `[batch, rows, columns]` of its only operand, where it is that operand with rows and columns exchanged.
    pub transposes: Option<[usize; 3]>,
}

#[derive(Clone)]
pub(super) enum Operand {
    /// In memory, an element in a word or two, or half a word.
    Buffer(BufferId, DType),
    /// In memory, an element a byte.
    Bytes(BufferId, DType),
    /// The same element everywhere.
    Literal(String, DType),
    Function(Rc<Function>),
}

impl Operand {
    pub fn dtype(&self) -> DType {
        match self {
            Operand::Buffer(_, dtype) | Operand::Bytes(_, dtype) | Operand::Literal(_, dtype) => *dtype,
            Operand::Function(function) => function.dtype,
        }
    }
}

impl Function {
    pub fn new(dtype: DType, body: impl Into<String>, operands: Vec<Operand>) -> Function {
        let mut seen = HashSet::new();
        let depth = operands.iter().map(|operand| collect(operand, &mut seen)).sum::<usize>() + 1;
        Function { dtype, body: body.into(), operands, buffers: seen.len(), depth, transposes: None }
    }
}

fn collect(operand: &Operand, seen: &mut HashSet<BufferId>) -> usize {
    match operand {
        Operand::Buffer(buffer, _) | Operand::Bytes(buffer, _) => {
            seen.insert(*buffer);
            0
        }
        Operand::Literal(..) => 0,
        Operand::Function(function) => {
            function.operands.iter().map(|operand| collect(operand, seen)).sum::<usize>() + 1
        }
    }
}

/// Bindings and functions that a kernel's own text follows.
#[derive(Clone, Default)]
pub(super) struct Text {
    bindings: Vec<Binding>,
    functions: String,
    /// Bindings whose elements functions read, and as what.
    loads: Vec<(usize, DType)>,
    /// Bindings that functions write to.
    stores: Vec<usize>,
    /// The names that functions got, by address.
    named: HashMap<*const Function, String>,
    /// Keeps what is named, so that no address is another's.
    kept: Vec<Rc<Function>>,
}

#[derive(Clone)]
pub(super) struct Binding {
    pub buffer: BufferId,
    pub element: &'static str,
    pub writes: bool,
    /// What of the buffer it is, `[begin, end]` in bytes, where one binding can't be all of it.
    pub part: Option<[usize; 2]>,
    reach: Reach,
}

/// How a kernel's text reaches what is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// As an array.
    Array,
    /// Through a function that reads an element, and where [`Limits::has_lanes`](super::Limits) says so a texture.
    Element,
    /// The same of four elements at once.
    Quad,
    /// Through a function that puts an element there.
    Store,
}

/// Texels in a row of a texture that a range of memory is read through: element `i` is at `[i % TEXELS_IN_ROW, i / TEXELS_IN_ROW]`.
pub(crate) const TEXELS_IN_ROW: u32 = 4096;

/// Rows of a texture at most.
const TEXEL_ROWS: usize = 8192;

impl Binding {
    /// The texture's format, if what is bound is read through one.
    fn texels(&self, has_lanes: bool) -> Option<&'static str> {
        match (self.reach, self.element) {
            _ if !has_lanes || self.writes => None,
            (Reach::Quad, _) => Some("rgba32float"),
            (Reach::Element, "f32") => Some("r32float"),
            (Reach::Element, "i32") => Some("r32sint"),
            (Reach::Element, "u32") => Some("r32uint"),
            _ => None,
        }
    }
}

impl Text {
    /// The name of the array of `element` that `buffer` is bound as.
    pub fn bind(&mut self, buffer: BufferId, element: &'static str, writes: bool) -> String {
        let at = self.reach(buffer, element, Reach::Array);
        let binding = &mut self.bindings[at];
        (binding.writes, binding.reach) = (binding.writes | writes, Reach::Array);
        format!("b{at}")
    }

    /// The name of a function of an index and a value that puts an `element` into `buffer`, which may be larger than what is bound at once.
    pub fn store(&mut self, buffer: BufferId, element: &'static str) -> String {
        let at = self.reach(buffer, element, Reach::Store);
        let binding = &mut self.bindings[at];
        if binding.reach != Reach::Array {
            binding.reach = Reach::Store;
        }
        binding.writes = true;
        if !self.stores.contains(&at) {
            self.stores.push(at);
        }
        format!("store_b{at}")
    }

    fn reach(&mut self, buffer: BufferId, element: &'static str, reach: Reach) -> usize {
        let is_quad = |reach| reach == Reach::Quad;
        let same = |b: &Binding| b.buffer == buffer && b.element == element && is_quad(b.reach) == is_quad(reach);
        self.bindings.iter().position(same).unwrap_or_else(|| {
            self.bindings.push(Binding { buffer, element, writes: false, part: None, reach });
            self.bindings.len() - 1
        })
    }

    /// The name of a function of `i` that gives elements `4 i` to `4 i + 3` of an operand of f32 in memory; `None` for others.
    pub fn quads(&mut self, operand: &Operand) -> Option<String> {
        let Operand::Buffer(buffer, DType::F32) = operand else { return None };
        let at = self.reach(*buffer, "f32", Reach::Quad);
        Some(format!("quad_b{at}"))
    }

    /// The name of a function of an index that gives the operand's element.
    pub fn function(&mut self, operand: &Operand) -> String {
        match operand {
            Operand::Buffer(buffer, dtype) => {
                let at = self.reach(*buffer, storage_type(*dtype), Reach::Element);
                if !self.loads.contains(&(at, *dtype)) {
                    self.loads.push((at, *dtype));
                }
                format!("load_b{at}_{dtype}")
            }
            Operand::Bytes(buffer, dtype) => {
                let word = self.function(&Operand::Buffer(*buffer, DType::U32));
                let name = format!("{word}_{dtype}");
                if !self.functions.contains(&format!("fn {name}(")) {
                    let of = code_type(*dtype);
                    let value = match dtype {
                        DType::I8 => format!("bitcast<i32>({word}(i / 4u) << (24u - i % 4u * 8u)) >> 24u"),
                        DType::Bool => format!("({word}(i / 4u) >> (i % 4u * 8u) & 0xffu) != 0u"),
                        _ => format!("{word}(i / 4u) >> (i % 4u * 8u) & 0xffu"),
                    };
                    let _ = writeln!(self.functions, "fn {name}(i: u32) -> {of} {{ return {value}; }}");
                }
                name
            }
            Operand::Literal(value, dtype) => {
                let name = format!("f{}", self.functions.matches("fn ").count());
                let of = value_type(*dtype).unwrap_or("u32");
                let _ = writeln!(self.functions, "fn {name}(i: u32) -> {of} {{ return {value}; }}");
                name
            }
            Operand::Function(function) => {
                if let Some(name) = self.named.get(&Rc::as_ptr(function)) {
                    return name.clone();
                }
                let names: Vec<String> = function.operands.iter().map(|operand| self.function(operand)).collect();
                let mut body = function.body.clone();
                for (at, name) in names.iter().enumerate().rev() {
                    body = body.replace(&format!("${at}("), &format!("{name}("));
                }
                if body.contains("fault(") {
                    self.fault();
                }
                let name = format!("f{}", self.functions.matches("fn ").count());
                let of = value_type(function.dtype).unwrap_or("u32");
                let _ = writeln!(self.functions, "fn {name}(i: u32) -> {of} {{\n{body}\n}}");
                self.named.insert(Rc::as_ptr(function), name.clone());
                self.kept.push(Rc::clone(function));
                name
            }
        }
    }

    /// Adds functions that call those there are.
    pub fn define(&mut self, functions: &str) {
        self.functions += functions;
    }

    /// Defines `fault(code: u32)`, which fails the run; whoever writes last is believed.
    pub fn fault(&mut self) {
        if !self.functions.contains("fn fault(") {
            let array = self.bind(FAULTS, "u32", true);
            let _ = writeln!(self.functions, "fn fault(code: u32) {{ {array}[0] = code; }}");
        }
    }

    /// The whole text, with `kernel` at its end, and what it binds in order. A buffer of more `bytes` than the device binds at once is bound
    /// in parts, which the functions that read and write it choose among.
    ///
    /// # Errors
    /// One that the kernel itself reaches into.
    pub fn finish(
        self,
        kernel: &str,
        limits: &Limits,
        bytes: &dyn Fn(BufferId) -> usize,
    ) -> Result<(String, Vec<Binding>), String> {
        let (mut text, mut code) = (String::new(), String::new());
        let has_lanes = limits.has_lanes;
        let mut bindings = self.bindings.clone();
        // By binding: elements of a part, and the names of the parts.
        let mut parts: Vec<(usize, Vec<String>)> = Vec::new();
        let mut formats = Vec::new();
        for (at, binding) in self.bindings.iter().enumerate() {
            let (whole, size) = (bytes(binding.buffer), element_bytes(binding.element));
            let mut names = vec![format!("b{at}")];
            let texel = if binding.reach == Reach::Quad { 16 } else { size };
            let fits = whole.div_ceil(texel * TEXELS_IN_ROW as usize) <= TEXEL_ROWS;
            formats.push(binding.texels(has_lanes && fits));
            if formats[at].is_some() {
                parts.push((whole, names));
                continue;
            }
            // Whole vectors, at offsets that a binding may have.
            let most =
                (limits.binding_bytes.min(u64::from(u32::MAX)) as usize / limits.alignment).max(1) * limits.alignment;
            if whole > most {
                if binding.reach == Reach::Array {
                    return Err(format!("a tensor of {whole} bytes, of which {most} are bound at once"));
                }
                bindings[at].part = Some([0, most]);
                for begin in (most..whole).step_by(most) {
                    names.push(format!("b{}", bindings.len()));
                    let part = Some([begin, whole.min(begin + most)]);
                    bindings.push(Binding { part, ..binding.clone() });
                }
            }
            parts.push((most / size, names));
        }
        // An element `i` of a binding in parts: `statement` of the array's name and the index into it.
        let chosen = |at: usize, statement: &dyn Fn(&str, &str) -> String| {
            let (each, names) = &parts[at];
            let mut text = String::new();
            for (part, name) in names.iter().enumerate().rev() {
                let index = if part == 0 { "i".to_string() } else { format!("i - {}u", part * each) };
                let statement = statement(name, &index);
                text += &match part {
                    0 => statement,
                    _ => format!("if (i >= {}u) {{ {statement} }} else {{ ", part * each),
                };
            }
            text + &" }".repeat(names.len() - 1)
        };
        for &(at, dtype) in &self.loads {
            let of = code_type(dtype);
            let loaded = |element: String| match dtype {
                DType::F16 => format!("f32({element})"),
                DType::Bool => format!("{element} != 0u"),
                _ => element,
            };
            let body = match formats[at] {
                Some(_) => format!("return {};", loaded(format!("textureLoad(b{at}, {}).x", texel("i")))),
                None => chosen(at, &|name, index| format!("return {};", loaded(format!("{name}[{index}]")))),
            };
            let _ = writeln!(code, "fn load_b{at}_{dtype}(i: u32) -> {of} {{ {body} }}");
        }
        for (at, _) in self.bindings.iter().enumerate().filter(|(_, binding)| binding.reach == Reach::Quad) {
            let body = match formats[at] {
                Some(_) => format!("return textureLoad(b{at}, {});", texel("i")),
                None => {
                    let (each, names) = &parts[at];
                    let quad = |name: &str, from: usize| {
                        let one = |j: usize| format!("{name}[4u * (i - {}u) + {j}u]", from / 4);
                        format!("return vec4<f32>({});", (0..4).map(one).collect::<Vec<_>>().join(", "))
                    };
                    let mut body = String::new();
                    for (part, name) in names.iter().enumerate().skip(1).rev() {
                        let _ = writeln!(body, "if (i >= {}u) {{ {} }}", part * each / 4, quad(name, part * each));
                    }
                    body + &quad(&names[0], 0)
                }
            };
            let _ = writeln!(code, "fn quad_b{at}(i: u32) -> vec4<f32> {{ {body} }}");
        }
        for &at in &self.stores {
            let body = chosen(at, &|name, index| format!("{name}[{index}] = x;"));
            let _ = writeln!(code, "fn store_b{at}(i: u32, x: {}) {{ {body} }}", self.bindings[at].element);
        }
        code += &self.functions;
        code += kernel;
        let uses_f16 = code.contains("f16(") || bindings.iter().any(|b| b.element.contains("f16"));
        if uses_f16 {
            text += "enable f16;\n";
        }
        for (at, binding) in bindings.iter().enumerate() {
            let Binding { element, writes, .. } = binding;
            let access = if *writes { "read_write" } else { "read" };
            let _ = match formats.get(at).copied().flatten() {
                Some(format) => {
                    writeln!(text, "@group(0) @binding({at}) var b{at}: texture_storage_2d<{format}, read>;")
                }
                None => writeln!(text, "@group(0) @binding({at}) var<storage, {access}> b{at}: array<{element}>;"),
            };
        }
        let uses_math = ["_of(", "infinity()", "not_a_number()", "is_nan(", "is_infinite(", "to_bf16("];
        if uses_math.iter().any(|name| code.contains(name)) {
            text += MATH;
        }
        text += &code;
        Ok((text, bindings))
    }
}

fn code_type(dtype: DType) -> &'static str {
    value_type(dtype).unwrap_or("u32")
}

/// Bytes of an element of an array in memory.
fn element_bytes(element: &str) -> usize {
    match element {
        "f16" => 2,
        "i64" | "u64" => 8,
        "vec4<f32>" => 16,
        _ => 4,
    }
}

/// Where the texture of a range has its texel `index`.
fn texel(index: &str) -> String {
    format!("vec2<u32>({index} % {TEXELS_IN_ROW}u, {index} / {TEXELS_IN_ROW}u)")
}

/// Statements that give the coordinates `{prefix}0, {prefix}1, …` of element `index` of `shape`.
pub(super) fn coordinates(shape: &[usize], index: &str, prefix: &str) -> String {
    let mut text = String::new();
    let strides = strides(shape);
    for (axis, (&extent, &stride)) in shape.iter().zip(&strides).enumerate() {
        let quotient = if stride == 1 { format!("({index})") } else { format!("({index}) / {stride}u") };
        // The first axis that counts has nothing before it.
        let is_first = shape[..axis].iter().all(|&extent| extent == 1);
        let coordinate = match (extent, is_first) {
            (1, _) => "0u".to_string(),
            (_, true) => quotient,
            (extent, false) => format!("{quotient} % {extent}u"),
        };
        let _ = writeln!(text, "let {prefix}{axis} = {coordinate};");
    }
    text
}

/// `offset + Σ coordinate · stride`, of coordinates named as in [`coordinates`].
pub(super) fn position(strides: &[usize], offset: usize, prefix: &str) -> String {
    let term = |(axis, &stride): (usize, &usize)| match stride {
        0 => None,
        1 => Some(format!("{prefix}{axis}")),
        stride => Some(format!("{prefix}{axis} * {stride}u")),
    };
    let mut terms: Vec<String> = strides.iter().enumerate().filter_map(term).collect();
    if offset > 0 || terms.is_empty() {
        terms.push(format!("{offset}u"));
    }
    terms.join(" + ")
}

/// Row-major strides.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// Strides of `shape` where it is broadcast to `to`: 0 along what is repeated.
pub(super) fn broadcast_strides(shape: &[usize], to: &[usize]) -> Vec<usize> {
    let missing = to.len() - shape.len();
    let own = strides(shape);
    let stride = |axis: usize| match axis.checked_sub(missing) {
        Some(axis) if shape[axis] != 1 => own[axis],
        _ => 0,
    };
    (0..to.len()).map(stride).collect()
}

/// The index into a tensor of `shape` of what is at `i` of `to`, and the statements before it.
pub(super) fn broadcast(shape: &[usize], to: &[usize]) -> (String, String) {
    let count: usize = shape.iter().product();
    if count == to.iter().product::<usize>() {
        return (String::new(), "i".to_string());
    }
    if count == 1 {
        return (String::new(), "0u".to_string());
    }
    // Along trailing axes alone, or all but them: no coordinates are needed.
    let missing = to.len() - shape.len();
    let leading = shape.iter().take_while(|&&extent| extent == 1).count();
    if shape[leading..] == to[missing + leading..] {
        return (String::new(), format!("i % {count}u"));
    }
    let merged = merge(&broadcast_strides(shape, to), to);
    let (strides, to): (Vec<usize>, Vec<usize>) = merged.into_iter().unzip();
    (coordinates(&to, "i", "c"), position(&strides, 0, "c"))
}

/// Strides and extents with neighbouring axes made one where one stride follows from the other.
fn merge(strides: &[usize], shape: &[usize]) -> Vec<(usize, usize)> {
    let mut merged: Vec<(usize, usize)> = Vec::new();
    for (&stride, &extent) in strides.iter().zip(shape).filter(|&(_, &extent)| extent != 1) {
        match merged.last_mut() {
            Some((last, of)) if *last == stride * extent => (*last, *of) = (stride, *of * extent),
            _ => merged.push((stride, extent)),
        }
    }
    merged
}

/// As [`merge`], for a tensor of `strides` seen as `shape`: statements, and the index.
pub(super) fn strided(strides: &[usize], shape: &[usize], offset: usize) -> (String, String) {
    let (strides, shape): (Vec<usize>, Vec<usize>) = merge(strides, shape).into_iter().unzip();
    (coordinates(&shape, "i", "c"), position(&strides, offset, "c"))
}

/// Groups of [`GROUP`] invocations for `count` elements, and the statement that gives each its index `i`.
pub(super) fn grid(count: usize, group: u32) -> ([u32; 3], String) {
    let groups = count.div_ceil(group as usize).max(1);
    let columns = groups.min(32768);
    let rows = groups.div_ceil(columns);
    let index = match rows {
        1 => "let i = at.x;".to_string(),
        _ => format!("let i = at.x + at.y * {}u;", columns as u32 * group),
    };
    ([columns as u32, rows as u32, 1], format!("{index}\nif (i >= {count}u) {{ return; }}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasts_that_need_no_coordinates_have_none() {
        assert_eq!(broadcast(&[3, 4], &[3, 4]), (String::new(), "i".to_string()));
        assert_eq!(broadcast(&[1, 1], &[3, 4]), (String::new(), "0u".to_string()));
        assert_eq!(broadcast(&[4], &[2, 3, 4]), (String::new(), "i % 4u".to_string()));
        let (statements, index) = broadcast(&[3, 1, 1], &[2, 3, 5, 7]);
        assert_eq!(index, "c1");
        assert_eq!(statements, "let c0 = (i) / 105u;\nlet c1 = (i) / 35u % 3u;\nlet c2 = (i) % 35u;\n");
    }

    #[test]
    fn a_function_that_is_read_twice_is_written_once() {
        let x = Operand::Buffer(BufferId(0), DType::F32);
        let square = Operand::Function(Rc::new(Function::new(DType::F32, "let v = $0(i);\nreturn v * v;", vec![x])));
        let sum = Function::new(DType::F32, "return $0(i) + $1(i);", vec![square.clone(), square]);
        assert_eq!((sum.buffers, sum.depth), (1, 3));
        let mut text = Text::default();
        text.function(&Operand::Function(Rc::new(sum)));
        let (source, bindings) = text.finish("", &limits(1 << 20), &|_| 400).unwrap();
        assert_eq!((bindings.len(), source.matches("v * v").count()), (1, 1));
    }

    fn limits(binding_bytes: u64) -> Limits {
        Limits {
            has_f16: false,
            has_i64: false,
            has_lanes: false,
            is_imitated: false,
            written: None,
            buffer_bytes: 1 << 30,
            binding_bytes,
            alignment: 256,
            bindings: 8,
            groups: 65535,
            invocations: 256,
        }
    }

    #[test]
    fn what_no_binding_holds_is_bound_in_parts() {
        let mut text = Text::default();
        text.function(&Operand::Buffer(BufferId(1), DType::F32));
        let store = text.store(BufferId(2), "vec4<f32>");
        let (source, bindings) = text.finish(&store, &limits(1000), &|_| 1700).unwrap();
        let parts: Vec<_> = bindings.iter().map(|b| (b.buffer.0, b.part.unwrap(), b.writes)).collect();
        let expected =
            [(1, [0, 768]), (2, [0, 768]), (1, [768, 1536]), (1, [1536, 1700]), (2, [768, 1536]), (2, [1536, 1700])];
        assert_eq!(parts, expected.map(|(buffer, part)| (buffer, part, buffer == 2)));
        assert!(
            source.contains("if (i >= 384u) { return b3[i - 384u]; } else { if (i >= 192u) { return b2[i - 192u]; }")
        );
        assert!(
            source.contains("if (i >= 96u) { b5[i - 96u] = x; } else { if (i >= 48u) { b4[i - 48u] = x; }"),
            "{source}"
        );
        let mut text = Text::default();
        text.bind(BufferId(2), "f32", true);
        assert!(text.finish("", &limits(1000), &|_| 1700).is_err());
    }
}
