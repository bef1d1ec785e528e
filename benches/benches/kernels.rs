//! The kernels that networks spend their time in, on every instruction set of this machine, on one thread.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output, Residual,
    conv::{self, Axis, Conv, ConvShape, Operands},
    conv_first::{self, First, FirstShape},
    depthwise::{self, Depthwise, DepthwiseShape},
    gemm::{self, Bias, Gemm, Matrix},
    quantized_product::{self, Epilogue, Form, Product, ProductShape, Quantized},
    winograd::{self, WinogradTile},
};

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    for [m, n, k] in [[512, 512, 512], [128, 384, 384], [1, 1024, 1024]] {
        group.throughput(Throughput::Elements((m * n * k) as u64));
        let (a, b) = (vec![0.5f32; m * k], vec![0.25f32; k * n]);
        for level in IsaLevel::available() {
            let mut packed = vec![0f32; gemm::packed_b_len(level, k, n)];
            let panels = gemm::panel_count(level, n);
            gemm::pack_b(level, Matrix::row_major(&b, n), k, n, 0..panels, Output::new(&mut packed));
            let (mut c, mut workspace) = (vec![0f32; m * n], vec![0f32; gemm::gemm_workspace_len(k)]);
            let problem = Gemm {
                m,
                n,
                k,
                a: Matrix::row_major(&a, k),
                b: &packed,
                alpha: 1.0,
                bias: Bias::None,
                residual: Residual::None,
                activation: Activation::Identity,
                output_stride: n,
            };
            group.bench_function(BenchmarkId::new(level.name(), format!("{m}x{n}x{k}")), |bencher| {
                bencher.iter(|| gemm::gemm(level, &problem, 0..m, 0..panels, Output::new(&mut c), &mut workspace));
            });
        }
    }
}

/// Bytes, weights and values as trained networks have them, bell-shaped: by bounds on what they add up to, such products take one way or another.
fn integer_products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("integers");
    let mut seed = 1u64;
    let mut bell = |spread: f32| {
        let mut sum = -6.0;
        for _ in 0..12 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            sum += (seed >> 40) as f32 / (1u64 << 24) as f32;
        }
        (sum * spread).round().clamp(-127.0, 127.0) as i32
    };
    for (name, [m, n, k], zero_point) in [
        ("uneven", [128, 384, 384], 70),
        ("uneven", [128, 1536, 384], 70),
        ("uneven", [128, 384, 1536], 20),
        ("even", [784, 192, 32], 128),
        ("even", [196, 576, 96], 128),
        ("uneven", [196, 96, 576], 10),
        ("uneven", [1, 1000, 1280], 10),
    ] {
        group.throughput(Throughput::Elements((m * n * k) as u64));
        let shape = ProductShape::matrices(m, k, n);
        let weights: Vec<i16> = (0..n * k).map(|_| bell(36.0) as i16).collect();
        let values: Vec<u8> = (0..m * k).map(|_| (zero_point + bell(16.0)).clamp(0, 255) as u8).collect();
        let (factors, offsets) = (vec![1e-3; n], vec![0.5; n]);
        let mut output = vec![0u8; m * n];
        for level in IsaLevel::available() {
            let own = Form::of(level, &shape, &weights, false, (name == "even").then_some(zero_point));
            for form in [Some(Form::Halves), (own != Form::Halves).then_some(own)].into_iter().flatten() {
                let mut packed = vec![0f32; quantized_product::packed_len(level, &shape, form)];
                quantized_product::pack(level, &shape, &weights, form, &mut packed);
                let mut workspace = vec![0f32; quantized_product::workspace_len(level, &shape, form)];
                let problem = Product {
                    shape,
                    input: Quantized { bytes: &values, signed: false, zero_point },
                    weights: &packed,
                    form,
                    epilogue: Epilogue::Bytes {
                        factors: &factors,
                        offsets: &offsets,
                        low: -128.0,
                        high: 127.0,
                        zero_point: 128,
                    },
                };
                let panels = quantized_product::panels(level, &shape);
                let id = BenchmarkId::new(format!("{} {form:?}", level.name()), format!("{name} {m}x{n}x{k}"));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        let to = Output::new(&mut output);
                        quantized_product::product(level, &problem, 0..m, 0..panels, to, &mut workspace);
                    });
                });
            }
        }
    }
}

/// An axis of `input` positions whose outputs are a stride apart, padded so that none is lost.
fn axis(input: usize, kernel: usize, stride: usize) -> Axis {
    let output = input.div_ceil(stride);
    Axis { input, output, kernel, stride, dilation: 1, pad_before: kernel / 2, pad_after: kernel / 2 }
}

/// Throughput counts the multiply-adds of the direct sum, whatever the algorithm needs.
fn convolutions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("convolution");
    for [inputs, outputs, extent, kernel] in [
        [64, 64, 56, 3],
        [128, 128, 28, 3],
        [256, 256, 14, 3],
        [512, 512, 7, 3],
        [16, 96, 112, 1],
        [24, 144, 56, 1],
        [64, 384, 14, 1],
        [576, 96, 14, 1],
    ] {
        let (height, width) = (axis(extent, kernel, 1), axis(extent, kernel, 1));
        let shape =
            ConvShape { channels_in: inputs, channels_out: outputs, groups: 1, height, width, transposed: false };
        group.throughput(Throughput::Elements((inputs * outputs * extent * extent * kernel * kernel) as u64));
        let weights = vec![0.5; inputs * outputs * kernel * kernel];
        let (input, mut output) = (vec![0.25f32; shape.input_len()], vec![0f32; shape.output_len()]);
        let of_pairs = |level: IsaLevel| level.has_bf16().then_some((level, Operands::Bf16));
        for (level, operands) in
            IsaLevel::available().flat_map(|level| [Some((level, Operands::F32)), of_pairs(level)]).flatten()
        {
            let name = format!("{inputs}-{outputs} {extent}x{extent} {kernel}x{kernel}");
            let rung =
                if operands == Operands::F32 { level.name().to_string() } else { format!("{} pairs", level.name()) };
            let mut filter = vec![0f32; operands.words(conv::packed_filter_len(&shape))];
            match operands {
                Operands::F32 => conv::pack_filter(&shape, &weights, &mut filter),
                Operands::Bf16 => conv::pack_filter_bf16(level, &shape, &weights, &mut filter),
            }
            // Of halves the first part of it, as words of the same bits: numbers all the same.
            let problem = Conv {
                shape,
                operands,
                input: &input,
                filter: &filter,
                bias: None,
                residual: Residual::None,
                activation: Activation::Relu,
            };
            group.bench_function(BenchmarkId::new(format!("{rung} direct"), &name), |bencher| {
                let units = conv::conv_units(level, &shape, operands);
                bencher.iter(|| conv::conv(level, &problem, 0..units, Output::new(&mut output)));
            });
            let tiles = [WinogradTile::Two, WinogradTile::Four];
            for tile in tiles.into_iter().filter(|tile| tile.supports(&shape, operands)) {
                let mut filter = vec![0f32; winograd::packed_winograd_len(tile, &shape, operands)];
                winograd::pack_winograd(level, tile, &shape, operands, &weights, &mut filter);
                let mut workspace = vec![0f32; winograd::winograd_workspace_len(tile, &shape, operands)];
                let problem = Conv { filter: &filter, ..problem };
                let units = winograd::winograd_units(tile, &shape, operands);
                let id = BenchmarkId::new(format!("{rung} winograd {tile:?}"), &name);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        let output = Output::new(&mut output);
                        winograd::winograd(level, tile, &problem, 0..units, output, &mut workspace);
                    });
                });
            }
        }
    }
}

fn depthwise_layers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("depthwise");
    for [channels, extent, kernel, stride] in [[96, 112, 3, 2], [144, 56, 3, 1], [96, 56, 5, 1]] {
        let (height, width) = (axis(extent, kernel, stride), axis(extent, kernel, stride));
        let shape = DepthwiseShape { channels, height, width };
        group.throughput(Throughput::Elements(shape.operations() / 2));
        let mut filter = vec![0f32; depthwise::packed_depthwise_len(&shape)];
        depthwise::pack_depthwise(&shape, &vec![0.5; channels * kernel * kernel], &mut filter);
        let (input, mut output) = (vec![0.25f32; shape.input_len()], vec![0f32; shape.output_len()]);
        let (bias, residual, activation) = (None, Residual::None, Activation::Relu);
        let problem = Depthwise { shape, input: &input, filter: &filter, bias, residual, activation };
        for level in IsaLevel::available() {
            let name = format!("{channels} {extent}x{extent} {kernel}x{kernel} stride {stride}");
            group.bench_function(BenchmarkId::new(level.name(), name), |bencher| {
                let units = depthwise::depthwise_units(&shape);
                bencher.iter(|| depthwise::depthwise(level, &problem, 0..units, Output::new(&mut output)));
            });
        }
    }
}

fn first_layers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("first layer");
    for [outputs, kernel] in [[64, 7], [32, 3]] {
        let (height, width) = (axis(224, kernel, 2), axis(224, kernel, 2));
        let shape = FirstShape { channels_in: 3, channels_out: outputs, height, width };
        group.throughput(Throughput::Elements((3 * outputs * 112 * 112 * kernel * kernel) as u64));
        let mut filter = vec![0f32; conv_first::packed_first_len(&shape)];
        conv_first::pack_first(&shape, &vec![0.5; 3 * outputs * kernel * kernel], &mut filter);
        let (input, mut output) = (vec![0.25f32; shape.input_len()], vec![0f32; shape.output_len()]);
        let problem = First { shape, input: &input, filter: &filter, bias: None, activation: Activation::Relu };
        for level in IsaLevel::available() {
            group.bench_function(BenchmarkId::new(level.name(), format!("3-{outputs} {kernel}x{kernel}")), |bencher| {
                let units = conv_first::conv_first_units(&shape);
                bencher.iter(|| conv_first::conv_first(level, &problem, 0..units, Output::new(&mut output)));
            });
        }
    }
}

criterion_group!(kernels, products, integer_products, convolutions, depthwise_layers, first_layers);
criterion_main!(kernels);
