// What stands before and behind the products of a Winograd convolution of [images, channels, height, width] (Lavin and Gray 2015): windows of
// EDGE × EDGE pixels as EDGE² matrices of [channels, windows], and those of [out channels, windows] as TILE × TILE results each.
//
// Before this stand CHANNELS, OUT_CHANNELS, IMAGES, IN_H, IN_W, OUT_H, OUT_W, PAD_Y, PAD_X, TILE, EDGE = TILE + 2, the matrices `INPUT[EDGE][EDGE]`
// (Bᵀ) and `OUTPUT[TILE][EDGE]` (Aᵀ), V_BEGIN and M_BEGIN: where windows and sums begin in the workspace, and `x_value(o, i)`.
constexpr u32 WINDOWS_Y = (OUT_H + TILE - 1) / TILE;
constexpr u32 WINDOWS_X = (OUT_W + TILE - 1) / TILE;
constexpr u32 WINDOWS = IMAGES * WINDOWS_Y * WINDOWS_X;

extern "C" __global__ void __launch_bounds__(128) ENTRY_windows(const __grid_constant__ Operands o) {
    const u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i >= CHANNELS * WINDOWS) return;
    const u32 window = i % WINDOWS, channel = i / WINDOWS;
    const u32 left = window % WINDOWS_X * TILE, top = window / WINDOWS_X % WINDOWS_Y * TILE, image = window / (WINDOWS_X * WINDOWS_Y);
    float half[EDGE][EDGE];
    // Bᵀ · x, a column at a time.
#pragma unroll
    for (u32 s = 0; s < EDGE; s++) {
        float x[EDGE];
#pragma unroll
        for (u32 r = 0; r < EDGE; r++) {
            const u32 y = top + r - PAD_Y, at = left + s - PAD_X;
            x[r] = y < IN_H && at < IN_W ? x_value(o, ((image * CHANNELS + channel) * IN_H + y) * IN_W + at) : 0.0f;
        }
#pragma unroll
        for (u32 r = 0; r < EDGE; r++) {
            float sum = 0;
#pragma unroll
            for (u32 k = 0; k < EDGE; k++)
                if (INPUT[r][k] != 0.0f) sum = fmaf(INPUT[r][k], x[k], sum);
            half[r][s] = sum;
        }
    }
#pragma unroll
    for (u32 r = 0; r < EDGE; r++)
#pragma unroll
        for (u32 s = 0; s < EDGE; s++) {
            float sum = 0;
#pragma unroll
            for (u32 k = 0; k < EDGE; k++)
                if (INPUT[s][k] != 0.0f) sum = fmaf(INPUT[s][k], half[r][k], sum);
            o.workspace[V_BEGIN + ((r * EDGE + s) * CHANNELS + channel) * WINDOWS + window] = sum;
        }
}

extern "C" __global__ void __launch_bounds__(128) ENTRY_results(const __grid_constant__ Operands o) {
    const u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i >= OUT_CHANNELS * WINDOWS) return;
    const u32 window = i % WINDOWS, channel = i / WINDOWS;
    const u32 left = window % WINDOWS_X * TILE, top = window / WINDOWS_X % WINDOWS_Y * TILE, image = window / (WINDOWS_X * WINDOWS_Y);
    float half[TILE][EDGE];
#pragma unroll
    for (u32 s = 0; s < EDGE; s++) {
        float x[EDGE];
#pragma unroll
        for (u32 r = 0; r < EDGE; r++) x[r] = o.workspace[M_BEGIN + ((r * EDGE + s) * OUT_CHANNELS + channel) * WINDOWS + window];
#pragma unroll
        for (u32 r = 0; r < TILE; r++) {
            float sum = 0;
#pragma unroll
            for (u32 k = 0; k < EDGE; k++)
                if (OUTPUT[r][k] != 0.0f) sum = fmaf(OUTPUT[r][k], x[k], sum);
            half[r][s] = sum;
        }
    }
#pragma unroll
    for (u32 r = 0; r < TILE; r++)
#pragma unroll
        for (u32 s = 0; s < TILE; s++) {
            float sum = 0;
#pragma unroll
            for (u32 k = 0; k < EDGE; k++)
                if (OUTPUT[s][k] != 0.0f) sum = fmaf(OUTPUT[s][k], half[r][k], sum);
            const u32 at = ((image * OUT_CHANNELS + channel) * OUT_H + top + r) * OUT_W + left + s;
            if (top + r < OUT_H && left + s < OUT_W) o.output[at] = finish(o, at, channel, sum);
        }
}
