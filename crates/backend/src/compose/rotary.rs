//! Rotation by position: halves that are multiplied, swapped and added.

use super::{Composing, known};
use cutover_graph::{
    Patch,
    ops::{BinaryFunction, Gather, RotaryEmbedding},
};

pub(super) fn rotary(mut composing: Composing<'_>, op: &RotaryEmbedding) -> Option<Patch> {
    let (x, shape) = composing.floats(0)?;
    let (cos, sin, positions) = op.angles();
    let ((mut cos, cos_shape), (mut sin, _)) = (composing.floats(cos)?, composing.floats(sin)?);
    let positions = composing.input(positions);
    let half = known(cos_shape.last()?)?;
    let (heads, size) = match shape.len() {
        3 => {
            let hidden = known(&shape[2])?;
            let heads = op.heads.map_or(hidden / (2 * half), |heads| heads as i64);
            (heads, hidden.checked_div(heads)?)
        }
        4 => (known(&shape[1])?, known(&shape[3])?),
        _ => return None,
    };
    let rotated = op.rotation.size.map_or(size, |size| size as i64);
    if rotated != 2 * half || rotated > size {
        return None;
    }
    match positions {
        Some(positions) => {
            // One position for all is ONNX Runtime's; the others are of every vector.
            if composing.subject.shape(positions)?.len() != 2 || cos_shape.len() != 2 {
                return None;
            }
            for angles in [&mut cos, &mut sin] {
                *angles = composing.op(Gather { axis: 0 }, &[*angles, positions.into()]);
            }
        }
        None if cos_shape.len() == 3 => {}
        None => return None,
    }
    // `[b, s, n, h]` or `[b, n, s, h]`, and angles that broadcast over heads.
    let vectors = if shape.len() == 3 { composing.reshape(x, &[0, 0, heads, size]) } else { x };
    let over_heads: i64 = if shape.len() == 3 { 2 } else { 1 };
    let axes = if op.rotation.interleaved { vec![over_heads, 4] } else { vec![over_heads] };
    let (cos, sin) = (composing.unsqueeze(cos, &axes), composing.unsqueeze(sin, &axes));
    let part = if rotated < size { composing.slice(vectors, -1, 0, rotated) } else { vectors };
    let (a, b) = match op.rotation.interleaved {
        true => {
            let pairs = composing.reshape(part, &[0, 0, 0, half, 2]);
            (composing.slice(pairs, -1, 0, 1), composing.slice(pairs, -1, 1, 2))
        }
        false => (composing.slice(part, -1, 0, half), composing.slice(part, -1, half, rotated)),
    };
    let products = [(cos, a), (sin, b), (sin, a), (cos, b)].map(|(angle, x)| composing.mul(angle, x));
    let real = composing.binary(BinaryFunction::Sub, products[0], products[1]);
    let imaginary = composing.add(products[2], products[3]);
    let mut y = composing.concat(&[real, imaginary], -1);
    if op.rotation.interleaved {
        y = composing.reshape(y, &[0, 0, 0, rotated]);
    }
    if rotated < size {
        let rest = composing.slice(vectors, -1, rotated, size);
        y = composing.concat(&[y, rest], -1);
    }
    if shape.len() == 3 {
        y = composing.reshape(y, &[0, 0, heads * size]);
    }
    composing.finish(&[Some(y)])
}
