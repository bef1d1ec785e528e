//! Shaders for GPUs, as text: what is the same for every shape.
//!
//! A backend puts bindings, sizes and the functions of a fused chain before a kernel and hands the whole to its driver. Nothing here knows
//! a device.

/// Functions that WGSL lacks or leaves imprecise, for f32: `exp_of`, `log_of`, `tanh_of`, `erf_of`, tests for NaN by bits.
pub const MATH: &str = include_str!("../wgsl/math.wgsl");

/// A matrix product with its operands in the layout that [`expand`]'s parameters say.
pub const PRODUCT: &str = include_str!("../wgsl/product.wgsl");

/// A convolution as a matrix product of the filters with windows that are gathered while they are read.
pub const CONV: &str = include_str!("../wgsl/conv.wgsl");

/// [`PRODUCT`] and [`CONV`] where a subgroup is 8 invocations and a load costs more than a broadcast.
pub const PRODUCT_LANES: &str = include_str!("../wgsl/product_lanes.wgsl");
pub const CONV_LANES: &str = include_str!("../wgsl/conv_lanes.wgsl");

/// [`PRODUCT`] by tiles in memory that a group shares, for devices that have such memory near.
pub const PRODUCT_TILES: &str = include_str!("../wgsl/product_tiles.wgsl");

/// A product of bytes, four terms of a sum a word, for any GPU, and where a subgroup is 8 invocations.
pub const PRODUCT_BYTES: &str = include_str!("../wgsl/product_bytes.wgsl");
pub const PRODUCT_BYTES_LANES: &str = include_str!("../wgsl/product_bytes_lanes.wgsl");

/// A product with weights of a few bits in blocks.
pub const PRODUCT_BLOCKS: &str = include_str!("../wgsl/product_blocks.wgsl");

/// The same for groups of few output channels.
pub const CONV_FEW_LANES: &str = include_str!("../wgsl/conv_few_lanes.wgsl");

/// The second factor of a convolution that is a product.
pub const UNFOLD: &str = include_str!("../wgsl/unfold.wgsl");

/// An attention that never holds all scores, for any GPU, and where a subgroup is 8 invocations.
pub const ATTENTION: &str = include_str!("../wgsl/attention.wgsl");
pub const ATTENTION_LANES: &str = include_str!("../wgsl/attention_lanes.wgsl");

/// The transforms of [`WINOGRAD_INPUT`] and [`WINOGRAD_OUTPUT`] for tiles of 2 × 2 outputs, and of 4 × 4.
pub const WINOGRAD_TWO: &str = include_str!("../wgsl/winograd_two.wgsl");
pub const WINOGRAD_FOUR: &str = include_str!("../wgsl/winograd_four.wgsl");

/// What stands before the products of a convolution by Winograd's minimal filtering, and behind them; see `cpu::winograd`.
pub const WINOGRAD_INPUT: &str = include_str!("../wgsl/winograd_input.wgsl");
pub const WINOGRAD_OUTPUT: &str = include_str!("../wgsl/winograd_output.wgsl");

/// `template` with every `{name}` replaced by its value, and every part from `@for x NAME` to `@end` repeated for `{x}` from 0 to before
/// the value of `NAME`.
///
/// # Panics
/// On a part without an end, or whose count is no number: templates are this crate's own.
pub fn expand(template: &str, parameters: &[(&str, String)]) -> String {
    let mut text = template.to_string();
    for (name, value) in parameters {
        text = text.replace(&format!("{{{name}}}"), value);
    }
    repeat(&text.lines().collect::<Vec<_>>(), parameters)
}

fn repeat(lines: &[&str], parameters: &[(&str, String)]) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at].trim_start();
        let Some(head) = line.strip_prefix("@for ") else {
            text += lines[at];
            text.push('\n');
            at += 1;
            continue;
        };
        let mut words = head.split_whitespace();
        let (name, count) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let value = parameters.iter().find(|(name, _)| *name == count).map_or(count, |(_, value)| value.as_str());
        let count: usize = value.parse().unwrap_or_else(|_| panic!("'{line}' has no count"));
        let mut depth = 1;
        let length = lines[at + 1..].iter().position(|line| {
            let line = line.trim_start();
            depth = if line.starts_with("@for ") {
                depth + 1
            } else if line == "@end" {
                depth - 1
            } else {
                depth
            };
            depth == 0
        });
        let length = length.unwrap_or_else(|| panic!("'{line}' has no end"));
        let part = repeat(&lines[at + 1..at + 1 + length], parameters);
        (0..count).for_each(|n| text += &part.replace(&format!("{{{name}}}"), &n.to_string()));
        at += length + 2;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::expand;

    #[test]
    fn parts_repeat_and_names_are_replaced() {
        let template = "a{N}\n@for r N\nlet r{r} = {w};\n@for c 2\nx{r}{c}\n@end\n@end\nend";
        let text = expand(template, &[("N", "2".to_string()), ("w", "7".to_string())]);
        assert_eq!(text, "a2\nlet r0 = 7;\nx00\nx01\nlet r1 = 7;\nx10\nx11\nend\n");
    }
}
