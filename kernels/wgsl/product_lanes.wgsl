// As product.wgsl, for devices that gather four elements an invocation as one, and hand elements round within a subgroup of 8 for next to
// nothing: 4 columns of {ROWS} rows an invocation, and each element of the first factor read once for a subgroup. Before this stand
// `a_at(z, m, k)` with 4 elements of a row of the first factor, `b_at(z, k, n)` with 4 of a row of the second, and `finish(row, n, x)`,
// which puts 4 columns of row `row` of all matrices where they belong.
@compute @workgroup_size({GROUP})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) slot: u32,
) {
    let z = group.z;
    let m = group.y * {ROWS}u;
    let n = (group.x * {GROUP}u + lane) * 4u;
@for o OCTETS
    let m{o} = min(m + {o}u * 8u + slot, {LAST_ROW}u);
@for e 8
    var t{o}_{e} = vec4<f32>(0.0);
@end
@end
    for (var k = 0u; k < {WHOLE}u; k = k + 4u) {
@for j 4
        let b{j} = b_at(z, k + {j}u, n);
@end
@for o OCTETS
        let a{o} = a_at(z, m{o}, k);
@for e 8
        {
            let f = subgroupBroadcast(a{o}, {e}u);
            t{o}_{e} = t{o}_{e} + ((f.x * b0 + f.y * b1) + (f.z * b2 + f.w * b3));
        }
@end
@end
    }
@for j REST
    {
        let b = b_at(z, {WHOLE}u + {j}u, n);
@for o OCTETS
        let a{o} = a_at(z, m{o}, {WHOLE}u)[{j}];
@for e 8
        t{o}_{e} = t{o}_{e} + subgroupBroadcast(a{o}, {e}u) * b;
@end
@end
    }
@end
    if (n < {N}u) {
@for o OCTETS
@for e 8
        if (m + {o}u * 8u + {e}u < {M}u) { finish(z * {M}u + m + {o}u * 8u + {e}u, n, t{o}_{e}); }
@end
@end
    }
}
