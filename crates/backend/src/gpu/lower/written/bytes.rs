//! Products and convolutions of bytes.

use super::{
    super::{
        super::{
            code::Text,
            device::Solution,
            plan::{BufferId, Builder, Unable, Written},
        },
        bytes::Lines,
    },
    conv, worth_trying,
};
use crate::Work;
use cutover_kernels::cuda::{self, Conv, Element, Functions, Order, Precision};

/// `[m, n, words]` of a product, and its factors, of signed bytes.
fn product(sizes: [usize; 3], lines: &[Lines; 2], functions: Functions) -> cuda::Product {
    let [m, n, words] = sizes;
    let array = |lines: &Lines| {
        let batch = lines.batch.1.iter().map(|words| 4 * words).collect();
        cuda::Operand::Array { order: Order::ByK, leading: 4 * words, batch }
    };
    cuda::Product {
        m,
        n,
        k: 4 * words,
        batch: lines[0].batch.0.clone(),
        a: array(&lines[0]),
        b: array(&lines[1]),
        elements: [Element::I8; 2],
        // A word that `finish` gives, whatever it is.
        result: Element::I32,
        precision: Precision::Full,
        channel_is_row: false,
        functions,
    }
}

/// Whether there is a kernel for a product of these sizes.
pub(in super::super) fn has_product_of_bytes(b: &Builder<'_>, sizes: [usize; 3], lines: &[Lines; 2]) -> bool {
    let none = Functions::default();
    b.gpu.written.is_some_and(|device| product(sizes, lines, none).candidates(device).is_ok())
}

/// The product; `functions` has `fn finish(i: u32, channel: u32, sum: i32) -> i32`, the bits of the result's element `i`, a word.
///
/// # Errors
/// A kernel that does not compile.
pub(in super::super) fn product_of_bytes(
    b: &mut Builder<'_>,
    text: Text,
    functions: &str,
    sizes: [usize; 3],
    lines: &[Lines; 2],
    (output, work): (BufferId, Work),
) -> Result<(), Unable> {
    let Some(device) = b.gpu.written else { return Err("no kernels are written for this device".into()) };
    let solutions = |functions: Functions, most: usize| {
        let product = product(sizes, lines, functions);
        let tiles = worth_trying(product.candidates(device)?, most);
        tiles.map(|tile| Ok(Solution::Written(product.kernel_of(device, tile)?))).collect()
    };
    let inputs = &[lines[0].buffer, lines[1].buffer];
    let (solutions, name) = (&solutions, &|_: &_| "integer product by hand");
    match b.push_written(Written { text, functions, inputs, more: &[], output, solutions, name, work }) {
        true => Ok(()),
        false => Err("its kernel does not compile".into()),
    }
}

/// Whether there is a kernel for `conv`.
pub(in super::super) fn has_convolution_of_bytes(conv: &Conv, device: cuda::Device) -> bool {
    conv::solutions(conv, device, 1).is_ok()
}

/// The convolution of pictures, by filters, with 16 bytes of the zero point if it has one; `functions` has
/// `fn finish(i: u32, channel: u32, sum: i32) -> i32`, as of products.
///
/// # Errors
/// A kernel that does not compile.
pub(in super::super) fn convolution_of_bytes(
    b: &mut Builder<'_>,
    text: Text,
    functions: &str,
    conv: Conv,
    (inputs, output, work): (&[BufferId], BufferId, Work),
) -> Result<(), Unable> {
    let Some(device) = b.gpu.written else { return Err("no kernels are written for this device".into()) };
    let solutions =
        |functions: Functions, most: usize| conv::solutions(&Conv { functions, ..conv.clone() }, device, most);
    let name = match conv.groups == conv.channels && conv.groups > 1 {
        true => "depthwise integer convolution by hand",
        false => "integer convolution by hand",
    };
    let (solutions, name) = (&solutions, &|_: &_| name);
    match b.push_written(Written { text, functions, inputs, more: &[], output, solutions, name, work }) {
        true => Ok(()),
        false => Err("its kernel does not compile".into()),
    }
}
