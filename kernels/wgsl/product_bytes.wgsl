// A matrix product of bytes less zero points, four terms of a sum a word: one column of {ROWS} rows an invocation. Before this stand
// `a_at(z, m, k)` and `b_at(z, k, n)`, words of signed bytes, and `finish(z, m, n, sum)`.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let n = group.x * {GROUP}u + lane;
    if (n >= {N}u) { return; }
    let z = group.z;
    let m = group.y * {ROWS}u;
@for r ROWS
    let m{r} = min(m + {r}u, {LAST_ROW}u);
    var t{r} = 0;
@end
    for (var k = 0u; k < {WORDS}u; k = k + 1u) {
        let b = b_at(z, k, n);
@for r ROWS
        t{r} = t{r} + dot4I8Packed(a_at(z, m{r}, k), b);
@end
    }
@for r ROWS
    if (m + {r}u < {M}u) { finish(z, m + {r}u, n, t{r}); }
@end
}
