// softmax(Q · Kᵀ · scale + mask) · V on tensor cores, without the matrix of scores: 64 queries of a head a block, 16 a warp. Keys and values come
// 64 at a time, the next while these are used; the maximum and the sum of a query's exponentials are kept, and what was added up before a
// larger maximum came is scaled down. Keys are taken in order, so a result is the same in every run.
//
// Before this stand HEADS, GROUP (query heads of a key head), QUERIES, KEYS, D and DV (multiples of 8), strides in elements {Q,K,V,O}_{BATCH,
// HEAD,ROW}, `SCALE`, `CAUSAL` and `OFFSET` (query q sees keys up to q + OFFSET), and `mask_at(o, batch, head, query, key)`. `Memory` is what
// queries, keys, values and results are: `Element`, or f32, which is narrowed while it is read.
constexpr u32 BLOCK = 64;
constexpr u32 THREADS = 128;
// Up to whole instructions; what is beyond is zero.
constexpr u32 DEPTH = (D + 15) / 16 * 16;
constexpr u32 WIDTH = (DV + 15) / 16 * 16;
// An odd number of chunks of 16 bytes: eight rows of one column lie in different banks.
constexpr u32 PITCH_K = DEPTH * 2 + 16;
constexpr u32 PITCH_V = WIDTH * 2 + 16;
constexpr u32 STAGE_BYTES = BLOCK * (PITCH_K + PITCH_V);
constexpr float LOG2_E = 1.44269504088896f;

// Rows from `first` of an array with rows of `LENGTH` elements; what is beyond `COUNT` rows or `LENGTH` elements is zero.
template <u32 LENGTH, u32 PADDED, u32 COUNT, u32 ROW, u32 PITCH>
__device__ __forceinline__ void copy_rows(unsigned char* to, const Memory* from, u32 first) {
    constexpr u32 CHUNKS = PADDED / 8;
#pragma unroll
    for (u32 begin = 0; begin < BLOCK * CHUNKS; begin += THREADS) {
        const u32 i = begin + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
        if (BLOCK * CHUNKS % THREADS != 0 && i >= BLOCK * CHUNKS) break;
        const bool inside = first + row < COUNT && chunk * 8 < LENGTH;
        const Memory* source = from + (inside ? size_t(first + row) * ROW + chunk * 8 : 0);
        if constexpr (sizeof(Memory) == 2) {
            copy_async<16>(to + row * PITCH + chunk * 16, source, inside ? 16 : 0);
        } else {
            uint4 narrowed = make_uint4(0, 0, 0, 0);
            if (inside) {
                float low[4], high[4];
                unpack(float(), load16(source), low);
                unpack(float(), load16(source + 4), high);
                const float x[8] = {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
                narrowed = pack(Element(), x);
            }
            *(uint4*)(to + row * PITCH + chunk * 16) = narrowed;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const __grid_constant__ Operands o) {
    DYNAMIC_SHARED(shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Blocks that see the most keys begin first.
    const u32 tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, batch = blockIdx.z, q0 = tile * BLOCK;
    const Memory* q_head = o.q + size_t(batch) * Q_BATCH + size_t(head) * Q_HEAD;
    const Memory* k_head = o.k + size_t(batch) * K_BATCH + size_t(head / GROUP) * K_HEAD;
    const Memory* v_head = o.v + size_t(batch) * V_BATCH + size_t(head / GROUP) * V_HEAD;
    const u32 seen = CAUSAL && q0 + BLOCK + OFFSET < KEYS ? q0 + BLOCK + OFFSET : KEYS;
    const u32 steps = (seen + BLOCK - 1) / BLOCK;

    // Queries pass through the second stage's place.
    unsigned char* q_tile = shared + STAGE_BYTES;
    copy_rows<D, DEPTH, QUERIES, Q_ROW, PITCH_K>(q_tile, q_head, q0);
    copy_commit();
    if (steps > 0) {
        copy_rows<D, DEPTH, KEYS, K_ROW, PITCH_K>(shared, k_head, 0);
        copy_rows<DV, WIDTH, KEYS, V_ROW, PITCH_V>(shared + BLOCK * PITCH_K, v_head, 0);
    }
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    u32 q[DEPTH / 16][4];
#pragma unroll
    for (u32 d = 0; d < DEPTH / 16; d++) load_matrices(q[d], q_tile + (warp * 16 + lane % 16) * PITCH_K + d * 32 + lane / 16 * 16);

    float sums[WIDTH / 8][4];
#pragma unroll
    for (u32 j = 0; j < WIDTH / 8; j++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) sums[j][e] = 0;
    // Of rows lane / 4 and lane / 4 + 8; scores are held times log2(e).
    float largest[2] = {-INFINITY_F32, -INFINITY_F32}, total[2] = {0, 0};

    for (u32 step = 0; step < steps; step++) {
        copy_wait<0>();
        __syncthreads();
        const unsigned char* k_tile = shared + step % 2 * STAGE_BYTES;
        const unsigned char* v_tile = k_tile + BLOCK * PITCH_K;
        if (step + 1 < steps) {
            unsigned char* next = shared + (step + 1) % 2 * STAGE_BYTES;
            copy_rows<D, DEPTH, KEYS, K_ROW, PITCH_K>(next, k_head, (step + 1) * BLOCK);
            copy_rows<DV, WIDTH, KEYS, V_ROW, PITCH_V>(next + BLOCK * PITCH_K, v_head, (step + 1) * BLOCK);
        }
        copy_commit();

        float scores[BLOCK / 8][4];
#pragma unroll
        for (u32 j = 0; j < BLOCK / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) scores[j][e] = 0;
#pragma unroll
        for (u32 d = 0; d < DEPTH / 16; d++)
#pragma unroll
            for (u32 j = 0; j < BLOCK / 16; j++) {
                u32 k[4];
                load_matrices(k, k_tile + (j * 16 + lane / 16 * 8 + lane % 8) * PITCH_K + d * 32 + lane / 8 % 2 * 16);
                const u32 low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
                multiply_add(Element(), scores[2 * j], q[d], low);
                multiply_add(Element(), scores[2 * j + 1], q[d], high);
            }

        float highest[2] = {largest[0], largest[1]};
#pragma unroll
        for (u32 j = 0; j < BLOCK / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const u32 query = q0 + warp * 16 + lane / 4 + e / 2 * 8, key = step * BLOCK + j * 8 + lane % 4 * 2 + e % 2;
                float score = scores[j][e] * (SCALE * LOG2_E);
                if constexpr (HAS_MASK) {
                    if (query < QUERIES && key < KEYS) score += mask_at(o, batch, head, query, key) * LOG2_E;
                }
                const bool is_seen = key < KEYS && (!CAUSAL || key <= query + OFFSET);
                scores[j][e] = is_seen ? score : -INFINITY_F32;
                highest[e / 2] = fmaxf(highest[e / 2], scores[j][e]);
            }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            highest[half] = max_of_lanes<4>(highest[half]);
            // Where nothing was seen yet there is nothing to scale.
            const float base = highest[half] == -INFINITY_F32 ? 0.0f : highest[half];
            const float scale = exp2_fast(largest[half] - base);
            largest[half] = highest[half];
            total[half] *= scale;
#pragma unroll
            for (u32 j = 0; j < WIDTH / 8; j++) sums[j][2 * half] *= scale, sums[j][2 * half + 1] *= scale;
#pragma unroll
            for (u32 j = 0; j < BLOCK / 8; j++)
#pragma unroll
                for (u32 e = 0; e < 2; e++) {
                    const float weight = exp2_fast(scores[j][2 * half + e] - base);
                    scores[j][2 * half + e] = weight;
                    total[half] += weight;
                }
        }
#pragma unroll
        for (u32 k = 0; k < BLOCK / 16; k++) {
            const u32 p[4] = {
                narrow2(Element(), scores[2 * k][0], scores[2 * k][1]),
                narrow2(Element(), scores[2 * k][2], scores[2 * k][3]),
                narrow2(Element(), scores[2 * k + 1][0], scores[2 * k + 1][1]),
                narrow2(Element(), scores[2 * k + 1][2], scores[2 * k + 1][3]),
            };
#pragma unroll
            for (u32 j = 0; j < WIDTH / 16; j++) {
                u32 v[4];
                load_matrices_transposed(v, v_tile + (k * 16 + lane % 16) * PITCH_V + j * 32 + lane / 16 * 16);
                const u32 low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
                multiply_add(Element(), sums[2 * j], p, low);
                multiply_add(Element(), sums[2 * j + 1], p, high);
            }
        }
    }
    copy_wait<0>();

#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 query = q0 + warp * 16 + half * 8 + lane / 4;
        const float by = 1.0f / sum_of_lanes<4>(total[half]);
        if (query >= QUERIES) continue;
#pragma unroll
        for (u32 j = 0; j < WIDTH / 8; j++) {
            const u32 d = j * 8 + lane % 4 * 2;
            if (d >= DV) continue;
            const u32 at = batch * O_BATCH + head * O_HEAD + query * O_ROW + d;
            store2(o.output + at, finish(o, at, d, sums[j][2 * half] * by), finish(o, at + 1, d + 1, sums[j][2 * half + 1] * by));
        }
    }
}
