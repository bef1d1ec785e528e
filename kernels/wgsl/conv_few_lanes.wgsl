// As conv_lanes.wgsl, where a group has few output channels, as depthwise: 4 pixels of one of them an invocation. Filters lie as [output
// channel][input channel, tap, by fours]. Before this stand `x_at(i)`, `w_at(i)` with 4 terms of a filter, and `finish(row, pixel, x)`.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let pixel = (group.x * {GROUP}u + lane) * 4u;
    if (pixel >= {PIXELS}u) { return; }
    let which = group.y / {PER_GROUP}u;
    let planes = (group.z * {GROUPS}u + which) * {INNER}u * {IN_H}u * {IN_W}u;
@for p 4
    let top{p} = (pixel + {p}u) / {OUT_W}u * {STRIDE_Y}u;
    let left{p} = (pixel + {p}u) % {OUT_W}u * {STRIDE_X}u;
@end
    var t = vec4<f32>(0.0);
    for (var quad = 0u; quad < {QUADS}u; quad = quad + 1u) {
        let w = w_at(group.y * {QUADS}u + quad);
@for j 4
        {
            let term = quad * 4u + {j}u;
            let tap = term % {TAPS}u;
            let plane = planes + term / {TAPS}u * {IN_H}u * {IN_W}u;
            let down = tap / {KERNEL_X}u * {DILATION_Y}u - {PAD_Y}u;
            let right = tap % {KERNEL_X}u * {DILATION_X}u - {PAD_X}u;
@for p 4
            // What lies above or left of the input wraps around and is beyond its other edge.
            let y{p} = top{p} + down;
            let x{p} = left{p} + right;
            let is_inside{p} = term < {TERMS}u && y{p} < {IN_H}u && x{p} < {IN_W}u;
            let v{p} = select(0.0, x_at(select(0u, plane + y{p} * {IN_W}u + x{p}, is_inside{p})), is_inside{p});
@end
            t = t + w[{j}] * vec4<f32>(v0, v1, v2, v3);
        }
@end
    }
    finish(group.z * {CHANNELS}u + group.y, pixel, t);
}
