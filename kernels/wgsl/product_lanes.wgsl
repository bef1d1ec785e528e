// As product.wgsl, for devices that load one element an invocation at a time and hand elements round within a subgroup of 8 for next to
// nothing: {WIDE} columns of {ROWS} rows an invocation, and each element of the first factor read once for a subgroup.
@compute @workgroup_size({GROUP})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) slot: u32,
) {
    let z = group.z;
    let m = group.y * {ROWS}u;
@for p WIDE
    let n{p} = (group.x * {WIDE}u + {p}u) * {GROUP}u + lane;
    let at{p} = min(n{p}, {N}u - 1u);
@end
@for o OCTETS
    let m{o} = min(m + {o}u * 8u + slot, {LAST_ROW}u);
@for e 8
@for p WIDE
    var t{o}_{e}_{p} = 0.0;
@end
@end
@end
    for (var k = 0u; k < {K}u; k = k + 1u) {
@for p WIDE
        let b{p} = b_at(z, k, at{p});
@end
@for o OCTETS
        let a{o} = a_at(z, m{o}, k);
@for e 8
        {
            let f = subgroupBroadcast(a{o}, {e}u);
@for p WIDE
            t{o}_{e}_{p} = fma(f, b{p}, t{o}_{e}_{p});
@end
        }
@end
@end
    }
@for p WIDE
    if (n{p} < {N}u) {
        let i = (z * {M}u + m) * {N}u + n{p};
@for o OCTETS
@for e 8
        if (m + {o}u * 8u + {e}u < {M}u) { finish(i + ({o}u * 8u + {e}u) * {N}u, t{o}_{e}_{p}); }
@end
@end
    }
@end
}
