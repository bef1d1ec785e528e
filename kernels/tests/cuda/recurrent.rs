//! Recurrences against `f64`: every cell, both directions, short sequences, matrices in registers and not.

use crate::harness::{Case, Random, near, numbers, run};
use cutover_kernels::cuda::{Cell, Device, Element, Functions, Recurrence};

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn recurrences() {
    let mut random = Random::new(27);
    let mut cases = Vec::new();
    let cells = [
        Cell::Rnn,
        Cell::Gru { is_linear: false },
        Cell::Gru { is_linear: true },
        Cell::Lstm { is_coupled: false },
        Cell::Lstm { is_coupled: true },
    ];
    // The last matrix is larger than the registers.
    for (at, (cell, hidden)) in
        cells.into_iter().flat_map(|cell| [1, 30, 64, 150].map(|hidden| (cell, hidden))).enumerate()
    {
        let (steps, batch, directions) = (1 + at % 4, 1 + at % 3, 1 + at % 2);
        let rows = cell.gates() * hidden;
        let text = format!(
            "__device__ float gate(const Operands& o, u32 d, u32 t, u32 n, u32 row) {{ return o.gates[((d * {steps} + t) * {batch} + n) * {rows} + row]; }}
__device__ float recurrent_bias(const Operands& o, u32 d, u32 row) {{ return o.biases[d * {rows} + row]; }}
__device__ float initial(const Operands& o, u32 d, u32 n, u32 j) {{ return o.states[(d * {batch} + n) * {hidden} + j]; }}
__device__ float initial_cell(const Operands& o, u32 d, u32 n, u32 j) {{ return -o.states[(d * {batch} + n) * {hidden} + j]; }}
__device__ float peephole(const Operands& o, u32 d, u32 i) {{ return o.peepholes[d * {} + i]; }}
__device__ u32 length_of(const Operands& o, u32 n) {{ return n == 1 ? {steps} / 2 : {steps}; }}
__device__ bool is_reverse(u32 d) {{ return d == 1; }}
__device__ float activate0(float x, u32 d) {{ return 1.0f / (1.0f + expf(-x)); }}
__device__ float activate1(float x, u32 d) {{ return tanhf(x); }}
__device__ float activate2(float x, u32 d) {{ return tanhf(x); }}
__device__ void put(const Operands& o, u32 d, u32 t, u32 n, u32 j, float h) {{ o.y[((d * {steps} + t) * {batch} + n) * {hidden} + j] = h; }}
__device__ void put_last(const Operands& o, u32 d, u32 n, u32 j, float h, float c) {{ o.y_last[(d * {batch} + n) * {hidden} + j] = h + 2.0f * c; }}\n",
            3 * hidden
        );
        let pointer = |of: &str, name: &str| (of.to_string(), name.to_string());
        let pointers = ["gates", "biases", "states", "peepholes"].map(|name| pointer("const float*", name)).into_iter();
        let pointers = pointers.chain([pointer("float*", "y"), pointer("float*", "y_last")]).collect();
        let counts = [steps * batch * rows, rows, batch * hidden, 3 * hidden].map(|count| directions * count);
        let (mut extras, values): (Vec<_>, Vec<_>) =
            counts.iter().map(|&count| random.elements(Element::F32, count)).unzip();
        let (r_bytes, r) = random.elements(Element::F32, directions * hidden * rows);
        let outputs = [directions * steps * batch * hidden * 4, directions * batch * hidden * 4];
        extras.extend(outputs.map(|bytes| vec![0xff; bytes]));
        let of = Recurrence { cell, directions, steps, batch, hidden, functions: Functions { pointers, text } };
        let mut kernel = of.kernel(Device::H100).unwrap();
        // What the functions write are this case's outputs.
        for (output, argument) in kernel.arguments.iter_mut().rev().take(2).rev().enumerate() {
            *argument = cutover_kernels::cuda::Argument::Output(output);
        }
        cases.push(Case {
            name: format!("{cell:?}, {hidden} hidden, {steps} steps"),
            kernel,
            inputs: vec![r_bytes],
            extras,
            outputs: outputs.to_vec(),
            check: Box::new(move |outputs| {
                let mut y = vec![0.0; directions * steps * batch * hidden];
                let mut last = Vec::new();
                for (d, n) in (0..directions).flat_map(|d| (0..batch).map(move |n| (d, n))) {
                    let mut h = values[2][(d * batch + n) * hidden..][..hidden].to_vec();
                    let mut c: Vec<f64> = h.iter().map(|x| -x).collect();
                    let length = if n == 1 { steps / 2 } else { steps };
                    for s in 0..length {
                        let t = if d == 1 { length - 1 - s } else { s };
                        let input = |row: usize| values[0][((d * steps + t) * batch + n) * rows + row];
                        let product = |row: usize, of: &[f64]| {
                            values[1][d * rows + row]
                                + (0..hidden).map(|k| r[(d * hidden + k) * rows + row] * of[k]).sum::<f64>()
                        };
                        let sum = |gate: usize, j: usize, of: &[f64]| {
                            input(gate * hidden + j) + product(gate * hidden + j, of)
                        };
                        let peephole = |gate: usize, j: usize| values[3][d * 3 * hidden + gate * hidden + j];
                        let reset: Vec<f64> = match cell {
                            Cell::Gru { .. } => (0..hidden).map(|j| sigmoid(sum(1, j, &h)) * h[j]).collect(),
                            _ => Vec::new(),
                        };
                        let mut next = Vec::new();
                        for j in 0..hidden {
                            next.push(match cell {
                                Cell::Rnn => sigmoid(sum(0, j, &h)),
                                Cell::Gru { is_linear } => {
                                    let z = sigmoid(sum(0, j, &h));
                                    let hidden_gate = match is_linear {
                                        true => {
                                            input(2 * hidden + j) + sigmoid(sum(1, j, &h)) * product(2 * hidden + j, &h)
                                        }
                                        false => sum(2, j, &reset),
                                    };
                                    (1.0 - z) * hidden_gate.tanh() + z * h[j]
                                }
                                Cell::Lstm { is_coupled } => {
                                    let i = sigmoid(sum(0, j, &h) + peephole(0, j) * c[j]);
                                    let f = if is_coupled {
                                        1.0 - i
                                    } else {
                                        sigmoid(sum(2, j, &h) + peephole(2, j) * c[j])
                                    };
                                    c[j] = f * c[j] + i * sum(3, j, &h).tanh();
                                    sigmoid(sum(1, j, &h) + peephole(1, j) * c[j]) * c[j].tanh()
                                }
                            });
                        }
                        y[((d * steps + t) * batch + n) * hidden..][..hidden].copy_from_slice(&next);
                        h = next;
                    }
                    last.extend(h.iter().zip(&c).map(|(h, c)| h + 2.0 * c));
                }
                near(&numbers(Element::F32, &outputs[0]), &y, |_| 2e-5)?;
                near(&numbers(Element::F32, &outputs[1]), &last, |_| 5e-5)
            }),
        });
    }
    run("recurrent", &cases);
}
