// What the taps of a convolution meet, as the second factor of a product with its filters: [sample][input channel, tap][pixel], 4 pixels an
// invocation, both axes of the matrix filled up to fours with zeros. Before this stands `x_at(i)`.
fn x_of(plane: u32, y: u32, x: u32, is_row: bool) -> f32 {
    // What lies above or left of the input wraps around and is beyond its other edge.
    let is_inside = is_row && y < {IN_H}u && x < {IN_W}u;
    return select(0.0, x_at(select(0u, plane + y * {IN_W}u + x, is_inside)), is_inside);
}

@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let quad = group.x * {GROUP}u + lane;
    if (quad >= {QUADS}u) { return; }
    let row = group.y;
    let channel = row / {TAPS}u;
    let tap = row % {TAPS}u;
    let plane = (group.z * {INNER}u + channel) * {IN_H}u * {IN_W}u;
    let down = tap / {KERNEL_X}u * {DILATION_Y}u - {PAD_Y}u;
    let right = tap % {KERNEL_X}u * {DILATION_X}u - {PAD_X}u;
@for p 4
    let y{p} = (quad * 4u + {p}u) / {OUT_W}u * {STRIDE_Y}u + down;
    let x{p} = (quad * 4u + {p}u) % {OUT_W}u * {STRIDE_X}u + right;
    let v{p} = x_of(plane, y{p}, x{p}, channel < {INNER}u);
@end
    patches[(group.z * {DEPTH}u + row) * {QUADS}u + quad] = vec4<f32>(v0, v1, v2, v3);
}
