// LSTM, GRU and RNN over all steps of a sequence: a block for each sequence and direction, whose threads keep their rows of the recurrent matrix
// in registers where RESIDENT says that they fit, and else read them at every step, neighbours side by side.
//
// Before this stand HIDDEN, GATES, STEPS, BATCH, DIRECTIONS, THREADS, CELL, RESIDENT, and the caller's functions, as `cuda/recurrent.rs` lists
// them. The matrix is [directions, hidden, gates · hidden]: input 0.
constexpr u32 RNN = 0, GRU = 1, GRU_LINEAR = 2, LSTM = 3, LSTM_COUPLED = 4;
constexpr u32 ROWS = GATES * HIDDEN;
constexpr u32 DEPTH = (HIDDEN + 3) / 4 * 4;
constexpr u32 EACH = (ROWS + THREADS - 1) / THREADS;

// Row `row` of the matrix times a state in shared memory, in four sums.
template <u32 COUNT>
__device__ __forceinline__ float row_times(const float (&held)[COUNT], const float* matrix, u32 row, const float* state) {
    float sums[4] = {0, 0, 0, 0};
    if constexpr (RESIDENT) {
#pragma unroll
        for (u32 k = 0; k < DEPTH; k += 4) {
            const float4 x = *(const float4*)(state + k);
            sums[0] = fmaf(held[k], x.x, sums[0]), sums[1] = fmaf(held[k + 1], x.y, sums[1]);
            sums[2] = fmaf(held[k + 2], x.z, sums[2]), sums[3] = fmaf(held[k + 3], x.w, sums[3]);
        }
    } else {
#pragma unroll 4
        for (u32 k = 0; k < HIDDEN; k += 4)
#pragma unroll
            for (u32 by = 0; by < 4; by++)
                if (k + by < HIDDEN) sums[by] = fmaf(__ldg(matrix + (k + by) * ROWS + row), state[k + by], sums[by]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(const __grid_constant__ Operands o) {
    __shared__ __align__(16) float state[DEPTH], reset[DEPTH];
    __shared__ float cell[HIDDEN], products[ROWS];
    const u32 n = blockIdx.x, d = blockIdx.y, thread = threadIdx.x;
    const float* matrix = o.r + size_t(d) * HIDDEN * ROWS;
    const u32 length = length_of(o, n) < STEPS ? length_of(o, n) : STEPS;
    float held[RESIDENT ? DEPTH : 1];
    if constexpr (RESIDENT) {
#pragma unroll
        for (u32 k = 0; k < DEPTH; k++) held[k] = k < HIDDEN && thread < ROWS ? matrix[k * ROWS + thread] : 0.0f;
    }
    for (u32 j = thread; j < DEPTH; j += THREADS) {
        state[j] = j < HIDDEN ? initial(o, d, n, j) : 0.0f;
        reset[j] = 0;
        if (j < HIDDEN) cell[j] = initial_cell(o, d, n, j);
    }
    __syncthreads();
    for (u32 s = 0; s < length; s++) {
        const u32 t = is_reverse(d) ? length - 1 - s : s;
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            const u32 row = i * THREADS + thread;
            if (row >= ROWS || (CELL == GRU && row >= 2 * HIDDEN)) break;
            products[row] = recurrent_bias(o, d, row) + row_times(held, matrix, row, state);
        }
        __syncthreads();
        if constexpr (CELL == GRU) {
            for (u32 j = thread; j < HIDDEN; j += THREADS)
                reset[j] = activate0(gate(o, d, t, n, HIDDEN + j) + products[HIDDEN + j], d) * state[j];
            __syncthreads();
#pragma unroll
            for (u32 i = 0; i < EACH; i++) {
                const u32 row = i * THREADS + thread;
                if (row >= 2 * HIDDEN && row < ROWS) products[row] = recurrent_bias(o, d, row) + row_times(held, matrix, row, reset);
            }
            __syncthreads();
        }
        for (u32 j = thread; j < HIDDEN; j += THREADS) {
            const float before = state[j];
            float next;
            auto sum = [&](u32 of) { return gate(o, d, t, n, of * HIDDEN + j) + products[of * HIDDEN + j]; };
            if constexpr (CELL == RNN) {
                next = activate0(sum(0), d);
            } else if constexpr (CELL == GRU) {
                const float z = activate0(sum(0), d);
                next = (1.0f - z) * activate1(sum(2), d) + z * before;
            } else if constexpr (CELL == GRU_LINEAR) {
                const float z = activate0(sum(0), d), r = activate0(sum(1), d);
                const float c = activate1(fmaf(r, products[2 * HIDDEN + j], gate(o, d, t, n, 2 * HIDDEN + j)), d);
                next = (1.0f - z) * c + z * before;
            } else {
                // Gates are input, output, forget, cell; peepholes the first three.
                const float input = activate0(sum(0) + peephole(o, d, j) * cell[j], d);
                const float forget =
                    CELL == LSTM_COUPLED ? 1.0f - input : activate0(sum(2) + peephole(o, d, 2 * HIDDEN + j) * cell[j], d);
                const float value = forget * cell[j] + input * activate1(sum(3), d);
                next = activate0(sum(1) + peephole(o, d, HIDDEN + j) * value, d) * activate2(value, d);
                cell[j] = value;
            }
            state[j] = next;
            put(o, d, t, n, j, next);
        }
        __syncthreads();
    }
    // What lies behind a sequence's end is zero.
    for (u32 i = thread; i < (STEPS - length) * HIDDEN; i += THREADS) put(o, d, length + i / HIDDEN, n, i % HIDDEN, 0.0f);
    for (u32 j = thread; j < HIDDEN; j += THREADS) put_last(o, d, n, j, state[j], cell[j]);
}
