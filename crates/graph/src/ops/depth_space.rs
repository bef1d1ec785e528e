//! Blocks of pixels as channels, and back.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, movement};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// `[n, c, h, w]` to `[n, c / b², h·b, w·b]`, or, the other way, to `[n, c·b², h / b, w / b]`, for blocks of `b × b` pixels.
#[derive(Clone, Debug, PartialEq)]
pub struct DepthSpace {
    pub to_space: bool,
    pub block: usize,
    /// A channel of the deep side counts depth, row and column of the block in the order (depth, row, column); without it, in the order
    /// (row, column, depth).
    pub depth_first: bool,
}

impl DepthSpace {
    fn output(&self, dims: &[Dim]) -> Result<Vec<Dim>, OpError> {
        let [n, c, h, w] = dims else {
            return Err(OpError::input(format!("expected [n, c, h, w], got a tensor of rank {}", dims.len())));
        };
        let (block, area) = (Dim::from(self.block), Dim::from(self.block.saturating_mul(self.block)));
        let divided = |dim: &Dim, by: &Dim, name: &str| match dim.exact_div(by) {
            Some(quotient) => Ok(quotient),
            None if dim.as_const().is_some() => Err(OpError::input(format!("{dim} {name} do not divide by {by}"))),
            None => Ok(dim.floor_div(by)),
        };
        if self.to_space {
            let channels = divided(c, &area, "channels")?;
            return Ok(vec![n.clone(), channels, h.clone() * block.clone(), w.clone() * block]);
        }
        let (rows, columns) = (divided(h, &block, "rows")?, divided(w, &block, "columns")?);
        Ok(vec![n.clone(), c.clone() * area, rows, columns])
    }

    fn moved(&self, shape: &[usize]) -> Result<movement::Moved, OpError> {
        let dims: Vec<Dim> = shape.iter().map(|&d| Dim::from(d)).collect();
        let to = self.output(&dims)?;
        let to: Option<Vec<usize>> = to.iter().map(|d| d.as_const().and_then(|d| usize::try_from(d).ok())).collect();
        let to = to.ok_or_else(|| OpError::Resource("a result with an extent above 64 bits".to_string()))?;
        if to.contains(&0) {
            return Ok(movement::Moved { shape: to, sources: Box::new(std::iter::empty()) });
        }
        let b = self.block;
        // Extents of the deep side, and where a pixel of the wide side is in it.
        let [n, deep, rows, columns] =
            if self.to_space { [0, 1, 2, 3].map(|a| shape[a]) } else { [0, 1, 2, 3].map(|a| to[a]) };
        let depth = deep / (b * b);
        let (channel, row, column) = if self.depth_first { (b * b, b, 1) } else { (1, b * depth, depth) };
        let plane = (rows * columns) as isize;
        let (channel, row, column) = (channel as isize * plane, row as isize * plane, column as isize * plane);
        let batch = deep as isize * plane;
        if self.to_space {
            // The result seen as [n, depth, rows, b, columns, b].
            let seen = vec![n, depth, rows, b, columns, b];
            let sources = movement::strided(seen, vec![batch, channel, columns as isize, row, 1, column], 0).sources;
            return Ok(movement::Moved { shape: to, sources });
        }
        // The result's channels seen by their parts; its sources are pixels of the wide side.
        let wide = |row: usize, column: usize| (row * columns * b + column) as isize;
        let (plane, batch) = (wide(rows * b, 0), wide(rows * b, 0) * depth as isize);
        let (seen, strides) = if self.depth_first {
            (vec![n, depth, b, b, rows, columns], vec![batch, plane, wide(1, 0), 1, wide(b, 0), b as isize])
        } else {
            (vec![n, b, b, depth, rows, columns], vec![batch, wide(1, 0), 1, plane, wide(b, 0), b as isize])
        };
        Ok(movement::Moved { shape: to, sources: movement::strided(seen, strides, 0).sources })
    }
}

impl Operator for DepthSpace {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let to_space = node.op_type == "DepthToSpace";
        if !node.has_attribute("blocksize") {
            return Err(node.corrupt("attribute 'blocksize' is missing"));
        }
        let block = node.count("blocksize", 1)?;
        let depth_first = match node.string("mode", "DCR")?.as_str() {
            "DCR" => false,
            "CRD" => true,
            other => return Err(node.corrupt(format!("attribute 'mode' must be DCR or CRD, got '{other}'"))),
        };
        Ok(DepthSpace { to_space, block, depth_first }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new(if self.to_space { "DepthToSpace" } else { "SpaceToDepth" });
        let spelling = spelling.with("blocksize", self.block as i64);
        match (self.depth_first, self.to_space) {
            (false, _) => spelling,
            (true, true) => spelling.with("mode", "CRD"),
            (true, false) => spelling.with("mode", "CRD").since(28),
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let x = inputs.tensor(0)?;
        let shape = x.shape.as_ref().map(|dims| self.output(dims)).transpose()?;
        Ok(vec![TensorFact { dtype: x.dtype, shape, value: None }.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, shape) = movement::source(inputs)?;
        self.moved(shape)?.apply(x)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};
    use cutover_tensor::Tensor;

    fn counted(shape: &[usize]) -> Tensor {
        tensor(shape, &(0..shape.iter().product::<usize>() as i32).collect::<Vec<_>>())
    }

    #[test]
    fn agrees_with_onnx_runtime() {
        let deep = || counted(&[1, 8, 1, 2]);
        let dcr = [0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15];
        case("DepthToSpace", 1).with("blocksize", 2).input(deep()).gives([tensor(&[1, 2, 2, 4], &dcr)]);
        let crd = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
        let node = case("DepthToSpace", 13).with("blocksize", 2).with("mode", "CRD").input(deep());
        node.gives([tensor(&[1, 2, 2, 4], &crd)]);
        let back = case("SpaceToDepth", 13).with("blocksize", 2).input(tensor(&[1, 2, 2, 4], &dcr));
        back.gives([deep()]);
        let back = case("SpaceToDepth", 28).with("blocksize", 2).with("mode", "CRD").input(tensor(&[1, 2, 2, 4], &crd));
        back.gives([deep()]);
        case("DepthToSpace", 13).with("blocksize", 3).wave(&[0, 9, 2, 2]).gives([f32s(&[0, 1, 6, 6], &[])]);
    }

    #[test]
    fn refuses_what_does_not_divide() {
        case("DepthToSpace", 13).with("blocksize", 2).wave(&[1, 6, 1, 1]).fails("6 channels do not divide by 4");
        case("SpaceToDepth", 13).with("blocksize", 2).wave(&[1, 1, 2, 3]).fails("3 columns do not divide by 2");
        case("SpaceToDepth", 13).with("blocksize", 0).wave(&[1, 1, 2, 2]).fails("must be 1 or more");
        case("SpaceToDepth", 13).with("blocksize", 2).wave(&[1, 2, 2]).fails("expected [n, c, h, w]");
    }
}
