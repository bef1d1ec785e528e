// As conv.wgsl, for devices that gather four elements an invocation as one, and hand elements round within a subgroup of 8 for next to
// nothing: 4 pixels of {ROWS} output channels an invocation, and each filter read once for a subgroup. Filters lie as [output channel][tap]
// [input channels, by fours]. Before this stand `x_at(i)`, `w_at(i)` with 4 input channels, and `finish(row, pixel, x)`, which puts 4 pixels
// of channel `row` of all samples where they belong.
@compute @workgroup_size({GROUP})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) slot: u32,
) {
    let which = group.z % {GROUPS}u;
    let sample = group.z / {GROUPS}u;
    let first = group.y * {ROWS}u;
    let planes = (sample * {GROUPS}u + which) * {INNER}u * {IN_H}u * {IN_W}u;
    let pixel = (group.x * {GROUP}u + lane) * 4u;
@for p 4
    let top{p} = (pixel + {p}u) / {OUT_W}u * {STRIDE_Y}u;
    let left{p} = (pixel + {p}u) % {OUT_W}u * {STRIDE_X}u;
@end
@for o OCTETS
    var w{o} = (which * {PER_GROUP}u + min(first + {o}u * 8u + slot, {PER_GROUP}u - 1u)) * {KERNEL_Y}u * {KERNEL_X}u * {QUADS}u;
@for e 8
    var t{o}_{e} = vec4<f32>(0.0);
@end
@end
    for (var q = 0u; q < {KERNEL_Y}u; q = q + 1u) {
        for (var s = 0u; s < {KERNEL_X}u; s = s + 1u) {
@for p 4
            // What lies above or left of the input wraps around and is beyond its other edge.
            let y{p} = top{p} + q * {DILATION_Y}u - {PAD_Y}u;
            let column{p} = left{p} + s * {DILATION_X}u - {PAD_X}u;
            let is_inside{p} = y{p} < {IN_H}u && column{p} < {IN_W}u;
            var i{p} = select(0u, planes + y{p} * {IN_W}u + column{p}, is_inside{p});
@end
            let inside = vec4<bool>(is_inside0, is_inside1, is_inside2, is_inside3);
            for (var c = 0u; c < {QUADS}u; c = c + 1u) {
@for j 4
                let x{j} = select(vec4<f32>(0.0), vec4<f32>(x_at(i0), x_at(i1), x_at(i2), x_at(i3)), {IS_CHANNEL});
@for p 4
                i{p} = i{p} + {IN_H}u * {IN_W}u;
@end
@end
@for o OCTETS
                let f{o} = w_at(w{o});
                w{o} = w{o} + 1u;
@for e 8
                {
                    let f = subgroupBroadcast(f{o}, {e}u);
                    t{o}_{e} = t{o}_{e} + ((f.x * x0 + f.y * x1) + (f.z * x2 + f.w * x3));
                }
@end
@end
            }
        }
    }
    if (pixel < {PIXELS}u) {
        let row = sample * {CHANNELS}u + which * {PER_GROUP}u + first;
@for o OCTETS
@for e 8
        if (first + {o}u * 8u + {e}u < {PER_GROUP}u) { finish(row + {o}u * 8u + {e}u, pixel, t{o}_{e}); }
@end
@end
    }
}
