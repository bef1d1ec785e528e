// What the taps of a convolution meet, as the second factor of a product with its filters: [sample][pixel / 32][input channel, tap][32], terms
// filled up to fours with zeros; all taps of 4 pixels of a channel an invocation. Before this stands `x_at(i)`.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quad = group.x * {GROUP}u + lane;
    if (quad >= {QUADS}u) { return; }
    let plane = (group.z * {INNER}u + group.y) * {IN_H}u * {IN_W}u;
    var to = (group.z * {QUADS}u + quad / 8u * 8u) * {DEPTH}u + group.y * {TAPS}u * 8u + quad % 8u;
    // What lies above or left of the input wraps around and is beyond its other edge.
@for p 4
    let top{p} = (quad * 4u + {p}u) / {OUT_W}u * {STRIDE_Y}u - {PAD_Y}u;
    let left{p} = (quad * 4u + {p}u) % {OUT_W}u * {STRIDE_X}u - {PAD_X}u;
@end
    for (var q = 0u; q < {KERNEL_Y}u; q = q + 1u) {
@for p 4
        let y{p} = top{p} + q * {DILATION_Y}u;
        let row{p} = plane + y{p} * {IN_W}u;
@end
@for s KERNEL_X
        {
@for p 4
            let x{p} = left{p} + {s}u * {DILATION_X}u;
            let is_inside{p} = y{p} < {IN_H}u && x{p} < {IN_W}u;
            let v{p} = select(0.0, x_at(select(0u, row{p} + x{p}, is_inside{p})), is_inside{p});
@end
            patches[to + {s}u * 8u] = vec4<f32>(v0, v1, v2, v3);
        }
@end
        to = to + {KERNEL_X}u * 8u;
    }
    if (group.y == {INNER}u - 1u) {
@for r REST
        patches[to + {r}u * 8u] = vec4<f32>(0.0);
@end
    }
}
