// As product.wgsl, by tiles that a group shares: {TILE_M} rows by {TILE_N} columns a group, {TILE_K} terms at a time, {ROWS} by {COLUMNS} an
// invocation. Before this stand `a_at(z, m, k)`, `b_at(z, k, n)`, and `finish(i, x)`.
var<workgroup> a_tile: array<f32, {A_HELD}>;
var<workgroup> b_tile: array<f32, {B_HELD}>;

@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let z = group.z;
    let m0 = group.y * {TILE_M}u;
    let n0 = group.x * {TILE_N}u;
    let row = lane / {ACROSS}u * {ROWS}u;
    let column = lane % {ACROSS}u;
@for r ROWS
@for c COLUMNS
    var t{r}_{c} = 0.0;
@end
@end
    for (var k0 = 0u; k0 < {K}u; k0 = k0 + {TILE_K}u) {
        workgroupBarrier();
        for (var e = lane; e < {TILE_K}u * {TILE_M}u; e = e + {GROUP}u) {
            let k = e % {TILE_K}u;
            let m = e / {TILE_K}u;
            let a = a_at(z, min(m0 + m, {LAST_ROW}u), min(k0 + k, {K}u - 1u));
            a_tile[k * {A_STRIDE}u + m] = select(0.0, a, k0 + k < {K}u);
        }
        for (var e = lane; e < {TILE_K}u * {TILE_N}u; e = e + {GROUP}u) {
            let k = e / {TILE_N}u;
            let n = e % {TILE_N}u;
            let b = b_at(z, min(k0 + k, {K}u - 1u), min(n0 + n, {N}u - 1u));
            b_tile[e] = select(0.0, b, k0 + k < {K}u);
        }
        workgroupBarrier();
        for (var k = 0u; k < {TILE_K}u; k = k + 1u) {
@for r ROWS
            let a{r} = a_tile[k * {A_STRIDE}u + row + {r}u];
@end
@for c COLUMNS
            let b{c} = b_tile[k * {TILE_N}u + column + {c}u * {ACROSS}u];
@end
@for r ROWS
@for c COLUMNS
            t{r}_{c} = fma(a{r}, b{c}, t{r}_{c});
@end
@end
        }
    }
@for r ROWS
@for c COLUMNS
    if (m0 + row + {r}u < {M}u && n0 + column + {c}u * {ACROSS}u < {N}u) {
        finish((z * {M}u + m0 + row + {r}u) * {N}u + n0 + column + {c}u * {ACROSS}u, t{r}_{c});
    }
@end
@end
}
