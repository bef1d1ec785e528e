//! Building blocks of the kernels' text.

use super::{Argument, DEVICE, Functions, Refused};
use std::fmt::Write;

/// `constexpr u32 NAME = value;`
pub fn constant(name: &str, value: usize) -> String {
    format!("constexpr u32 {name} = {value}u;\n")
}

/// `begin + Σ coordinate · stride` over the axes of `extents`, whose row-major index is `index`; of no axes, 0.
pub fn index_text(extents: &[usize], strides: &[usize], index: &str) -> String {
    let mut terms = Vec::new();
    let mut inner: usize = extents.iter().product();
    for (axis, (&extent, &stride)) in extents.iter().zip(strides).enumerate() {
        inner /= extent.max(1);
        if extent <= 1 || stride == 0 {
            continue;
        }
        let quotient = if inner == 1 { index.to_string() } else { format!("{index} / {inner}u") };
        // The first axis that counts has nothing before it.
        let is_first = extents[..axis].iter().all(|&extent| extent == 1);
        let coordinate = if is_first { quotient } else { format!("{quotient} % {extent}u") };
        terms.push(format!("({coordinate}) * {stride}u"));
    }
    if terms.is_empty() { "0u".to_string() } else { terms.join(" + ") }
}

/// What stands before a kernel: the device's functions, `Operands` with `members`, and the caller's functions. `sum` is the type of sums,
/// which `finish` gets and gives.
pub(super) fn begin(members: &[(&str, String, Argument)], functions: &Functions, sum: &str) -> (String, Vec<Argument>) {
    let mut text = format!("{DEVICE}\nstruct Operands {{\n");
    let mut arguments = Vec::new();
    for (name, of, argument) in members {
        let _ = writeln!(text, "{of} {name};");
        arguments.push(*argument);
    }
    for (at, (of, name)) in functions.pointers.iter().enumerate() {
        let _ = writeln!(text, "{of} {name};");
        arguments.push(Argument::Extra(at));
    }
    let _ = writeln!(text, "}};\nusing Sum = {sum};\n{}", functions.text);
    if !functions.text.contains(" finish(") {
        text += "__device__ __forceinline__ Sum finish(const Operands&, u32, u32, Sum x) { return x; }\n";
    }
    (text, arguments)
}

/// Fails where an operand of `count` elements can't be indexed by `u32`.
pub(super) fn check_count(what: &str, count: usize) -> Result<(), Refused> {
    match u32::try_from(count) {
        Ok(_) => Ok(()),
        Err(_) => Err(Refused(format!("{what} of {count} elements: a kernel's indices have 32 bits"))),
    }
}

/// Blocks along a grid's axis, of which y and z have at most 65,535.
pub(super) fn check_grid(grid: [usize; 3]) -> Result<[u32; 3], Refused> {
    let fits = grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16;
    if !fits {
        return Err(Refused(format!("{grid:?} blocks: more than a grid has")));
    }
    Ok(grid.map(|extent| extent as u32))
}
