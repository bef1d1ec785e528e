// softmax(Q · Kᵀ · scale + mask) · V of one head (`z`) and 32 queries a group, over 32 keys at a time: of their scores a row keeps its largest
// and the sum of its exponentials, by which what was summed before is scaled (Milakov and Gimelshein, 2018; Dao et al., 2022). An
// invocation has 4 queries by 4 keys of the scores, and 4 queries by {COLUMNS} columns of the result. Before this stand `q_of(z)`, `k_of(z)`,
// `v_of(z)`, `mask_of(z)` and `y_of(z)`, where a head begins, `q_at(i)`, `k_at(i)`, `v_at(i)`, `mask_at(i)`, and `finish(i, x)`.
var<workgroup> queries: array<f32, 512>;
var<workgroup> keys: array<f32, 512>;
// Rows of 33, so that neighbours do not meet in one bank.
var<workgroup> scores: array<f32, 1056>;
var<workgroup> values: array<f32, {VALUES}>;
var<workgroup> largest: array<f32, 32>;
var<workgroup> total: array<f32, 32>;
var<workgroup> factor: array<f32, 32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let z = group.y;
    let first = group.x * 32u;
    let q_begin = q_of(z);
    let k_begin = k_of(z);
    let v_begin = v_of(z);
    let mask_begin = mask_of(z);
    let row = lane / 8u * 4u;
    let column = lane % 8u;
    if (lane < 32u) {
        largest[lane] = {LEAST};
        total[lane] = 0.0;
    }
@for r 4
@for c COLUMNS
    var y{r}_{c} = 0.0;
@end
@end
    for (var t = 0u; t < {KEYS}u; t = t + 32u) {
@for r 4
@for c 4
        var s{r}_{c} = 0.0;
@end
@end
        for (var d = 0u; d < {DEPTH}u; d = d + 16u) {
            workgroupBarrier();
            for (var e = lane; e < 512u; e = e + 64u) {
                let at = min(d + e % 16u, {DEPTH}u - 1u);
                let q = q_at(q_begin + min(first + e / 16u, {QUERIES}u - 1u) * {Q_ROW}u + at * {Q_COLUMN}u);
                let k = k_at(k_begin + min(t + e / 16u, {KEYS}u - 1u) * {K_ROW}u + at * {K_COLUMN}u);
                queries[e % 16u * 32u + e / 16u] = select(0.0, q, d + e % 16u < {DEPTH}u);
                keys[e % 16u * 32u + e / 16u] = select(0.0, k, d + e % 16u < {DEPTH}u);
            }
            workgroupBarrier();
            for (var e = 0u; e < 16u; e = e + 1u) {
@for r 4
                let q{r} = queries[e * 32u + row + {r}u];
@end
@for c 4
                let k{c} = keys[e * 32u + column + {c}u * 8u];
@end
@for r 4
@for c 4
                s{r}_{c} = fma(q{r}, k{c}, s{r}_{c});
@end
@end
            }
        }
@for r 4
@for c 4
        {
            let key = t + column + {c}u * 8u;
            let query = min(first + row + {r}u, {QUERIES}u - 1u);
            let mask = mask_at(mask_begin + query * {MASK_ROW}u + min(key, {KEYS}u - 1u));
            scores[(row + {r}u) * 33u + column + {c}u * 8u] = s{r}_{c} * {SCALE} + mask;
        }
@end
@end
        workgroupBarrier();
        let count = min({KEYS}u - t, 32u);
        if (lane < 32u) {
            let before = largest[lane];
            var most = before;
            for (var e = 0u; e < count; e = e + 1u) { most = max(most, scores[lane * 33u + e]); }
            var sum = 0.0;
            for (var e = 0u; e < count; e = e + 1u) {
                let x = exp_of(scores[lane * 33u + e] - most);
                scores[lane * 33u + e] = x;
                sum = sum + x;
            }
            let scale = exp_of(before - most);
            largest[lane] = most;
            total[lane] = total[lane] * scale + sum;
            factor[lane] = scale;
        }
        workgroupBarrier();
@for r 4
        let f{r} = factor[row + {r}u];
@for c COLUMNS
        y{r}_{c} = y{r}_{c} * f{r};
@end
@end
        for (var e = 0u; e < count; e = e + 8u) {
            workgroupBarrier();
            for (var at = lane; at < {VALUES}u; at = at + 64u) {
                let key = t + e + at / {WIDTH_HELD}u;
                let d = at % {WIDTH_HELD}u;
                let v = v_at(v_begin + min(key, {KEYS}u - 1u) * {V_ROW}u + min(d, {WIDTH}u - 1u) * {V_COLUMN}u);
                values[at] = select(0.0, v, d < {WIDTH}u);
            }
            workgroupBarrier();
            for (var at = 0u; at < min(count - e, 8u); at = at + 1u) {
@for r 4
                let p{r} = scores[(row + {r}u) * 33u + e + at];
@end
@for c COLUMNS
                let v{c} = values[at * {WIDTH_HELD}u + column + {c}u * 8u];
@end
@for r 4
@for c COLUMNS
                y{r}_{c} = fma(p{r}, v{c}, y{r}_{c});
@end
@end
            }
        }
    }
    let y_begin = y_of(z);
@for r 4
    {
        let query = first + row + {r}u;
        let sum = total[row + {r}u];
@for c COLUMNS
        if (query < {QUERIES}u && column + {c}u * 8u < {WIDTH}u) {
            finish(y_begin + query * {Y_ROW}u + column + {c}u * 8u, select(not_a_number(), y{r}_{c} / sum, sum > 0.0));
        }
@end
    }
@end
}
