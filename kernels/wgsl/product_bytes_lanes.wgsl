// As product_bytes.wgsl, where a subgroup of 8 hands words round for next to nothing: 4 columns of {ROWS} rows an invocation, and each word of
// the first factor read once for a subgroup.
@compute @workgroup_size({GROUP})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) slot: u32,
) {
    let z = group.z;
    let m = group.y * {ROWS}u;
    let n = (group.x * {GROUP}u + lane) * 4u;
@for c 4
    let n{c} = min(n + {c}u, {N}u - 1u);
@end
@for o OCTETS
    let m{o} = min(m + {o}u * 8u + slot, {LAST_ROW}u);
@for e 8
@for c 4
    var t{o}_{e}_{c} = 0;
@end
@end
@end
    for (var k = 0u; k < {WORDS}u; k = k + 1u) {
@for c 4
        let b{c} = b_at(z, k, n{c});
@end
@for o OCTETS
        let a{o} = a_at(z, m{o}, k);
@for e 8
        {
            let f = subgroupBroadcast(a{o}, {e}u);
@for c 4
            t{o}_{e}_{c} = t{o}_{e}_{c} + dot4I8Packed(f, b{c});
@end
        }
@end
@end
    }
    if (n < {N}u) {
@for o OCTETS
@for e 8
        if (m + {o}u * 8u + {e}u < {M}u) {
            finish(z, m + {o}u * 8u + {e}u, n, t{o}_{e}_0, t{o}_{e}_1, t{o}_{e}_2, t{o}_{e}_3);
        }
@end
@end
    }
}
