// A tile of 4 output channels an invocation, from its coefficients as [coefficient][channel / 4][tile][4]. Before this stand `backward`,
// `m_at(i)` with 4 channels of a coefficient, and `finish(row, y, x, values)`, which puts {SIDE} pixels of channel `row` of all samples where they belong.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = group.x * {GROUP}u + lane;
    if (i >= {TILES}u * {QUADS}u) { return; }
    let tile = i % {TILES}u;
    let row = tile / {TILES_OF_SAMPLE}u * {CHANNELS}u + i / {TILES}u * 4u;
    let top = tile % {TILES_OF_SAMPLE}u / {TILES_OF_ROW}u * {SIDE}u;
    let left = tile % {TILES_OF_ROW}u * {SIDE}u;
@for y POINTS
    var d{y}: array<vec4<f32>, {POINTS}>;
@for x POINTS
    d{y}[{x}] = m_at(({y}u * {POINTS}u + {x}u) * {TILES}u * {QUADS}u + i);
@end
    let r{y} = backward(d{y});
@end
@for x SIDE
    var c{x}: array<vec4<f32>, {POINTS}>;
@for y POINTS
    c{x}[{y}] = r{y}[{x}];
@end
    let s{x} = backward(c{x});
@end
@for y SIDE
    if (top + {y}u < {OUT_H}u) {
@for j 4
        {
            var values: array<f32, {SIDE}>;
@for x SIDE
            values[{x}] = s{x}[{y}][{j}];
@end
            finish(row + {j}u, top + {y}u, left, values);
        }
@end
    }
@end
}
