// C[z] = A[z] · B[z] of few rows, as fast as B can be read: each element of it once, 16 bytes at a time where they lie together. Sums are kept
// in f32, one for each row and column, by lane; lanes and warps are added up at the end, in a fixed order.
//
// Before this stands what stands before product_tensor.cu, with COLUMNS (of a warp or thread), WARPS_K (warps that share columns), and `WIDE`:
// whether both factors are read 16 bytes at a time. A's neighbours along k lie together.
constexpr u32 EACH = WIDE ? 16 / sizeof(Element) : 1;
constexpr u32 WARPS = 8;

__device__ __forceinline__ void put(const Operands& o, u32 z, u32 split, u32 m, u32 n, float sum) {
    if (n >= N) return;
    if constexpr (SPLITS > 1) {
        parts_of(o)[((size_t(split) * Z + z) * M + m) * N + n] = sum;
    } else {
        const u32 at = result_place(z, m, n);
        output_array(o)[at] = narrow(Result(), finish_sum(o, at, channel_of(z, m, n), sum));
    }
}

// A run of neighbours, or zeros where it is outside.
template <typename E>
__device__ __forceinline__ void load_inside(bool inside, const E* from, float (&x)[EACH]) {
#pragma unroll
    for (u32 e = 0; e < EACH; e++) x[e] = 0;
    if (inside) load_run(from, x);
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(const __grid_constant__ Operands o) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, z = blockIdx.z, split = blockIdx.y;
    if constexpr (B_BY_K) {
        // A warp has COLUMNS columns, its lanes parts of k.
        __shared__ float parts[WARPS][M * COLUMNS];
        const u32 part = warp % WARPS_K, n0 = (blockIdx.x * (WARPS / WARPS_K) + warp / WARPS_K) * COLUMNS;
        float sums[M][COLUMNS];
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) sums[m][c] = 0;
        constexpr u32 STEP = 32 * EACH * WARPS_K * SPLITS;
#pragma unroll 4
        for (u32 k = ((split * WARPS_K + part) * 32 + lane) * EACH; k < K; k += STEP) {
            float b[COLUMNS][EACH];
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) {
                u32 at = 0;
                // Columns beyond the last are the last again.
                const bool inside = b_place(z, k, n0 + c < N ? n0 + c : N - 1, at);
                load_inside(inside, b_array(o) + at, b[c]);
            }
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                u32 at = 0;
                const bool inside = a_place(z, m, k, at);
                float a[EACH];
                load_inside(inside, a_array(o) + at, a);
#pragma unroll
                for (u32 c = 0; c < COLUMNS; c++)
#pragma unroll
                    for (u32 e = 0; e < EACH; e++) sums[m][c] = fmaf(a[e], b[c][e], sums[m][c]);
            }
        }
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) {
                const float sum = sum_of_lanes<32>(sums[m][c]);
                if (lane == 0) parts[warp][m * COLUMNS + c] = sum;
            }
        __syncthreads();
        // A thread for each sum.
        constexpr u32 BLOCK_COLUMNS = WARPS / WARPS_K * COLUMNS;
        for (u32 i = threadIdx.x; i < M * BLOCK_COLUMNS; i += 256) {
            const u32 m = i / BLOCK_COLUMNS, of = i % BLOCK_COLUMNS / COLUMNS, c = i % COLUMNS;
            float sum = 0;
#pragma unroll
            for (u32 by = 0; by < WARPS_K; by++) sum += parts[of * WARPS_K + by][m * COLUMNS + c];
            put(o, z, split, m, blockIdx.x * BLOCK_COLUMNS + i % BLOCK_COLUMNS, sum);
        }
    } else {
        // A lane has EACH neighbouring columns, a warp parts of k.
        __shared__ float parts[WARPS][32 * EACH];
        const u32 n0 = (blockIdx.x * 32 + lane) * EACH;
        float sums[M][EACH];
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 e = 0; e < EACH; e++) sums[m][e] = 0;
        if (n0 < N) {
#pragma unroll 4
            for (u32 k = split * WARPS + warp; k < K; k += WARPS * SPLITS) {
                u32 at = 0;
                float b[EACH];
                const bool inside = b_place(z, k, n0, at);
                load_inside(inside, b_array(o) + at, b);
#pragma unroll
                for (u32 m = 0; m < M; m++) {
                    const float a = a_place(z, m, k, at) ? widen(a_array(o)[at]) : 0.0f;
#pragma unroll
                    for (u32 e = 0; e < EACH; e++) sums[m][e] = fmaf(a, b[e], sums[m][e]);
                }
            }
        }
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 e = 0; e < EACH; e++) parts[warp][e * 32 + lane] = sums[m][e];
            __syncthreads();
            for (u32 i = threadIdx.x; i < 32 * EACH; i += 256) {
                float sum = 0;
#pragma unroll
                for (u32 by = 0; by < WARPS; by++) sum += parts[by][i % EACH * 32 + i / EACH];
                put(o, z, split, m, blockIdx.x * 32 * EACH + i, sum);
            }
            __syncthreads();
        }
    }
}
