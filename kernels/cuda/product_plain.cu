// C[z] = A[z] · B[z] in f32 without tensor cores: BM × BN elements of C a block, TM × TN of them a thread. The next tile of BK along k waits
// in registers while this one is multiplied; shared memory holds two, as [k][outer].
//
// Before this stands what stands before product_tensor.cu, but `A_COPY` and `B_COPY` are 16 where four neighbours are read at once, 4 where
// one is, 0 where functions give them. TM and TN are 4 or 8. FOURS: whether elements n to
// n + 3 of C lie together, aligned, for n a multiple of 4.

constexpr u32 WARPS_N = BN / (8 * TN);
constexpr u32 THREADS = BM / (4 * TM) * WARPS_N * 32;
constexpr u32 TILES_M = (M + BM - 1) / BM;
constexpr u32 TILES_N = (N + BN - 1) / BN;
constexpr u32 STEPS = (K + BK - 1) / BK;
constexpr u32 STEPS_EACH = (STEPS + SPLITS - 1) / SPLITS;
constexpr u32 PITCH_A = BM + 4;
constexpr u32 PITCH_B = BN + 4;

// Of a tile, the fours of neighbours that this thread moves.
template <bool BY_K, u32 OUTER>
struct Fours {
    static constexpr u32 ALONG = (BY_K ? BK : OUTER) / 4;
    static constexpr u32 COUNT = OUTER * BK / 4;
    static constexpr u32 EACH = (COUNT + THREADS - 1) / THREADS;
    float4 values[EACH];

    template <u32 COPY, typename Place, typename Value>
    __device__ __forceinline__ void fetch(const float* from, Place place, Value value) {
#pragma unroll
        for (u32 q = 0; q < EACH; q++) {
            const u32 i = q * THREADS + threadIdx.x;
            if (COUNT % THREADS != 0 && i >= COUNT) break;
            const u32 outer = BY_K ? i / ALONG : i % ALONG * 4, k = BY_K ? i % ALONG * 4 : i / ALONG;
            u32 at = 0;
            if constexpr (COPY == 16) {
                values[q] = make_float4(0, 0, 0, 0);
                if (place(outer, k, at)) values[q] = *(const float4*)(from + at);
            } else {
                float each[4];
#pragma unroll
                for (u32 by = 0; by < 4; by++) {
                    const u32 outer_at = outer + (BY_K ? 0 : by), k_at = k + (BY_K ? by : 0);
                    each[by] = 0;
                    if (place(outer_at, k_at, at)) {
                        if constexpr (COPY == 0) {
                            each[by] = value(outer_at, k_at);
                        } else {
                            each[by] = from[at];
                        }
                    }
                }
                values[q] = make_float4(each[0], each[1], each[2], each[3]);
            }
        }
    }

    template <u32 PITCH>
    __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
        for (u32 q = 0; q < EACH; q++) {
            const u32 i = q * THREADS + threadIdx.x;
            if (COUNT % THREADS != 0 && i >= COUNT) break;
            if constexpr (BY_K) {
                float* to = tile + i % ALONG * 4 * PITCH + i / ALONG;
                to[0] = values[q].x, to[PITCH] = values[q].y, to[2 * PITCH] = values[q].z, to[3 * PITCH] = values[q].w;
            } else {
                *(float4*)(tile + i / ALONG * PITCH + i % ALONG * 4) = values[q];
            }
        }
    }
};

// Elements n to n + 3 of row m, for n a multiple of 4.
__device__ __forceinline__ void put(const Operands& o, u32 z, u32 split, u32 m, u32 n, float4 sums) {
    if (m >= M || n >= N) return;
    const float each[4] = {sums.x, sums.y, sums.z, sums.w};
    if constexpr (SPLITS > 1) {
        float* to = parts_of(o) + ((size_t(split) * Z + z) * M + m) * N + n;
        if constexpr (N % 4 == 0) {
            *(float4*)to = sums;
        } else {
#pragma unroll
            for (u32 by = 0; by < 4; by++)
                if (n + by < N) to[by] = each[by];
        }
    } else {
        Sum done[4];
#pragma unroll
        for (u32 by = 0; by < 4; by++)
            if (n + by < N) done[by] = finish_sum(o, result_place(z, m, n + by), channel_of(z, m, n + by), each[by]);
        if constexpr (FOURS) {
            Result* to = output_array(o) + result_place(z, m, n);
            store4(to, done);
        } else {
#pragma unroll
            for (u32 by = 0; by < 4; by++)
                if (n + by < N) output_array(o)[result_place(z, m, n + by)] = narrow(Result(), done[by]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const __grid_constant__ Operands o) {
    __shared__ __align__(16) float a_tiles[2][BK * PITCH_A];
    __shared__ __align__(16) float b_tiles[2][BK * PITCH_B];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 z = blockIdx.x / (TILES_M * TILES_N), tile = blockIdx.x % (TILES_M * TILES_N);
    const u32 band = tile / (8 * TILES_N), rows = TILES_M - band * 8 < 8 ? TILES_M - band * 8 : 8;
    const u32 m0 = (band * 8 + tile % (8 * TILES_N) % rows) * BM, n0 = tile % (8 * TILES_N) / rows * BN;
    const u32 split = blockIdx.y, first = split * STEPS_EACH;
    const u32 steps = first >= STEPS ? 0 : (STEPS - first < STEPS_EACH ? STEPS - first : STEPS_EACH);
    // A warp has 4 × 8 threads. Fours of a thread are 16 rows or 32 columns apart, so that a warp reads neighbouring banks.
    const u32 thread_m = warp / WARPS_N * 4 * TM + lane / 8 * 4, thread_n = warp % WARPS_N * 8 * TN + lane % 8 * 4;

    float sums[TM][TN];
#pragma unroll
    for (u32 i = 0; i < TM; i++)
#pragma unroll
        for (u32 j = 0; j < TN; j++) sums[i][j] = 0;

    Fours<A_BY_K, BM> a_next;
    Fours<B_BY_K, BN> b_next;
    auto fetch = [&](u32 step) {
        const u32 k0 = (first + step) * BK;
        a_next.template fetch<A_COPY>(
            a_array(o), [&](u32 m, u32 k, u32& at) { return a_place(z, m0 + m, k0 + k, at); },
            [&](u32 m, u32 k) { return a_value(o, z, m0 + m, k0 + k); });
        b_next.template fetch<B_COPY>(
            b_array(o), [&](u32 n, u32 k, u32& at) { return b_place(z, k0 + k, n0 + n, at); },
            [&](u32 n, u32 k) { return b_value(o, z, k0 + k, n0 + n); });
    };
    if (steps > 0) {
        fetch(0);
        a_next.template store<PITCH_A>(a_tiles[0]);
        b_next.template store<PITCH_B>(b_tiles[0]);
    }
    __syncthreads();
    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) fetch(step + 1);
        const float* a_tile = a_tiles[step % 2];
        const float* b_tile = b_tiles[step % 2];
#pragma unroll
        for (u32 k = 0; k < BK; k++) {
            float a[TM], b[TN];
#pragma unroll
            for (u32 q = 0; q < TM; q += 4) {
                const float4 x = *(const float4*)(a_tile + k * PITCH_A + thread_m + q * 4);
                a[q] = x.x, a[q + 1] = x.y, a[q + 2] = x.z, a[q + 3] = x.w;
            }
#pragma unroll
            for (u32 q = 0; q < TN; q += 4) {
                const float4 x = *(const float4*)(b_tile + k * PITCH_B + thread_n + q * 8);
                b[q] = x.x, b[q + 1] = x.y, b[q + 2] = x.z, b[q + 3] = x.w;
            }
#pragma unroll
            for (u32 i = 0; i < TM; i++)
#pragma unroll
                for (u32 j = 0; j < TN; j++) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
        }
        if (step + 1 < steps) {
            a_next.template store<PITCH_A>(a_tiles[(step + 1) % 2]);
            b_next.template store<PITCH_B>(b_tiles[(step + 1) % 2]);
        }
        __syncthreads();
    }

#pragma unroll
    for (u32 i = 0; i < TM; i++)
#pragma unroll
        for (u32 j = 0; j < TN; j += 4) {
            const u32 m = m0 + thread_m + i / 4 * 16 + i % 4, n = n0 + thread_n + j * 8;
            put(o, z, split, m, n, make_float4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]));
        }
}
