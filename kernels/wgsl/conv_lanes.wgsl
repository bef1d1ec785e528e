// As conv.wgsl, for devices that load one element an invocation at a time and hand elements round within a subgroup of 8 for next to
// nothing: {WIDE} pixels of {ROWS} output channels an invocation, and each filter read once for a subgroup.
@compute @workgroup_size({GROUP})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) slot: u32,
) {
    let which = group.z % {GROUPS}u;
    let sample = group.z / {GROUPS}u;
    var w = (which * {BLOCKS}u + group.y) * {INNER}u * {KERNEL_Y}u * {KERNEL_X}u * {ROWS}u + slot;
    var plane = (sample * {GROUPS}u + which) * {INNER}u * {IN_H}u * {IN_W}u;
@for p WIDE
    let pixel{p} = (group.x * {WIDE}u + {p}u) * {GROUP}u + lane;
    let top{p} = pixel{p} / {OUT_W}u * {STRIDE_Y}u;
    let left{p} = pixel{p} % {OUT_W}u * {STRIDE_X}u;
@for o OCTETS
@for e 8
    var t{o}_{e}_{p} = 0.0;
@end
@end
@end
    for (var c = 0u; c < {INNER}u; c = c + 1u) {
        for (var q = 0u; q < {KERNEL_Y}u; q = q + 1u) {
            for (var s = 0u; s < {KERNEL_X}u; s = s + 1u) {
@for p WIDE
                // What lies above or left of the input wraps around and is beyond its other edge.
                let y{p} = top{p} + q * {DILATION_Y}u - {PAD_Y}u;
                let column{p} = left{p} + s * {DILATION_X}u - {PAD_X}u;
                let is_inside{p} = y{p} < {IN_H}u && column{p} < {IN_W}u;
                let x{p} = select(0.0, x_at(select(0u, plane + y{p} * {IN_W}u + column{p}, is_inside{p})), is_inside{p});
@end
@for o OCTETS
                let w{o} = w_at(w + {o}u * 8u);
@for e 8
                {
                    let f = subgroupBroadcast(w{o}, {e}u);
@for p WIDE
                    t{o}_{e}_{p} = fma(f, x{p}, t{o}_{e}_{p});
@end
                }
@end
@end
                w = w + {ROWS}u;
            }
        }
        plane = plane + {IN_H}u * {IN_W}u;
    }
    let first = group.y * {ROWS}u;
    let channel = which * {PER_GROUP}u + first;
@for p WIDE
    if (pixel{p} < {PIXELS}u) {
        let i = (sample * {CHANNELS}u + channel) * {PIXELS}u + pixel{p};
@for o OCTETS
@for e 8
        if (first + {o}u * 8u + {e}u < {PER_GROUP}u) {
            finish(i + ({o}u * 8u + {e}u) * {PIXELS}u, channel + {o}u * 8u + {e}u, t{o}_{e}_{p});
        }
@end
@end
    }
@end
}
