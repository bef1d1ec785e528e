// The coefficients of a tile of the input, of 4 channels an invocation, as [coefficient][tile / 8][channel / 4][8][4]. Before this stand
// `forward` and `x_at(i)`.
fn x_of(plane: u32, y: u32, x: u32) -> f32 {
    // What lies above or left of the input wraps around and is beyond its other edge.
    let is_inside = y < {IN_H}u && x < {IN_W}u;
    return select(0.0, x_at(select(0u, plane + y * {IN_W}u + x, is_inside)), is_inside);
}

fn x_at4(plane: u32, y: u32, x: u32) -> vec4<f32> {
    return vec4<f32>(
        x_of(plane, y, x),
        x_of(plane + {IN_H}u * {IN_W}u, y, x),
        x_of(plane + 2u * {IN_H}u * {IN_W}u, y, x),
        x_of(plane + 3u * {IN_H}u * {IN_W}u, y, x),
    );
}

@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = group.x * {GROUP}u + lane;
    let tile = i / (8u * {QUADS}u) * 8u + i % 8u;
    if (tile >= {TILES}u) { return; }
    let plane = (tile / {TILES_OF_SAMPLE}u * {CHANNELS}u + i / 8u % {QUADS}u * 4u) * {IN_H}u * {IN_W}u;
    let top = tile % {TILES_OF_SAMPLE}u / {TILES_OF_ROW}u * {SIDE}u - {PAD_Y}u;
    let left = tile % {TILES_OF_ROW}u * {SIDE}u - {PAD_X}u;
@for y POINTS
    var d{y}: array<vec4<f32>, {POINTS}>;
@for x POINTS
    d{y}[{x}] = x_at4(plane, top + {y}u, left + {x}u);
@end
    let r{y} = forward(d{y});
@end
@for x POINTS
    var c{x}: array<vec4<f32>, {POINTS}>;
@for y POINTS
    c{x}[{y}] = r{y}[{x}];
@end
    let s{x} = forward(c{x});
@for y POINTS
    coefficients[({y}u * {POINTS}u + {x}u) * {ROWS}u * {QUADS}u + i] = s{x}[{y}];
@end
@end
}
