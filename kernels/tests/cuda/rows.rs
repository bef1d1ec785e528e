//! Functions of rows and transpositions against `f64`, of lengths at the edges of warps and blocks.

use crate::harness::{Case, Random, near, numbers, rounding, run};
use cutover_kernels::cuda::{Device, Element, Functions, RowFunction, Rows, Transpose};

fn expected(function: RowFunction, row: &[f64]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = row.iter().map(|x| (x - largest).exp()).sum();
    let mean = row.iter().sum::<f64>() / row.len() as f64;
    let square = |shift: f64| row.iter().map(|x| (x - shift) * (x - shift)).sum::<f64>() / row.len() as f64;
    match function {
        RowFunction::Softmax => row.iter().map(|x| (x - largest).exp() / total).collect(),
        RowFunction::LogSoftmax => row.iter().map(|x| x - largest - total.ln()).collect(),
        RowFunction::LayerNorm { epsilon } => {
            row.iter().map(|x| (x - mean) / (square(mean) + f64::from(epsilon)).sqrt()).collect()
        }
        RowFunction::RmsNorm { epsilon } => row.iter().map(|x| x / (square(0.0) + f64::from(epsilon)).sqrt()).collect(),
        RowFunction::Sum => vec![mean * row.len() as f64],
        RowFunction::Mean => vec![mean],
        RowFunction::Max => vec![largest],
        RowFunction::Min => vec![row.iter().copied().fold(f64::INFINITY, f64::min)],
    }
}

#[test]
fn functions_of_rows() {
    let mut random = Random::new(19);
    let mut cases = Vec::new();
    let functions = [
        RowFunction::Softmax,
        RowFunction::LogSoftmax,
        RowFunction::LayerNorm { epsilon: 1e-5 },
        RowFunction::RmsNorm { epsilon: 1e-6 },
        RowFunction::Sum,
        RowFunction::Mean,
        RowFunction::Max,
        RowFunction::Min,
    ];
    let lengths = [1, 31, 32, 72, 1000, 1024, 1025, 4096, 9001, 40000];
    for (at, length) in lengths.into_iter().enumerate() {
        for (of, function) in functions.into_iter().enumerate().filter(|(of, _)| length < 1000 || (of + at) % 3 == 0) {
            let element = [Element::F32, Element::F16, Element::BF16][(at + of) % 3];
            let rows = if length > 2000 { 2 } else { 5 };
            let (input, values) = random.elements(element, rows * length);
            let x_is_function = of == 2;
            let mut functions = Functions::default();
            let mut extras = Vec::new();
            if x_is_function {
                functions.pointers = vec![(format!("const {}*", element.name()), "array".to_string())];
                functions.text =
                    "__device__ float x_at(const Operands& o, u32 i) { return 2.0f * widen(o.array[i]); }\n"
                        .to_string();
                extras.push(input.clone());
            }
            let values: Vec<f64> = values.into_iter().map(|x| if x_is_function { 2.0 * x } else { x }).collect();
            let expected: Vec<f64> = values.chunks(length).flat_map(|row| expected(function, row)).collect();
            let kernel = Rows { rows, length, function, element, x_is_function, functions };
            cases.push(Case {
                name: format!("{function:?} of {rows} rows of {length} {}", element.name()),
                kernel: kernel.kernel(Device::H100).unwrap(),
                inputs: vec![input],
                extras,
                outputs: vec![expected.len() * element.bytes()],
                check: Box::new(move |outputs| {
                    // Sums of uniform numbers: the error grows with their root.
                    let inexact = 2e-6 * (length as f64).sqrt().max(8.0) / 8.0;
                    let tolerance = |i: usize| (inexact + rounding(element) * 1.01) * (1.0 + f64::abs(expected[i]));
                    near(&numbers(element, &outputs[0]), &expected, tolerance)
                }),
            });
        }
    }
    run("rows", &cases);
}

#[test]
fn transpositions() {
    let mut random = Random::new(21);
    let mut cases = Vec::new();
    for (at, (rows, columns)) in [(1, 1), (64, 64), (63, 130), (65, 3), (200, 66), (3, 97)].into_iter().enumerate() {
        let elements = [[Element::F32; 2], [Element::F32, Element::F16], [Element::F16; 2]][at % 3];
        let batch = 1 + at % 2;
        let (input, values) = random.elements(elements[0], batch * rows * columns);
        let of = Transpose { batch, rows, columns, elements, x_is_function: false, functions: Functions::default() };
        let place = move |i: usize| (i / (rows * columns) * rows + i % rows) * columns + i / rows % columns;
        let expected: Vec<f64> = (0..values.len()).map(|i| values[place(i)]).collect();
        cases.push(Case {
            name: format!("{of:?}"),
            kernel: of.kernel(Device::H100).unwrap(),
            inputs: vec![input],
            extras: vec![],
            outputs: vec![expected.len() * elements[1].bytes()],
            check: Box::new(move |outputs| {
                let tolerance = if elements[0] == elements[1] { 0.0 } else { rounding(elements[1]) * 1.01 };
                near(&numbers(elements[1], &outputs[0]), &expected, |_| tolerance)
            }),
        });
    }
    run("transpose", &cases);
}
