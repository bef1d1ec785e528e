//! Functions of rows, and matrices transposed.

use super::{
    super::super::{
        code::{self, Function, Operand, Text},
        plan::{BufferId, Builder, Written},
    },
    only, stored,
};
use crate::Work;
use cutover_kernels::cuda::{self, Element, RowFunction};
use cutover_tensor::DType;

/// Elements of a row beyond which a kernel reads it several times.
const HELD: usize = 1 << 14;

/// A function of the rows of `x`, `[rows, length]`.
pub(in super::super) struct Rows<'a> {
    pub x: &'a Operand,
    pub rows: usize,
    pub length: usize,
    pub function: RowFunction,
    /// What is put into rows of an element `x`.
    pub term: &'a str,
    pub to: BufferId,
    /// Of the result.
    pub dtype: DType,
    pub name: &'static str,
}

/// Fills `to` with the function of `x`'s rows; `finish` gives the statements that return a result from its index `i`, its place in the row
/// `channel` (of reductions the row), and what the kernel found for it, `x`.
pub(in super::super) fn rows(b: &mut Builder<'_>, of: &Rows<'_>, finish: impl FnOnce(&mut Text) -> String) -> bool {
    let &Rows { x, rows, length, function, term, to, dtype, name } = of;
    let (Some(device), Some(element)) = (b.gpu.written, stored(dtype)) else { return false };
    if rows == 0 || length == 0 || stored(x.dtype()).is_none() || (length > HELD && matches!(x, Operand::Function(_))) {
        return false;
    }
    let mut text = Text::default();
    let (mut functions, inputs) = as_input(&mut text, x, element, term);
    functions += &format!("fn finish(i: u32, channel: u32, x: f32) -> f32 {{\n{}\n}}\n", finish(&mut text));
    let solutions = |functions: cuda::Functions, _: usize| {
        let x_is_function = inputs.is_empty();
        only(cuda::Rows { rows, length, function, element, x_is_function, functions }.kernel(device))
    };
    let work = Work { bytes: (rows * length * element.bytes()) as u64, ..Work::default() };
    let (functions, inputs) = (&functions, &inputs);
    b.push_written(Written {
        text,
        functions,
        inputs,
        more: &[],
        output: to,
        solutions: &solutions,
        name: &|_| name,
        work,
    })
}

/// `operand`, as far as it is an array of `element`, or the function that gives `term` of its element `x`.
fn as_input(text: &mut Text, operand: &Operand, element: Element, term: &str) -> (String, Vec<BufferId>) {
    match operand {
        Operand::Buffer(buffer, of) if stored(*of) == Some(element) && term == "x" => (String::new(), vec![*buffer]),
        _ => {
            let load = text.function(operand);
            (format!("fn x_at(i: u32) -> f32 {{\nlet x = {load}(i);\nreturn {term};\n}}\n"), Vec::new())
        }
    }
}

/// Fills `to` with what `function` gives, where that is a matrix of floats transposed.
pub(in super::super::super) fn transposed(b: &mut Builder<'_>, function: &Function, to: BufferId) -> bool {
    let (Some(device), Some([batch, rows, columns]), Some(element)) =
        (b.gpu.written, function.transposes, stored(function.dtype))
    else {
        return false;
    };
    let Some(operand) = function.operands.first() else { return false };
    let mut text = Text::default();
    let (mut functions, inputs) = as_input(&mut text, operand, element, "x");
    functions += "fn finish(i: u32, channel: u32, x: f32) -> f32 { return x; }\n";
    let solutions = |functions: cuda::Functions, _: usize| {
        let x_is_function = inputs.is_empty();
        only(cuda::Transpose { batch, rows, columns, elements: [element; 2], x_is_function, functions }.kernel(device))
    };
    let work =
        Work { bytes: (2 * batch * rows * columns * code::storage_bytes(function.dtype)) as u64, ..Work::default() };
    let (functions, inputs, name) = (&functions, &inputs, "transposition by hand");
    b.push_written(Written {
        text,
        functions,
        inputs,
        more: &[],
        output: to,
        solutions: &solutions,
        name: &|_| name,
        work,
    })
}
