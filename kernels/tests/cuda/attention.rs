//! Attention against `f64`: lengths at the edges of blocks, every head size, masks, shared heads, rows that lie apart.

use crate::harness::{Case, Random, near, numbers, rounding, run};
use cutover_kernels::cuda::{Attention, Device, Element, Functions};

fn case(random: &mut Random, device: Device, mut of: Attention) -> Case {
    let counts: [usize; 3] = [0, 1, 2].map(|at| {
        let rows = if at == 0 { of.queries } else { of.keys };
        let heads = if at == 0 { of.heads } else { of.key_heads };
        let [batch, head, row] = of.strides[at];
        (of.batch - 1) * batch
            + (heads - 1) * head
            + rows.saturating_sub(1) * row
            + if at == 2 { of.width } else { of.depth }
    });
    let (inputs, values): (Vec<_>, Vec<_>) = counts.iter().map(|&count| random.elements(of.element, count)).unzip();
    // What is narrowed as it is read loses nothing.
    let inputs = match of.memory == of.element {
        true => inputs,
        false => values.iter().map(|values| values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect()).collect(),
    };
    let (mask_bytes, mask) = random.elements(Element::F32, of.queries * of.keys);
    if of.has_mask {
        of.functions.pointers = vec![("const float*".to_string(), "mask".to_string())];
        of.functions.text = format!(
            "__device__ float mask_at(const Operands& o, u32 batch, u32 head, u32 query, u32 key) {{ return o.mask[query * {}u + key] * (head + 1); }}\n",
            of.keys
        );
    }
    let count = of.batch * of.heads * of.queries * of.width;
    let kernel = of.kernel(device).unwrap();
    Case {
        name: format!("{:?} sm_{}", Attention { functions: Functions::default(), ..of.clone() }, device.sm),
        kernel,
        inputs,
        extras: vec![mask_bytes],
        outputs: vec![count * of.memory.bytes()],
        check: Box::new(move |outputs| {
            let mut expected = vec![0.0; count];
            let at = |of: [usize; 3], batch: usize, head: usize, row: usize| batch * of[0] + head * of[1] + row * of[2];
            for i in 0..of.batch * of.heads * of.queries {
                let (batch, head, query) = (i / (of.heads * of.queries), i / of.queries % of.heads, i % of.queries);
                let of_keys = head / (of.heads / of.key_heads);
                let last = of.causal_offset.map_or(of.keys, |offset| (query + offset + 1).min(of.keys));
                let q = at(of.strides[0], batch, head, query);
                let score = |key: usize| {
                    let k = at(of.strides[1], batch, of_keys, key);
                    let product: f64 = (0..of.depth).map(|d| values[0][q + d] * values[1][k + d]).sum();
                    let mask = if of.has_mask { mask[query * of.keys + key] * (head + 1) as f64 } else { 0.0 };
                    product * f64::from(of.scale) + mask
                };
                let scores: Vec<f64> = (0..last).map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
                let to = at(of.output_strides, batch, head, query);
                for (key, score) in scores.iter().enumerate() {
                    let weight = (score - largest).exp() / total;
                    let v = at(of.strides[2], batch, of_keys, key);
                    (0..of.width).for_each(|d| expected[to + d] += weight * values[2][v + d]);
                }
            }
            // Weights are rounded to the element before they meet values of at most 1.
            let tolerance = if of.element == Element::F32 { 3e-6 } else { 2.0 * rounding(of.element) };
            near(&numbers(of.memory, &outputs[0]), &expected, |i| tolerance * (1.0 + expected[i].abs()))
        }),
    }
}

fn every_shape(test: &str, element: Element, device: Device) {
    let mut random = Random::new(13);
    let mut cases = Vec::new();
    let shapes = [(1, 1, 64), (17, 63, 32), (64, 64, 80), (65, 129, 96), (5, 200, 128), (128, 70, 64), (33, 31, 16)];
    for (at, (queries, keys, depth)) in shapes.into_iter().enumerate() {
        let (batch, heads, key_heads) = (1 + at % 2, 4, [4, 1, 2][at % 3]);
        let width = if at == 3 { 64 } else { depth };
        // Heads before rows, or rows before heads.
        let strides = |rows: usize, heads: usize, row: usize| match at % 2 {
            0 => [heads * rows * row, rows * row, row],
            _ => [rows * heads * row, row, heads * row],
        };
        let of = Attention {
            batch,
            heads,
            key_heads,
            queries,
            keys,
            depth,
            width,
            strides: [strides(queries, heads, depth), strides(keys, key_heads, depth), strides(keys, key_heads, width)],
            output_strides: strides(queries, heads, width),
            scale: 1.0 / (depth as f32).sqrt(),
            causal_offset: [None, Some(0), Some(70)][at % 3].filter(|_| at > 0),
            has_mask: at % 2 == 1,
            element,
            memory: if at % 2 == 0 { element } else { Element::F32 },
            functions: Functions::default(),
        };
        if element == Element::F32 && at == 2 {
            // Rows that no four elements divide.
            let odd = Attention {
                depth: 21,
                width: 7,
                strides: [strides(queries, heads, 21), strides(keys, key_heads, 21), strides(keys, key_heads, 7)],
                output_strides: strides(queries, heads, 7),
                ..of.clone()
            };
            cases.push(case(&mut random, device, odd));
        }
        cases.push(case(&mut random, device, of));
    }
    run(test, &cases);
}

#[test]
fn attention_without_tensor_cores() {
    // So few multiprocessors that blocks are large.
    every_shape("attention_f32", Element::F32, Device { multiprocessors: 8, ..Device::H100 });
}

#[test]
fn attention_of_f16() {
    every_shape("attention_f16", Element::F16, Device::H100);
}

#[test]
fn attention_of_bf16() {
    every_shape("attention_bf16", Element::BF16, Device::ORIN);
}
