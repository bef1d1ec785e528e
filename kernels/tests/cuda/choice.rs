//! Which kernel a problem gets, and which problems get none.

use cutover_kernels::cuda::{
    Attention, BlockedProduct, Conv, Device, Element, Functions, Layout, Operand, Order, Precision, Product, Refused,
    Way, Winograd,
};

fn product(element: Element, [m, n, k]: [usize; 3]) -> Product {
    let array = || Operand::Array { order: Order::ByK, leading: k, batch: vec![] };
    Product {
        m,
        n,
        k,
        batch: vec![],
        a: array(),
        b: array(),
        elements: [element; 2],
        result: element,
        precision: Precision::Full,
        channel_is_row: false,
        functions: Functions::default(),
    }
}

fn conv(channels: usize, size: usize, images: usize) -> Conv {
    Conv {
        images,
        channels,
        out_channels: channels,
        groups: 1,
        input: [size; 2],
        output: [size; 2],
        kernel: [3; 2],
        stride: [1; 2],
        dilation: [1; 2],
        pad_begin: [1; 2],
        layout: Layout::Planes,
        element: Element::F32,
        result: Element::F32,
        has_zero_point: false,
        precision: Precision::Full,
        x_is_function: false,
        functions: Functions::default(),
    }
}

#[test]
fn tiles_follow_shapes() {
    let best = |element, shape| product(element, shape).candidates(Device::H100).unwrap()[0].0;
    let large = best(Element::F16, [4096, 4096, 4096]);
    assert!(large.way == Way::Tensor && large.m * large.n >= 128 * 128 && large.splits == 1, "{large:?}");
    // 49 pixels and a long sum: too few tiles for 132 multiprocessors.
    let last = best(Element::F16, [49, 512, 4608]);
    assert!(last.way == Way::Tensor && last.splits > 1, "{last:?}");
    let vector = best(Element::F16, [1, 4096, 4096]);
    assert_eq!(vector.way, Way::Rows, "{vector:?}");
    let plain = best(Element::F32, [2048, 2048, 2048]);
    assert!(plain.way == Way::Plain && plain.m * plain.n >= 128 * 64, "{plain:?}");
}

#[test]
fn winograd_is_for_many_channels() {
    assert!(Winograd::choose(&conv(256, 14, 32), Device::H100).is_some());
    assert!(Winograd::choose(&conv(8, 56, 1), Device::H100).is_none());
    let strided = Conv { stride: [2; 2], output: [7; 2], ..conv(256, 14, 32) };
    assert!(Winograd::choose(&strided, Device::H100).is_none());
}

#[test]
fn what_has_no_kernel_is_refused() {
    let refused = |what: Result<_, Refused>, part: &str| {
        let reason = what.map(|_: cutover_kernels::cuda::Kernel| ()).unwrap_err().to_string();
        assert!(reason.contains(part), "{reason}");
    };
    refused(product(Element::BF16, [64, 64, 64]).kernel(Device::T4), "compute capability 75");
    let tf32 = Product { precision: Precision::Tf32, ..product(Element::F32, [64, 64, 64]) };
    refused(tf32.kernel(Device::T4), "compute capability 75");
    refused(product(Element::F16, [1 << 20, 64, 1 << 13]).kernel(Device::H100), "32 bits");
    let other = Product { result: Element::I8, ..product(Element::F16, [64, 64, 64]) };
    refused(other.kernel(Device::H100), "to i8");
    refused(Conv { groups: 3, ..conv(8, 9, 1) }.kernel(Device::H100), "3 groups");
    let bits = BlockedProduct {
        m: 9,
        n: 64,
        k: 64,
        bits: 4,
        block: 32,
        has_zero_points: false,
        element: Element::F32,
        scale: Element::F32,
        functions: Functions::default(),
    };
    refused(bits.kernel(Device::H100), "9 rows");
    let attention = Attention {
        batch: 1,
        heads: 4,
        key_heads: 4,
        queries: 64,
        keys: 64,
        depth: 256,
        width: 64,
        strides: [[65536, 16384, 256], [65536, 16384, 256], [16384, 4096, 64]],
        output_strides: [16384, 4096, 64],
        scale: 1.0,
        causal_offset: None,
        has_mask: false,
        element: Element::F16,
        memory: Element::F16,
        functions: Functions::default(),
    };
    refused(attention.kernel(Device::H100), "256");
}
