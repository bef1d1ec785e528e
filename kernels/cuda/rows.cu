// Softmax, normalisation and reduction of rows, each read once: THREADS a row, a warp or a block, which hold it in registers where HELD says that
// they can. Sums are of lanes and then of warps, in a fixed order.
//
// Before this stand ROWS, LENGTH, THREADS, EACH (elements of a row that a thread has), WIDE (neighbours that are read and written at once),
// FUNCTION (one of those below), EPSILON, and `x_value(o, i)`, or `x_array(o)` where WIDE is not 1.
constexpr u32 SOFTMAX = 0, LOG_SOFTMAX = 1, LAYER_NORM = 2, RMS_NORM = 3, SUM = 4, MEAN = 5, MAX = 6, MIN = 7;
constexpr u32 BLOCK_ROWS = THREADS == 32 ? 4 : 1;
constexpr u32 WARPS = THREADS / 32;

struct Larger {
    static constexpr bool IS_SUM = false;
};
struct Total {
    static constexpr bool IS_SUM = true;
};

// Of all threads of a row.
template <typename Of>
__device__ __forceinline__ float of_row(float x, float* parts) {
    x = Of::IS_SUM ? sum_of_lanes<32>(x) : max_of_lanes<32>(x);
    if constexpr (WARPS > 1) {
        const u32 lane = threadIdx.x % 32;
        __syncthreads();
        if (lane == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        x = parts[lane % WARPS];
        x = Of::IS_SUM ? sum_of_lanes<WARPS>(x) : max_of_lanes<WARPS>(x);
    }
    return x;
}

// Calls `with` with each element of a thread's: as held, or as `fetch` brings them once more.
template <typename Index, typename Fetch, typename With>
__device__ __forceinline__ void for_each(const float (&held)[HELD ? EACH : 1], Index index, Fetch fetch, With with) {
    if constexpr (HELD) {
#pragma unroll
        for (u32 e = 0; e < EACH; e++)
            if (index(e) < LENGTH) with(held[e]);
    } else {
        for (u32 e = 0; e < EACH && index(e) < LENGTH; e += WIDE) {
            float x[WIDE];
            fetch(e, x);
#pragma unroll
            for (u32 by = 0; by < WIDE; by++) with(x[by]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS* BLOCK_ROWS) ENTRY(const __grid_constant__ Operands o) {
    __shared__ float parts[32];
    const u32 row = blockIdx.x * BLOCK_ROWS + threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
    if (row >= ROWS) return;
    float held[HELD ? EACH : 1];
    auto index = [&](u32 e) { return (e / WIDE * THREADS + thread) * WIDE + e % WIDE; };
    auto fetch = [&](u32 e, float (&x)[WIDE]) {
        const u32 at = index(e);
        if (at >= LENGTH) return;
        if constexpr (WIDE > 1) {
            load_run(x_array(o) + row * LENGTH + at, x);
        } else {
            x[0] = x_value(o, row * LENGTH + at);
        }
    };
    if constexpr (HELD) {
#pragma unroll
        for (u32 e = 0; e < EACH; e += WIDE) {
            float x[WIDE];
#pragma unroll
            for (u32 by = 0; by < WIDE; by++) x[by] = 0;
            fetch(e, x);
#pragma unroll
            for (u32 by = 0; by < WIDE; by++) held[e + by] = x[by];
        }
    }
    float shift = 0, scale = 1, only = 0;
    if constexpr (FUNCTION == SOFTMAX || FUNCTION == LOG_SOFTMAX) {
        float largest = -INFINITY_F32, total = 0;
        for_each(held, index, fetch, [&](float x) { largest = fmaxf(largest, x); });
        shift = of_row<Larger>(largest, parts);
        for_each(held, index, fetch, [&](float x) { total += expf(x - shift); });
        total = of_row<Total>(total, parts);
        scale = FUNCTION == SOFTMAX ? 1.0f / total : logf(total);
    } else if constexpr (FUNCTION == LAYER_NORM || FUNCTION == RMS_NORM) {
        float total = 0;
        if constexpr (FUNCTION == LAYER_NORM) {
            for_each(held, index, fetch, [&](float x) { total += x; });
            shift = of_row<Total>(total, parts) / float(LENGTH);
            total = 0;
        }
        for_each(held, index, fetch, [&](float x) { total = fmaf(x - shift, x - shift, total); });
        scale = 1.0f / sqrtf(of_row<Total>(total, parts) / float(LENGTH) + EPSILON);
    } else if constexpr (FUNCTION == SUM || FUNCTION == MEAN) {
        for_each(held, index, fetch, [&](float x) { only += x; });
        only = of_row<Total>(only, parts);
        if constexpr (FUNCTION == MEAN) only = only / float(LENGTH);
    } else {
        const float sign = FUNCTION == MIN ? -1.0f : 1.0f;
        float largest = -INFINITY_F32, unordered = 0;
        for_each(held, index, fetch, [&](float x) { largest = fmaxf(largest, sign * x), unordered = x != x ? 1.0f : unordered; });
        largest = of_row<Larger>(largest, parts);
        unordered = of_row<Larger>(unordered, parts);
        only = unordered > 0.0f ? __uint_as_float(0x7fc00000u) : sign * largest;
    }

    if constexpr (FUNCTION >= SUM) {
        if (thread == 0) o.output[row] = narrow(Result(), finish(o, row, row, only));
    } else {
        auto result = [&](float x) {
            if constexpr (FUNCTION == SOFTMAX) return expf(x - shift) * scale;
            if constexpr (FUNCTION == LOG_SOFTMAX) return x - shift - scale;
            return (x - shift) * scale;
        };
        auto put = [&](u32 e, float (&x)[WIDE]) {
            const u32 at = index(e);
            if (at >= LENGTH) return;
#pragma unroll
            for (u32 by = 0; by < WIDE; by++) x[by] = finish(o, row * LENGTH + at + by, at + by, result(x[by]));
            store_run(o.output + row * LENGTH + at, x);
        };
        if constexpr (HELD) {
#pragma unroll
            for (u32 e = 0; e < EACH; e += WIDE) {
                float x[WIDE];
#pragma unroll
                for (u32 by = 0; by < WIDE; by++) x[by] = held[e + by];
                put(e, x);
            }
        } else {
            for (u32 e = 0; e < EACH; e += WIDE) {
                float x[WIDE];
                fetch(e, x);
                put(e, x);
            }
        }
    }
}
