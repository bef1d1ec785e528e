//! Writes the source of every hand-made CUDA kernel, for three GPUs, into a folder, for compilers: `cuda_sources FOLDER`. `cargo xtask cuda`
//! runs it. A file's name begins with the compute capability; its first line says which instructions it has to have, and how often.

use cutover_kernels::cuda::{Device, Element, Functions, Kernel, Operand, Order, Precision, Product, Refused};
use std::path::Path;

/// `mma.sync` and so on, and how many of them a kernel has at least.
type Needs = Vec<(&'static str, usize)>;

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "target/cuda".to_string());
    std::fs::create_dir_all(&folder)?;
    for device in [Device::T4, Device::ORIN, Device::H100] {
        products(Path::new(&folder), device)?;
    }
    Ok(())
}

/// Writes a kernel, unless the device has none; a file that is the same keeps its time.
fn write(
    folder: &Path,
    device: Device,
    name: &str,
    kernel: Result<Kernel, Refused>,
    needs: &Needs,
) -> std::io::Result<()> {
    let Ok(kernel) = kernel else { return Ok(()) };
    let needs: Vec<String> = needs.iter().map(|(what, count)| format!("{what}:{count}")).collect();
    let text = format!("// needs {}\n{}", needs.join(" "), kernel.source);
    let path = folder.join(format!("sm_{}-{name}.cu", device.sm));
    if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    std::fs::write(path, text)
}

fn products(folder: &Path, device: Device) -> std::io::Result<()> {
    let is_new = device.sm >= 80;
    for (elements, result, precision) in [
        ([Element::F32; 2], Element::F32, Precision::Full),
        ([Element::F32; 2], Element::F32, Precision::Tf32),
        ([Element::F16; 2], Element::F16, Precision::Full),
        ([Element::BF16; 2], Element::BF16, Precision::Full),
        ([Element::I8; 2], Element::I32, Precision::Full),
        ([Element::U8, Element::I8], Element::I32, Precision::Full),
    ] {
        for by_k in [[true, true], [true, false], [false, true]] {
            let order = |by_k: bool| if by_k { Order::ByK } else { Order::ByOuter };
            let operand = |by_k: bool| Operand::Array { order: order(by_k), leading: 1024, batch: vec![] };
            let product = Product {
                m: 1024,
                n: 1024,
                k: 1024,
                batch: vec![],
                a: operand(by_k[0]),
                b: operand(by_k[1]),
                elements,
                result,
                precision,
                channel_is_row: false,
                functions: bias_and_gelu(elements[0]),
            };
            let Ok(candidates) = product.candidates(device) else { continue };
            for (tile, _) in candidates.iter().filter(|(tile, _)| tile.splits <= 2) {
                let is_plain = elements[0] == Element::F32 && precision == Precision::Full;
                let mut needs = Needs::new();
                if is_plain {
                    needs.extend([
                        ("fma.rn.f32", tile.part_m * tile.part_n * tile.k),
                        ("ld.global.v4", 2),
                        ("ld.shared.v4", tile.k),
                    ]);
                } else {
                    let depth = 32 / elements[0].bytes();
                    needs.push(("mma.sync", tile.part_m / 16 * (tile.part_n / 8) * (tile.k / depth)));
                    let transposes = precision == Precision::Tf32;
                    needs.push(("ldmatrix", if transposes && !(by_k[0] && by_k[1]) { 2 } else { 4 }));
                    if is_new {
                        needs.push(("cp.async.cg", 2));
                    }
                }
                let kind = if precision == Precision::Tf32 { "tf32" } else { elements[0].name() };
                let orders = by_k.map(|by_k| if by_k { "k" } else { "o" }).concat();
                let splits = if tile.splits > 1 { "-splits" } else { "" };
                let name = format!("product-{kind}-{orders}-{}x{}x{}{splits}", tile.m, tile.n, tile.k);
                write(folder, device, &name, product.kernel_of(device, *tile), &needs)?;
            }
        }
    }
    Ok(())
}

/// What stands behind most products.
fn bias_and_gelu(element: Element) -> Functions {
    let pointers = vec![("const float*".to_string(), "bias".to_string())];
    let text = match element {
        Element::I8 | Element::U8 => {
            "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) { return x + Sum(o.bias[channel]); }\n"
        }
        _ => {
            "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) { x += o.bias[channel]; return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }\n"
        }
    };
    Functions { pointers, text: text.to_string() }
}
