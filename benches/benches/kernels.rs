//! The kernels that networks spend their time in, on every instruction set of this machine, on one thread.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cutover_kernels::cpu::{
    Activation, IsaLevel, Output, Residual,
    conv::{self, Axis, Conv, ConvShape},
    gemm::{self, Bias, Gemm, Matrix},
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

fn convolutions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("convolution");
    for [channels, extent, kernel] in [[64, 56, 3], [128, 28, 3], [256, 14, 1]] {
        let axis = Axis {
            input: extent,
            output: extent,
            kernel,
            stride: 1,
            dilation: 1,
            pad_before: kernel / 2,
            pad_after: kernel / 2,
        };
        let shape = ConvShape {
            channels_in: channels,
            channels_out: channels,
            groups: 1,
            height: axis,
            width: axis,
            transposed: false,
        };
        group.throughput(Throughput::Elements((channels * channels * extent * extent * kernel * kernel) as u64));
        let mut filter = vec![0f32; conv::packed_filter_len(&shape)];
        conv::pack_filter(&shape, &vec![0.5; channels * channels * kernel * kernel], &mut filter);
        let (input, mut output) = (vec![0.25f32; shape.input_len()], vec![0f32; shape.output_len()]);
        let problem = Conv {
            shape,
            input: &input,
            filter: &filter,
            bias: None,
            residual: Residual::None,
            activation: Activation::Relu,
        };
        for level in IsaLevel::available() {
            group.bench_function(
                BenchmarkId::new(level.name(), format!("{channels}x{extent}x{extent} {kernel}x{kernel}")),
                |bencher| {
                    let units = conv::conv_units(level, &shape);
                    bencher.iter(|| conv::conv(level, &problem, 0..units, Output::new(&mut output)));
                },
            );
        }
    }
}

criterion_group!(kernels, products, convolutions);
criterion_main!(kernels);
