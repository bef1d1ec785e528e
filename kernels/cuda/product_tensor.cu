// C[z] = A[z] · B[z] on tensor cores: BM × BN elements of C a block, WARP_M × WARP_N of them a warp. STAGES tiles of BK along k are under way
// at a time, copied asynchronously into shared memory, whose chunks of 16 bytes are permuted so that no access has bank conflicts.
//
// Before this stand M, N, K, Z, BM, BN, BK, WARP_M, WARP_N, STAGES, SPLITS; of each factor, `A_BY_K`: whether neighbours along k lie
// together (else those along the other axis); `A_COPY`: how many bytes of neighbours lie together, aligned to as many, and are inside or
// outside together (16, 8, 4; fewer are read element by element; 0: `a_at` gives elements); `a_place(z, m, k, at)`: whether an element is
// inside, and its index; the same of B with `b_place(z, k, n, at)`. `a_array(o)`,
// `b_array(o)` and `output_array(o)` are where they lie, `parts_of(o)` where parts of sums do, `a_outside(o)` points to 16 bytes of what
// A has outside, if that is not zero. Then `finish_sum(o, i, channel, x)`, `result_place(z, m, n)`, `channel_of(z, m, n)`, and PAIRS: whether
// elements n and n + 1 of C lie together, aligned, for even n.

constexpr u32 SIZE = sizeof(Element);
constexpr u32 EACH = 16 / SIZE;
constexpr u32 WARPS_N = BN / WARP_N;
constexpr u32 THREADS = BM / WARP_M * WARPS_N * 32;
constexpr u32 TILES_M = (M + BM - 1) / BM;
constexpr u32 TILES_N = (N + BN - 1) / BN;
constexpr u32 STEPS = (K + BK - 1) / BK;
constexpr u32 STEPS_EACH = (STEPS + SPLITS - 1) / SPLITS;
// Elements along k of one instruction: 32 bytes of them.
constexpr u32 DEPTH = 32 / SIZE;
constexpr u32 FRAGMENTS_M = WARP_M / 16;
constexpr u32 FRAGMENTS_N = WARP_N / 8;

// A tile in shared memory: rows of chunks, along k where `BY_K`, else along the outer axis of `OUTER` elements.
template <bool BY_K, u32 OUTER>
struct Layout {
    static constexpr u32 ROWS = BY_K ? OUTER : BK;
    static constexpr u32 CHUNKS = (BY_K ? BK : OUTER) / EACH;
    // Words can't be transposed while they are read: they are read one by one, and rows are 8 banks apart.
    static constexpr bool IS_PADDED = !BY_K && SIZE == 4;
    static constexpr u32 PITCH = CHUNKS * 16 + (IS_PADDED ? 32 : 0);
    static constexpr u32 BYTES = ROWS * PITCH;
    static __device__ __forceinline__ u32 at(u32 row, u32 chunk) {
        if constexpr (IS_PADDED) {
            return row * PITCH + chunk * 16;
        } else if constexpr (CHUNKS >= 8) {
            return row * PITCH + (chunk ^ (row & 7)) * 16;
        } else {
            return row * PITCH + (chunk ^ (row / (8 / CHUNKS) & (CHUNKS - 1))) * 16;
        }
    }
};
using LayoutA = Layout<A_BY_K, BM>;
using LayoutB = Layout<B_BY_K, BN>;
constexpr u32 STAGE_BYTES = LayoutA::BYTES + LayoutB::BYTES;

// Brings a tile into shared memory. `place(outer, k, at)`: whether an element is inside, and where; `value(outer, k)`: what it is.
// What is outside is zero, or what `outside` points to.
template <typename L, bool BY_K, u32 COPY, typename E, typename Place, typename Value>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const E* from, const E* outside, Place place, Value value) {
    constexpr u32 COUNT = L::ROWS * L::CHUNKS;
#pragma unroll
    for (u32 begin = 0; begin < COUNT; begin += THREADS) {
        const u32 i = begin + threadIdx.x;
        if (COUNT % THREADS != 0 && i >= COUNT) break;
        const u32 row = i / L::CHUNKS, chunk = i % L::CHUNKS;
        unsigned char* to = tile + L::at(row, chunk);
        const u32 outer = BY_K ? row : chunk * EACH, k = BY_K ? chunk * EACH : row;
        if constexpr (COPY >= 4) {
#pragma unroll
            for (u32 part = 0; part < 16; part += COPY) {
                const u32 by = part / SIZE;
                u32 at = 0;
                const bool inside = place(outer + (BY_K ? 0 : by), k + (BY_K ? by : 0), at);
                const E* source = inside || outside == nullptr ? from + (inside ? at : 0) : outside;
                copy_async<COPY>(to + part, source, inside || outside != nullptr ? COPY : 0);
            }
        } else {
            union {
                E elements[EACH];
                uint4 all;
            } chunk16;
            chunk16.all = make_uint4(0, 0, 0, 0);
#pragma unroll
            for (u32 by = 0; by < EACH; by++) {
                const u32 outer_at = outer + (BY_K ? 0 : by), k_at = k + (BY_K ? by : 0);
                u32 at = 0;
                if (place(outer_at, k_at, at)) {
                    if constexpr (COPY == 0) {
                        chunk16.elements[by] = value(outer_at, k_at);
                    } else {
                        chunk16.elements[by] = from[at];
                    }
                } else if (outside != nullptr) {
                    chunk16.elements[by] = *outside;
                }
            }
            *(uint4*)to = chunk16.all;
        }
    }
}

__device__ __forceinline__ void copy_stage(const Operands& o, unsigned char* stage, u32 z, u32 m0, u32 n0, u32 k0) {
    copy_tile<LayoutA, A_BY_K, A_COPY>(
        stage, a_array(o), a_outside(o), [&](u32 m, u32 k, u32& at) { return a_place(z, m0 + m, k0 + k, at); },
        [&](u32 m, u32 k) { return a_value(o, z, m0 + m, k0 + k); });
    copy_tile<LayoutB, B_BY_K, B_COPY>(
        stage + LayoutA::BYTES, b_array(o), (const ElementB*)nullptr, [&](u32 n, u32 k, u32& at) { return b_place(z, k0 + k, n0 + n, at); },
        [&](u32 n, u32 k) { return b_value(o, z, k0 + k, n0 + n); });
}

// Of four fragments of a tile, two of 8 along the outer axis and two halves of an instruction's k: `f[2 · half + part]` where `HALF_FIRST`,
// else `f[2 · part + half]`.
template <typename L, bool BY_K, bool HALF_FIRST>
__device__ __forceinline__ void load_fragments(u32 (&f)[4], const unsigned char* tile, u32 outer, u32 step, u32 lane) {
    const u32 matrix = lane / 8, part = HALF_FIRST ? matrix % 2 : matrix / 2, half = HALF_FIRST ? matrix / 2 : matrix % 2;
    if constexpr (BY_K) {
        load_matrices(f, tile + L::at(outer + part * 8 + lane % 8, step * 2 + half));
    } else if constexpr (SIZE == 2) {
        load_matrices_transposed(f, tile + L::at(step * 16 + half * 8 + lane % 8, outer / 8 + part));
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 part = HALF_FIRST ? i % 2 : i / 2, half = HALF_FIRST ? i / 2 : i % 2;
            f[i] = *(const u32*)(tile + (step * 8 + half * 4 + lane % 4) * L::PITCH + (outer + part * 8 + lane / 4) * 4);
        }
    }
    if constexpr (IS_TF32) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) f[i] = round_tf32(f[i]);
    }
}

__device__ __forceinline__ void put(const Operands& o, u32 z, u32 split, u32 m, u32 n, Sum x, Sum y) {
    if (m >= M || n >= N) return;
    const bool both = n + 1 < N;
    if constexpr (SPLITS > 1) {
        Sum* to = parts_of(o) + ((size_t(split) * Z + z) * M + m) * N + n;
        if constexpr (N % 2 == 0) {
            store2(to, x, y);
        } else {
            to[0] = x;
            if (both) to[1] = y;
        }
    } else {
        const u32 i = result_place(z, m, n);
        const Sum first = finish_sum(o, i, channel_of(z, m, n), x);
        if constexpr (PAIRS) {
            store2(output_array(o) + i, first, finish_sum(o, i + 1, channel_of(z, m, n + 1), y));
        } else {
            output_array(o)[i] = narrow(Result(), first);
            if (both) {
                const u32 next = result_place(z, m, n + 1);
                output_array(o)[next] = narrow(Result(), finish_sum(o, next, channel_of(z, m, n + 1), y));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const __grid_constant__ Operands o) {
    DYNAMIC_SHARED(shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Blocks that run together have neighbouring tiles: 8 along m for each along n, so that they read the same of both factors.
    const u32 z = blockIdx.x / (TILES_M * TILES_N), tile = blockIdx.x % (TILES_M * TILES_N);
    const u32 band = tile / (8 * TILES_N), rows = TILES_M - band * 8 < 8 ? TILES_M - band * 8 : 8;
    const u32 m0 = (band * 8 + tile % (8 * TILES_N) % rows) * BM, n0 = tile % (8 * TILES_N) / rows * BN;
    const u32 split = blockIdx.y, first = split * STEPS_EACH;
    const u32 steps = first >= STEPS ? 0 : (STEPS - first < STEPS_EACH ? STEPS - first : STEPS_EACH);
    const u32 warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;

    Sum sums[FRAGMENTS_M][FRAGMENTS_N][4];
#pragma unroll
    for (u32 i = 0; i < FRAGMENTS_M; i++)
#pragma unroll
        for (u32 j = 0; j < FRAGMENTS_N; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sums[i][j][e] = 0;

#pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++) {
        if (s < steps) copy_stage(o, shared + s * STAGE_BYTES, z, m0, n0, (first + s) * BK);
        copy_commit();
    }
    u32 stage = 0, next = STAGES - 1;
    for (u32 step = 0; step < steps; step++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) copy_stage(o, shared + next * STAGE_BYTES, z, m0, n0, (first + step + STAGES - 1) * BK);
        copy_commit();
        const unsigned char* a_tile = shared + stage * STAGE_BYTES;
        const unsigned char* b_tile = a_tile + LayoutA::BYTES;
#pragma unroll
        for (u32 k = 0; k < BK / DEPTH; k++) {
            u32 a[FRAGMENTS_M][4], b[FRAGMENTS_N / 2][4];
#pragma unroll
            for (u32 i = 0; i < FRAGMENTS_M; i++) load_fragments<LayoutA, A_BY_K, true>(a[i], a_tile, warp_m + i * 16, k, lane);
#pragma unroll
            for (u32 j = 0; j < FRAGMENTS_N / 2; j++) load_fragments<LayoutB, B_BY_K, false>(b[j], b_tile, warp_n + j * 16, k, lane);
#pragma unroll
            for (u32 i = 0; i < FRAGMENTS_M; i++)
#pragma unroll
                for (u32 j = 0; j < FRAGMENTS_N; j++) {
                    const u32 of_b[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                    multiply_add(Element(), sums[i][j], a[i], of_b);
                }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    copy_wait<0>();

#pragma unroll
    for (u32 i = 0; i < FRAGMENTS_M; i++)
#pragma unroll
        for (u32 j = 0; j < FRAGMENTS_N; j++)
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 m = m0 + warp_m + i * 16 + half * 8 + lane / 4, n = n0 + warp_n + j * 8 + lane % 4 * 2;
                put(o, z, split, m, n, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
}
