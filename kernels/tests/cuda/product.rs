//! Products: every tile, every order of the factors, every way to read them, against `f64`.

use crate::harness::{Case, Random, near, numbers, rounding, run};
use cutover_kernels::cuda::{
    BlockedProduct, Device, Element, Functions, Operand, Order, Precision, Product, Tile, Way,
};
use std::rc::Rc;

/// A product with random factors, in whose epilogue a bias is added and a ReLU taken.
fn case(random: &mut Random, device: Device, mut product: Product, tile: Option<Tile>) -> Case {
    let count: usize = product.batch.iter().product();
    let (m, n, k) = (product.m, product.n, product.k);
    let is_bytes = product.elements[0].bytes() == 1;
    let sizes = [(m, k), (n, k)];
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    let mut finders = Vec::new();
    for (operand, ((outer, k), element)) in
        [&product.a, &product.b].into_iter().zip(sizes.into_iter().zip(product.elements))
    {
        let (order, leading, strides) = match operand {
            Operand::Array { order, leading, batch } => (*order, *leading, batch.clone()),
            Operand::Function { order } => {
                (*order, if *order == Order::ByK { k } else { outer }, vec![0; product.batch.len()])
            }
        };
        let rows = if order == Order::ByK { outer } else { k };
        let most: usize = strides.iter().zip(&product.batch).map(|(s, e)| s * (e.max(&1) - 1)).sum();
        let (of, numbers) = random.elements(element, most + rows * leading);
        bytes.push(of);
        values.push(numbers);
        let extents = product.batch.clone();
        finders.push(move |z: usize, outer: usize, k: usize| {
            let mut inner: usize = extents.iter().product();
            let mut at = if order == Order::ByK { outer * leading + k } else { k * leading + outer };
            for (extent, stride) in extents.iter().zip(&strides) {
                inner /= extent;
                at += z / inner % extent * stride;
            }
            at
        });
    }
    let channels = if product.channel_is_row { m } else { n };
    let (bias_bytes, bias) = random.elements(if is_bytes { Element::I8 } else { Element::F32 }, channels);
    let mut functions = Functions::default();
    let of = if is_bytes { "i8" } else { "float" };
    functions.pointers.push((format!("const {of}*"), "bias".to_string()));
    let floor = if is_bytes { "x" } else { "fmaxf(x, 0.0f)" };
    functions.text = format!(
        "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) {{ x = x + o.bias[channel]; return {floor}; }}\n"
    );
    let mut extras = vec![bias_bytes];
    for (at, name, axes, operand, (outer, k)) in
        [(0, "a", "u32 m, u32 k", &product.a, sizes[0]), (1, "b", "u32 k, u32 n", &product.b, sizes[1])]
    {
        if let Operand::Function { order } = operand {
            let element = product.elements[at];
            functions.pointers.push((format!("const {}*", element.name()), format!("{name}_array")));
            let outer_name = if at == 0 { "m" } else { "n" };
            let index = match order {
                Order::ByK => format!("{outer_name} * {k}u + k"),
                Order::ByOuter => format!("k * {outer}u + {outer_name}"),
            };
            functions.text += &format!(
                "__device__ float {name}_at(const Operands& o, u32 z, {axes}) {{ return widen(o.{name}_array[{index}]); }}\n"
            );
            extras.push(bytes[at].clone());
        }
    }
    product.functions = functions;
    let kernel = match tile {
        Some(tile) => product.kernel_of(device, tile),
        None => product.kernel(device),
    };
    let kernel = kernel.unwrap();
    let name = format!("{product:?} {tile:?} sm_{}", device.sm).replace(&product.functions.text, "…");
    let result = product.result;
    let inexact = match (product.elements[0], product.precision) {
        (Element::I8 | Element::U8, _) => 0.0,
        (Element::F32, Precision::Tf32) => 2f64.powi(-10),
        _ => 1e-6,
    };
    let channel_is_row = product.channel_is_row;
    let values = Rc::new(values);
    Case {
        name,
        inputs: bytes,
        extras,
        outputs: vec![count * m * n * result.bytes()],
        kernel,
        check: Box::new(move |outputs| {
            let mut expected = Vec::new();
            let mut sizes = Vec::new();
            for (z, at_m, at_n) in (0..count).flat_map(|z| (0..m).flat_map(move |m| (0..n).map(move |n| (z, m, n)))) {
                let (mut sum, mut size) = (bias[if channel_is_row { at_m } else { at_n }], 1.0);
                for k in 0..k {
                    let term = values[0][finders[0](z, at_m, k)] * values[1][finders[1](z, at_n, k)];
                    (sum, size) = (sum + term, size + term.abs());
                }
                let wrapped = match result {
                    Element::I8 => f64::from(sum as i64 as i8),
                    Element::U8 => f64::from(sum as i64 as u8),
                    Element::I32 => sum,
                    _ => sum.max(0.0),
                };
                expected.push(wrapped);
                sizes.push(size);
            }
            near(&numbers(result, &outputs[0]), &expected, |i| {
                inexact * sizes[i]
                    + rounding(result) * 1.01 * expected[i].abs()
                    + if inexact > 0.0 { 6e-8 } else { 0.0 }
            })
        }),
    }
}

fn array(order: Order, outer: usize, k: usize, extra: usize, batch: &[usize]) -> Operand {
    let (along, rows) = if order == Order::ByK { (k, outer) } else { (outer, k) };
    let mut stride = rows * (along + extra);
    let mut batch: Vec<usize> = batch
        .iter()
        .rev()
        .map(|extent| {
            let s = stride;
            stride *= extent;
            s
        })
        .collect();
    batch.reverse();
    Operand::Array { order, leading: along + extra, batch }
}

fn product(
    elements: [Element; 2],
    result: Element,
    [m, n, k]: [usize; 3],
    orders: [Order; 2],
    batch: &[usize],
) -> Product {
    Product {
        m,
        n,
        k,
        batch: batch.to_vec(),
        a: array(orders[0], m, k, 0, batch),
        b: array(orders[1], n, k, 0, batch),
        elements,
        result,
        precision: Precision::Full,
        channel_is_row: false,
        functions: Functions::default(),
    }
}

const ORDERS: [[Order; 2]; 4] = [
    [Order::ByK, Order::ByK],
    [Order::ByK, Order::ByOuter],
    [Order::ByOuter, Order::ByK],
    [Order::ByOuter, Order::ByOuter],
];

/// Every tile that there is for `product`, on shapes one less, equal to, and one more than it, and random ones.
fn every_tile(test: &str, element: Element, precision: Precision, device: Device) {
    let mut random = Random::new(7);
    let mut cases = Vec::new();
    let any = Product { precision, ..product([element; 2], element, [512, 512, 1024], ORDERS[0], &[]) };
    let tiles: Vec<Tile> = any.candidates(device).unwrap().into_iter().map(|(tile, _)| tile).collect();
    for (at, tile) in tiles.iter().filter(|tile| tile.splits == 1).enumerate() {
        let by = [1, 0, 8, 3, 0, 16][at % 6];
        let m = [tile.m - 1, tile.m, tile.m + 1, 2 * tile.m, 1][at % 5];
        let shape = [m, tile.n + by, 2 * tile.k + random.pick(&[0, 1, 4, 8])];
        let mut of = Product { precision, ..product([element; 2], element, shape, ORDERS[at % 4], &[]) };
        of.channel_is_row = at % 3 == 0;
        cases.push(case(&mut random, device, of, Some(*tile)));
    }
    // k in parts, an odd number of steps.
    for tile in tiles.iter().filter(|tile| tile.splits > 1 && tile.m <= 64).step_by(9) {
        let shape = [tile.m + 5, 36, tile.k * (2 * tile.splits + 1) - 3];
        let of = Product { precision, ..product([element; 2], element, shape, ORDERS[1], &[]) };
        cases.push(case(&mut random, device, of, Some(*tile)));
    }
    // What the model chooses, batches that are repeated, rows that are further apart, functions, one element, and nothing to add up.
    for (at, orders) in ORDERS.into_iter().enumerate() {
        let batch: &[usize] = [&[][..], &[3], &[2, 3], &[1, 2]][at];
        let sizes = [1, 5, 17, 24, 40, 64, 67];
        let shape = [random.pick(&sizes), random.pick(&sizes), random.pick(&sizes)];
        let mut of = Product { precision, ..product([element; 2], element, shape, orders, batch) };
        of.b = array(orders[1], shape[1], shape[2], at * 2, &vec![1; batch.len()]);
        if let Operand::Array { batch, .. } = &mut of.b {
            batch.fill(0);
        }
        cases.push(case(&mut random, device, of.clone(), None));
        if at % 2 == 1 {
            of.batch.clear();
            of.a = Operand::Function { order: orders[0] };
            of.b = Operand::Function { order: orders[1] };
            cases.push(case(&mut random, device, of, None));
        }
    }
    for shape in [[1, 1, 1], [3, 2, 0], [0, 4, 4], [7, 1, 9]] {
        let of = Product { precision, ..product([element; 2], element, shape, ORDERS[1], &[]) };
        cases.push(case(&mut random, device, of, None));
    }
    run(test, &cases);
}

#[test]
fn products_without_tensor_cores() {
    every_tile("product_f32", Element::F32, Precision::Full, Device::H100);
}

#[test]
fn products_of_f16() {
    every_tile("product_f16", Element::F16, Precision::Full, Device::H100);
}

#[test]
fn products_of_bf16() {
    every_tile("product_bf16", Element::BF16, Precision::Full, Device::ORIN);
}

#[test]
fn products_of_tf32() {
    every_tile("product_tf32", Element::F32, Precision::Tf32, Device::H100);
}

#[test]
fn products_of_bytes_are_exact() {
    let mut random = Random::new(9);
    let mut cases = Vec::new();
    for (at, a) in [Element::I8, Element::U8, Element::I8].into_iter().enumerate() {
        for shape in [[33, 65, 100], [128, 128, 64], [5, 1, 128], [70, 20, 48]] {
            let result = [Element::I32, Element::I8, Element::U8][at];
            let of = product([a, Element::I8], result, shape, ORDERS[0], &[]);
            cases.push(case(&mut random, Device::H100, of, None));
        }
    }
    run("product_bytes", &cases);
}

#[test]
fn products_of_few_rows() {
    let mut random = Random::new(15);
    let mut cases = Vec::new();
    for (at, element) in [Element::F32, Element::F16, Element::BF16, Element::F32].into_iter().enumerate() {
        for order in [Order::ByK, Order::ByOuter] {
            // Of the last, no 16 bytes lie together.
            let shape = [[1, 72, 520], [3, 136, 264], [8, 24, 1032], [5, 67, 301]][at];
            let batch: &[usize] = if at == 1 { &[2] } else { &[] };
            let of = product([element; 2], element, shape, [Order::ByK, order], batch);
            let tiles = of.candidates(Device::H100).unwrap();
            for (tile, _) in tiles.into_iter().filter(|(tile, _)| tile.way == Way::Rows).step_by(3) {
                cases.push(case(&mut random, Device::H100, of.clone(), Some(tile)));
            }
        }
    }
    run("product_rows", &cases);
}

#[test]
fn products_with_few_bits() {
    let mut random = Random::new(17);
    let mut cases = Vec::new();
    let blocks = [(4, 32), (4, 16), (8, 16), (2, 64), (4, 128), (8, 32), (2, 16)];
    for (at, (bits, block)) in blocks.into_iter().enumerate() {
        let (m, n, k) = ([1, 2, 5, 8][at % 4], [33, 8, 70][at % 3], block * (1 + 13 * at) - [0, 3][at % 2]);
        let element = [Element::F32, Element::F16][at % 2];
        let has_zero_points = at % 3 != 1;
        let blocks = k.div_ceil(block);
        let (a_bytes, a) = random.elements(element, m * k);
        let (b_bytes, b) = random.elements(Element::U8, n * blocks * block * bits / 8);
        let (scale_bytes, scales) = random.elements(element, n * blocks);
        let zero_row = (blocks * bits).div_ceil(8);
        let (zero_bytes, zeros) = random.elements(Element::U8, n * zero_row);
        let of = BlockedProduct {
            m,
            n,
            k,
            bits,
            block,
            has_zero_points,
            element,
            scale: element,
            functions: Functions::default(),
        };
        cases.push(Case {
            name: format!("{of:?}"),
            kernel: of.kernel(Device { multiprocessors: 1 + at as u32, ..Device::H100 }).unwrap(),
            inputs: vec![a_bytes, b_bytes, scale_bytes, zero_bytes],
            extras: vec![],
            outputs: vec![m * n * element.bytes()],
            check: Box::new(move |outputs| {
                let part =
                    |bytes: &[f64], bit: usize| f64::from(bytes[bit / 8] as u32 >> (bit % 8) & ((1 << bits) - 1));
                let (mut expected, mut sizes) = (Vec::new(), Vec::new());
                for (row, column) in (0..m).flat_map(|m| (0..n).map(move |n| (m, n))) {
                    let (mut sum, mut size) = (0.0, 1.0);
                    for at in 0..k {
                        let of = at / block;
                        let q = part(&b[column * blocks * block * bits / 8..], at * bits);
                        let zero = if has_zero_points {
                            part(&zeros[column * zero_row..], of * bits)
                        } else {
                            f64::from(1 << (bits - 1))
                        };
                        let term = a[row * k + at] * (q - zero) * scales[column * blocks + of];
                        (sum, size) = (sum + term, size + term.abs());
                    }
                    expected.push(sum);
                    sizes.push(size);
                }
                let tolerance = |i: usize| 1e-6 * sizes[i] + rounding(element) * 1.01 * f64::abs(expected[i]);
                near(&numbers(element, &outputs[0]), &expected, tolerance)
            }),
        });
    }
    run("product_bits", &cases);
}
