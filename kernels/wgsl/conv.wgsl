// One pixel of {ROWS} output channels an invocation. Filters lie as [group][block of {ROWS} channels][input channel][tap][{ROWS}], so that
// all invocations of a group read the same row of them. Before this stand `x_at(i)`, `w_at(i)`, and `finish(i, x)`.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let pixel = group.x * {GROUP}u + lane;
    if (pixel >= {PIXELS}u) { return; }
    let sample = group.z / {GROUPS}u;
    let which = group.z % {GROUPS}u;
    let top = pixel / {OUT_W}u * {STRIDE_Y}u;
    let left = pixel % {OUT_W}u * {STRIDE_X}u;
    var w = (which * {BLOCKS}u + group.y) * {INNER}u * {KERNEL_Y}u * {KERNEL_X}u * {ROWS}u;
    var plane = (sample * {GROUPS}u + which) * {INNER}u * {IN_H}u * {IN_W}u;
@for r ROWS
    var t{r} = 0.0;
@end
@for s KERNEL_X
    // What lies left of the input wraps around and is beyond its right edge.
    let column{s} = left + {s}u * {DILATION_X}u - {PAD_X}u;
    let is_column{s} = column{s} < {IN_W}u;
@end
    for (var c = 0u; c < {INNER}u; c = c + 1u) {
        for (var q = 0u; q < {KERNEL_Y}u; q = q + 1u) {
            let y = top + q * {DILATION_Y}u - {PAD_Y}u;
            let is_y = y < {IN_H}u;
            let row = plane + y * {IN_W}u;
@for s KERNEL_X
            {
                var x = 0.0;
                if ({IS_INSIDE}) { x = x_at(row + column{s}); }
@for r ROWS
                t{r} = fma(w_at(w + {r}u), x, t{r});
@end
                w = w + {ROWS}u;
            }
@end
        }
        plane = plane + {IN_H}u * {IN_W}u;
    }
    let channel = (which * {PER_GROUP}u) + group.y * {ROWS}u;
    let i = (sample * {CHANNELS}u + channel) * {PIXELS}u + pixel;
@for r ROWS
    if (group.y * {ROWS}u + {r}u < {PER_GROUP}u) { finish(i + {r}u * {PIXELS}u, t{r}); }
@end
}
