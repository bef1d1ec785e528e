// As attention.wgsl, for devices that gather four elements an invocation as one, and hand elements round within a subgroup of 8 for next to
// nothing: 8 queries of one head a subgroup, over 32 keys at a time, 4 of them an invocation. Before this stand `q_of(z)`, `k_of(z)`, `v_of(z)`,
// `mask_of(z)` and `y_of(z)`, where a head begins; `q_at(i)`, `k_at(i)`, `mask_at(i)`; `q_quad(i)`, `k_quad(i)` and `v_quad(i)` with 4
// elements of a row; and `finish(i, d, x)`, which puts columns `d` to `d + 3` of a row where they belong.
@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) slot: u32) {
    let z = group.y;
    let first = group.x * 8u;
    let q_begin = q_of(z) + min(first + slot, {QUERIES}u - 1u) * {Q_ROW}u;
    let k_begin = k_of(z);
    let v_begin = v_of(z);
    let mask_begin = mask_of(z);
@for e 8
    var largest{e} = {LEAST};
    var total{e} = 0.0;
@for c COLUMNS
    var y{e}_{c} = vec4<f32>(0.0);
@end
@end
    for (var t = 0u; t < {KEYS}u; t = t + 32u) {
        let key = t + slot * 4u;
@for j 4
        let key{j} = min(key + {j}u, {KEYS}u - 1u);
        let k{j} = k_begin + key{j} * {K_ROW}u;
@end
@for e 8
        var s{e} = vec4<f32>(0.0);
@end
        for (var d = 0u; d < {WHOLE}u; d = d + 4u) {
            let q = q_quad(q_begin + d * {Q_COLUMN}u);
@for j 4
            let x{j} = k_quad(k{j} + d * {K_COLUMN}u);
@end
@for e 8
            {
                let f = subgroupBroadcast(q, {e}u);
                s{e} = s{e} + vec4<f32>(dot(f, x0), dot(f, x1), dot(f, x2), dot(f, x3));
            }
@end
        }
@for j REST
        {
            let d = {WHOLE}u + {j}u;
            let q = q_at(q_begin + d * {Q_COLUMN}u);
            let x = vec4<f32>(k_at(k0 + d * {K_COLUMN}u), k_at(k1 + d * {K_COLUMN}u), k_at(k2 + d * {K_COLUMN}u), k_at(k3 + d * {K_COLUMN}u));
@for e 8
            s{e} = s{e} + subgroupBroadcast(q, {e}u) * x;
@end
        }
@end
@for e 8
        {
            let m = mask_begin + min(first + {e}u, {QUERIES}u - 1u) * {MASK_ROW}u;
            let mask = vec4<f32>(mask_at(m + key0), mask_at(m + key1), mask_at(m + key2), mask_at(m + key3));
            let x = s{e} * {SCALE} + mask;
            // A key beyond the last is the last, and weighs nothing.
            let most = max(largest{e}, subgroupMax(max(max(x.x, x.y), max(x.z, x.w))));
            let factor = exp_of(largest{e} - most);
            s{e} = vec4<f32>(
                select(0.0, exp_of(x.x - most), key < {KEYS}u),
                select(0.0, exp_of(x.y - most), key + 1u < {KEYS}u),
                select(0.0, exp_of(x.z - most), key + 2u < {KEYS}u),
                select(0.0, exp_of(x.w - most), key + 3u < {KEYS}u),
            );
            total{e} = total{e} * factor + ((s{e}.x + s{e}.y) + (s{e}.z + s{e}.w));
            largest{e} = most;
@for c COLUMNS
            y{e}_{c} = y{e}_{c} * factor;
@end
        }
@end
@for l 8
        if (t + {l}u * 4u < {KEYS}u) {
@for e 8
            let p{e} = subgroupBroadcast(s{e}, {l}u);
@end
@for j 4
            {
                let row = v_begin + min(t + {l}u * 4u + {j}u, {KEYS}u - 1u) * {V_ROW}u + slot * 4u * {V_COLUMN}u;
@for c COLUMNS
                {
                    let v = v_quad(row + {c}u * 32u * {V_COLUMN}u);
@for e 8
                    y{e}_{c} = y{e}_{c} + p{e}[{j}] * v;
@end
                }
@end
            }
@end
        }
@end
    }
    let y_begin = y_of(z);
@for e 8
    {
        let sum = subgroupAdd(total{e});
        let whole = select(not_a_number(), sum, sum > 0.0);
        if (first + {e}u < {QUERIES}u) {
@for c COLUMNS
            {
                let d = {c}u * 32u + slot * 4u;
                if (d < {WIDTH}u) { finish(y_begin + (first + {e}u) * {Y_ROW}u + d, d, y{e}_{c} / whole); }
            }
@end
        }
    }
@end
}
