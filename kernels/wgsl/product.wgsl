// One of {N} columns of {ROWS} rows an invocation. All invocations of a group have the same rows, so that what they read of the first
// factor is the same element. Before this stand `a_at(z, m, k)` and `b_at(z, k, n)`, which give an element of a factor of matrix `z`, and
// `finish(i, x)`, which puts element `i` of the result where it belongs.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let n = group.x * {GROUP}u + lane;
    if (n >= {N}u) { return; }
    let z = group.z;
    let m = group.y * {ROWS}u;
@for r ROWS
    let m{r} = min(m + {r}u, {LAST_ROW}u);
    var t{r} = 0.0;
@end
    for (var k = 0u; k < {K}u; k = k + 1u) {
        let b = b_at(z, k, n);
@for r ROWS
        t{r} = fma(a_at(z, m{r}, k), b, t{r});
@end
    }
    let i = (z * {M}u + m) * {N}u + n;
@for r ROWS
    if (m + {r}u < {M}u) { finish(i + {r}u * {N}u, t{r}); }
@end
}
