// A matrix product with weights of {BITS} bits in blocks of one scale and zero point: one column of {ROWS} rows an invocation. Weights lie as
// [word of {EACH} terms][column], scales and zero points as [block][column]. Before this stand `a_at(m, k)`, `w_at(i)` with a word,
// `scale_at(i)`, `zero_at(i)` and `finish(i, x)`.
@compute @workgroup_size({GROUP})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let n = group.x * {GROUP}u + lane;
    if (n >= {N}u) { return; }
    let m = group.y * {ROWS}u;
@for r ROWS
    let m{r} = min(m + {r}u, {LAST_ROW}u);
    var t{r} = 0.0;
@end
    for (var block = 0u; block < {BLOCKS}u; block = block + 1u) {
        let scale = scale_at(block * {N}u + n);
        let zero = zero_at(block * {N}u + n);
        for (var w = 0u; w < {WORDS_OF_BLOCK}u; w = w + 1u) {
            let word = w_at((block * {WORDS_OF_BLOCK}u + w) * {N}u + n);
            let k = (block * {WORDS_OF_BLOCK}u + w) * {EACH}u;
@for j EACH
            {
                let b = (f32(word >> ({j}u * {BITS}u) & {MASK}u) - zero) * scale;
@for r ROWS
                t{r} = fma(a_at(m{r}, k + {j}u), b, t{r});
@end
            }
@end
        }
    }
@for r ROWS
    if (m + {r}u < {M}u) { finish((m + {r}u) * {N}u + n, t{r}); }
@end
}
