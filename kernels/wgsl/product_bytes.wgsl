// A matrix product of bytes less zero points, four terms of a sum a word: 4 columns of {ROWS} rows an invocation. Before this stand
// `a_at(z, m, k)` and `b_at(z, k, n)`, words of signed bytes, and `finish(z, m, n, s0, s1, s2, s3)`, of 4 neighbouring columns.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let n = (group.x * {GROUP}u + lane) * 4u;
    if (n >= {N}u) { return; }
    let z = group.z;
    let m = group.y * {ROWS}u;
@for c 4
    let n{c} = min(n + {c}u, {N}u - 1u);
@end
@for r ROWS
    let m{r} = min(m + {r}u, {LAST_ROW}u);
@for c 4
    var t{r}_{c} = 0;
@end
@end
    for (var k = 0u; k < {WORDS}u; k = k + 1u) {
@for c 4
        let b{c} = b_at(z, k, n{c});
@end
@for r ROWS
        {
            let a = a_at(z, m{r}, k);
@for c 4
            t{r}_{c} = t{r}_{c} + dot4I8Packed(a, b{c});
@end
        }
@end
    }
@for r ROWS
    if (m + {r}u < {M}u) { finish(z, m + {r}u, n, t{r}_0, t{r}_1, t{r}_2, t{r}_3); }
@end
}
