//! Pictures in 16 bits, by channels: `[samples, pixels, channels]`, as convolutions on tensor cores read and leave them.
//!
//! Whoever else reads such a value sees it by planes, as a function that finds each element where it is; what needs it in memory by planes has it
//! turned.

use super::{
    super::super::{
        code::{Function, Operand, Text},
        plan::{BufferId, Builder, Unable, Written},
    },
    only, stored,
};
use crate::Work;
use cutover_graph::ValueId;
use cutover_kernels::cuda::{Element, Functions, Transpose};
use cutover_tensor::DType;

pub(super) struct Channels {
    pub buffer: BufferId,
    /// Samples, channels, pixels.
    shape: [usize; 3],
    element: Element,
}

impl Channels {
    /// A picture that a kernel will fill.
    pub fn new(b: &mut Builder<'_>, shape: [usize; 3], element: Element) -> Channels {
        Channels { buffer: b.scratch_halves(shape.iter().product()), shape, element }
    }

    /// `id`, which is `[samples, channels, pixels]`: as it lies there, or turned, once for all who read it so.
    pub fn of(
        b: &mut Builder<'_>,
        id: ValueId,
        shape: [usize; 3],
        element: Element,
    ) -> Result<Option<Channels>, Unable> {
        if let Some(buffer) = b.by_channels(id) {
            return Ok(Some(Channels { buffer, shape, element }));
        }
        let Some(device) = b.gpu.written else { return Ok(None) };
        let operand = b.operand(id)?;
        let turned = Channels::new(b, shape, element);
        let mut text = Text::default();
        let mut functions = "fn finish(i: u32, channel: u32, x: f32) -> f32 { return x; }\n".to_string();
        let (from, inputs) = match &operand {
            Operand::Buffer(buffer, dtype) if stored(*dtype).is_some() => (stored(*dtype), vec![*buffer]),
            operand => {
                let load = text.function(operand);
                functions += &format!("fn x_at(i: u32) -> f32 {{ return {load}(i); }}\n");
                (Some(Element::F32), Vec::new())
            }
        };
        let [batch, rows, columns] = shape;
        let (elements, x_is_function) = ([from.unwrap_or(Element::F32), element], inputs.is_empty());
        let solutions = |functions: Functions, _: usize| {
            only(Transpose { batch, rows, columns, elements, x_is_function, functions }.kernel(device))
        };
        let work = Work { bytes: (6 * batch * rows * columns) as u64, ..Work::default() };
        let (functions, inputs, solutions) = (&functions, &inputs, &solutions);
        let (output, name) = (turned.buffer, &|_: &_| "transposition by hand");
        if !b.push_written(Written { text, functions, inputs, more: &[], output, solutions, name, work }) {
            return Ok(None);
        }
        b.keep_by_channels(id, turned.buffer);
        Ok(Some(turned))
    }

    /// `id` is this.
    pub fn hold(self, b: &mut Builder<'_>, id: ValueId) -> Result<(), Unable> {
        let [_, channels, pixels] = self.shape;
        let whole = channels * pixels;
        let at = format!(
            "let at = (i / {whole}u * {pixels}u + i % {pixels}u) * {channels}u + i / {pixels}u % {channels}u;\n"
        );
        let mut function = match self.element {
            Element::F16 => {
                Function::new(DType::F32, at + "return $0(at);", vec![Operand::Buffer(self.buffer, DType::F16)])
            }
            _ => {
                let words = Operand::Buffer(self.buffer, DType::U32);
                let body = "let word = $0(at / 2u);\nreturn bitcast<f32>(select(word << 16u, word & 0xffff0000u, at % 2u == 1u));";
                Function::new(DType::F32, at + body, vec![words])
            }
        };
        if self.element == Element::F16 {
            let [samples, channels, pixels] = self.shape;
            function.transposes = Some([samples, pixels, channels]);
        }
        b.define_function(id, function)?;
        b.keep_by_channels(id, self.buffer);
        Ok(())
    }
}
