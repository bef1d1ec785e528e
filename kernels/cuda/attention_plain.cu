// softmax(Q · Kᵀ · scale + mask) · V in f32, without the matrix of scores: QUERIES_EACH queries of a head a block, KEYS_EACH keys and values at a
// time. A thread has four queries: of their scores those of four keys, of their results every TX-th four elements.
//
// Before this stands what stands before attention_tensor.cu, of any D and DV, QUERIES_EACH and KEYS_EACH, and WIDE: whether rows are read by
// fours.
constexpr u32 TX = KEYS_EACH / 4;
constexpr u32 THREADS = QUERIES_EACH / 4 * TX;
constexpr u32 FOURS_V = (DV + 3) / 4;
constexpr u32 FOURS_EACH = (FOURS_V + TX - 1) / TX;
constexpr u32 PITCH_Q = QUERIES_EACH + 4;
constexpr u32 PITCH_K = KEYS_EACH + 4;
constexpr u32 PITCH_V = FOURS_V * 4 + 4;
constexpr u32 PITCH_P = KEYS_EACH + 4;

// Rows from `first`, as [element][row] where TURNED, else as [row][element].
template <bool TURNED, u32 ROWS, u32 LENGTH, u32 COUNT, u32 ROW, u32 PITCH>
__device__ __forceinline__ void copy_rows(float* to, const float* from, u32 first) {
    constexpr u32 FOURS = (LENGTH + 3) / 4;
    for (u32 i = threadIdx.x; i < ROWS * FOURS; i += THREADS) {
        const u32 row = i / FOURS, d = i % FOURS * 4;
        float x[4] = {0, 0, 0, 0};
        if (first + row < COUNT) {
            const float* at = from + size_t(first + row) * ROW + d;
            if constexpr (WIDE) {
                unpack(float(), load16(at), x);
            } else {
#pragma unroll
                for (u32 e = 0; e < 4; e++)
                    if (d + e < LENGTH) x[e] = at[e];
            }
        }
        if constexpr (TURNED) {
#pragma unroll
            for (u32 e = 0; e < 4; e++)
                if (d + e < LENGTH) to[(d + e) * PITCH + row] = x[e];
        } else {
            *(float4*)(to + row * PITCH + d) = make_float4(x[0], x[1], x[2], x[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const __grid_constant__ Operands o) {
    DYNAMIC_SHARED(shared);
    float* q_tile = (float*)shared;
    float* k_tile = q_tile + D * PITCH_Q;
    float* v_tile = k_tile + D * PITCH_K;
    float* p_tile = v_tile + KEYS_EACH * PITCH_V;
    const u32 x = threadIdx.x % TX, row = threadIdx.x / TX * 4;
    const u32 tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, batch = blockIdx.z, q0 = tile * QUERIES_EACH;
    const float* k_head = o.k + size_t(batch) * K_BATCH + size_t(head / GROUP) * K_HEAD;
    const float* v_head = o.v + size_t(batch) * V_BATCH + size_t(head / GROUP) * V_HEAD;
    const u32 seen = CAUSAL && q0 + QUERIES_EACH + OFFSET < KEYS ? q0 + QUERIES_EACH + OFFSET : KEYS;
    const u32 steps = (seen + KEYS_EACH - 1) / KEYS_EACH;
    copy_rows<true, QUERIES_EACH, D, QUERIES, Q_ROW, PITCH_Q>(q_tile, o.q + size_t(batch) * Q_BATCH + size_t(head) * Q_HEAD, q0);

    float sums[4][FOURS_EACH][4], largest[4], total[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        largest[i] = -INFINITY_F32, total[i] = 0;
#pragma unroll
        for (u32 j = 0; j < FOURS_EACH; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sums[i][j][e] = 0;
    }
    for (u32 step = 0; step < steps; step++) {
        __syncthreads();
        copy_rows<true, KEYS_EACH, D, KEYS, K_ROW, PITCH_K>(k_tile, k_head, step * KEYS_EACH);
        copy_rows<false, KEYS_EACH, DV, KEYS, V_ROW, PITCH_V>(v_tile, v_head, step * KEYS_EACH);
        __syncthreads();
        float scores[4][4];
#pragma unroll
        for (u32 i = 0; i < 4; i++)
#pragma unroll
            for (u32 j = 0; j < 4; j++) scores[i][j] = 0;
#pragma unroll 8
        for (u32 d = 0; d < D; d++) {
            const float4 a = *(const float4*)(q_tile + d * PITCH_Q + row), b = *(const float4*)(k_tile + d * PITCH_K + x * 4);
            const float of_a[4] = {a.x, a.y, a.z, a.w}, of_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) scores[i][j] = fmaf(of_a[i], of_b[j], scores[i][j]);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 query = q0 + row + i;
            float highest = largest[i];
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 key = step * KEYS_EACH + x * 4 + j;
                float score = scores[i][j] * SCALE;
                if constexpr (HAS_MASK) {
                    if (query < QUERIES && key < KEYS) score += mask_at(o, batch, head, query, key);
                }
                scores[i][j] = key < KEYS && (!CAUSAL || key <= query + OFFSET) ? score : -INFINITY_F32;
                highest = fmaxf(highest, scores[i][j]);
            }
            highest = max_of_lanes<TX>(highest);
            const float base = highest == -INFINITY_F32 ? 0.0f : highest, scale = expf(largest[i] - base);
            largest[i] = highest;
            total[i] *= scale;
#pragma unroll
            for (u32 j = 0; j < FOURS_EACH; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) sums[i][j][e] *= scale;
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                scores[i][j] = expf(scores[i][j] - base);
                total[i] += scores[i][j];
            }
            *(float4*)(p_tile + (row + i) * PITCH_P + x * 4) = make_float4(scores[i][0], scores[i][1], scores[i][2], scores[i][3]);
        }
        // Only lanes of one warp read the same rows.
        __syncwarp();
#pragma unroll 2
        for (u32 k = 0; k < KEYS_EACH; k += 4) {
            float p[4][4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float4 four = *(const float4*)(p_tile + (row + i) * PITCH_P + k);
                p[i][0] = four.x, p[i][1] = four.y, p[i][2] = four.z, p[i][3] = four.w;
            }
#pragma unroll
            for (u32 by = 0; by < 4; by++)
#pragma unroll
                for (u32 j = 0; j < FOURS_EACH; j++) {
                    const u32 four = j * TX + x;
                    if (FOURS_V % TX != 0 && four >= FOURS_V) continue;
                    const float4 v = *(const float4*)(v_tile + (k + by) * PITCH_V + four * 4);
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        sums[i][j][0] = fmaf(p[i][by], v.x, sums[i][j][0]);
                        sums[i][j][1] = fmaf(p[i][by], v.y, sums[i][j][1]);
                        sums[i][j][2] = fmaf(p[i][by], v.z, sums[i][j][2]);
                        sums[i][j][3] = fmaf(p[i][by], v.w, sums[i][j][3]);
                    }
                }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 query = q0 + row + i;
        const float by = 1.0f / sum_of_lanes<TX>(total[i]);
        if (query >= QUERIES) continue;
#pragma unroll
        for (u32 j = 0; j < FOURS_EACH; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const u32 d = (j * TX + x) * 4 + e, at = batch * O_BATCH + head * O_HEAD + query * O_ROW + d;
                if (d < DV) o.output[at] = finish(o, at, d, sums[i][j][e] * by);
            }
    }
}
