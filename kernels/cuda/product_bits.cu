// C = A · Bᵀ for a few rows of A and a B of BITS bits an element, in blocks of BLOCK along k with a scale each and, where HAS_ZERO_POINTS, a zero
// point: read as it is packed, 16 bytes a lane at a time, and widened in registers.
//
// B is [N][blocks][BLOCK · BITS / 8] bytes, elements from the low bits on; scales [N][blocks]; zero points [N][bytes of blocks · BITS], without
// them the middle of the range. Before this stand M, N, K, BITS, BLOCK, SPLITS, COLUMNS of a warp, `Element` of A, `Scale`, `Result`.
constexpr u32 BLOCKS = (K + BLOCK - 1) / BLOCK;
constexpr u32 BLOCK_BYTES = BLOCK * BITS / 8;
// What a lane reads at a time: of one block.
constexpr u32 CHUNK = BLOCK_BYTES < 16 ? BLOCK_BYTES : 16;
constexpr u32 WORDS = CHUNK / 4;
constexpr u32 EACH = CHUNK * 8 / BITS;
constexpr u32 WARPS = 8;
constexpr u32 STEP = 32 * EACH;
constexpr u32 STEPS = (K + STEP - 1) / STEP;
constexpr u32 STEPS_EACH = (STEPS + SPLITS - 1) / SPLITS;

extern "C" __global__ void __launch_bounds__(256) ENTRY(const __grid_constant__ Operands o) {
    // The rows of A at a step, as [row][four of a lane][lane][4], so that lanes read neighbouring banks.
    __shared__ __align__(16) float rows[M][EACH / 4][32][4];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.y;
    const u32 n0 = (blockIdx.x * WARPS + warp) * COLUMNS;
    float sums[M][COLUMNS];
#pragma unroll
    for (u32 m = 0; m < M; m++)
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) sums[m][c] = 0;
    for (u32 step = split * STEPS_EACH; step < STEPS && step < (split + 1) * STEPS_EACH; step++) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < M * STEP; i += 256) {
            const u32 m = i / STEP, by = i % STEP, k = step * STEP + by;
            rows[m][by % EACH / 4][by / EACH][by % 4] = k < K ? widen(o.a[m * K + k]) : 0.0f;
        }
        __syncthreads();
        const u32 k = step * STEP + lane * EACH, block = k / BLOCK;
        if (block >= BLOCKS) continue;
        u32 words[COLUMNS][WORDS];
        float scales[COLUMNS], zeros[COLUMNS];
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) {
            const u32 n = n0 + c < N ? n0 + c : N - 1;
            const unsigned char* from = o.b + (size_t(n) * BLOCKS + block) * BLOCK_BYTES + k % BLOCK * BITS / 8;
            if constexpr (WORDS == 4) {
                const uint4 x = load16(from);
                words[c][0] = x.x, words[c][1] = x.y, words[c][2] = x.z, words[c][3] = x.w;
            } else {
#pragma unroll
                for (u32 w = 0; w < WORDS; w++) words[c][w] = ((const u32*)from)[w];
            }
            scales[c] = widen(o.scales[n * BLOCKS + block]);
            if constexpr (HAS_ZERO_POINTS) {
                const u32 byte = zero_byte(o, n * ((BLOCKS * BITS + 7) / 8) + block * BITS / 8);
                zeros[c] = float(byte >> block * BITS % 8 & ((1u << BITS) - 1));
            } else {
                zeros[c] = float(1u << (BITS - 1));
            }
        }
        float of_block[M][COLUMNS];
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) of_block[m][c] = 0;
#pragma unroll
        for (u32 four = 0; four < EACH / 4; four++) {
            float b[COLUMNS][4];
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    // The bits of 2²³ + q, from which 2²³ and the zero point are taken exactly.
                    const u32 at = (four * 4 + e) * BITS, bits = words[c][at / 32] >> at % 32 & ((1u << BITS) - 1);
                    b[c][e] = (__uint_as_float(bits | 0x4b000000u) - 8388608.0f) - zeros[c];
                }
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                const float4 a = *(const float4*)rows[m][four][lane];
#pragma unroll
                for (u32 c = 0; c < COLUMNS; c++) {
                    of_block[m][c] = fmaf(a.x, b[c][0], of_block[m][c]);
                    of_block[m][c] = fmaf(a.y, b[c][1], of_block[m][c]);
                    of_block[m][c] = fmaf(a.z, b[c][2], of_block[m][c]);
                    of_block[m][c] = fmaf(a.w, b[c][3], of_block[m][c]);
                }
            }
        }
#pragma unroll
        for (u32 m = 0; m < M; m++)
#pragma unroll
            for (u32 c = 0; c < COLUMNS; c++) sums[m][c] = fmaf(of_block[m][c], scales[c], sums[m][c]);
    }
#pragma unroll
    for (u32 m = 0; m < M; m++)
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) {
            const float sum = sum_of_lanes<32>(sums[m][c]);
            const u32 n = n0 + c, i = m * N + n;
            if (lane != 0 || n >= N) continue;
            if constexpr (SPLITS > 1) {
                parts_of(o)[size_t(split) * M * N + i] = sum;
            } else {
                o.output[i] = narrow(Result(), finish(o, i, n, sum));
            }
        }
}
