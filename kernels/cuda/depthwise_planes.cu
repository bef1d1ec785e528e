// A depthwise convolution of [images, channels, height, width]: a thread computes STRIP outputs below each other, its neighbours those beside
// them, so that a warp reads and writes whole lines. Filters are [channels, KERNEL_Y, KERNEL_X].
//
// Before this stand CHANNELS (of the result), EACH_CHANNEL (results of an input channel), IN_H, IN_W, OUT_H, OUT_W, KERNEL_Y, KERNEL_X,
// STRIDE_Y, STRIDE_X, DILATION_Y, DILATION_X, PAD_Y, PAD_X, IMAGES, STRIP, and `x_value(o, i)`.
constexpr u32 STRIPS = (OUT_H + STRIP - 1) / STRIP;
// Rows that a strip reads, where its outputs share them.
constexpr u32 ROWS = (STRIP - 1) * STRIDE_Y + (KERNEL_Y - 1) * DILATION_Y + 1;

extern "C" __global__ void __launch_bounds__(128) ENTRY(const __grid_constant__ Operands o) {
    const u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i >= IMAGES * CHANNELS * STRIPS * OUT_W) return;
    const u32 column = i % OUT_W, top = i / OUT_W % STRIPS * STRIP, plane = i / (OUT_W * STRIPS);
    const u32 channel = plane % CHANNELS, from = plane / CHANNELS * (CHANNELS / EACH_CHANNEL) + channel / EACH_CHANNEL;
    float w[KERNEL_Y][KERNEL_X];
#pragma unroll
    for (u32 r = 0; r < KERNEL_Y; r++)
#pragma unroll
        for (u32 s = 0; s < KERNEL_X; s++) w[r][s] = widen(o.w[(channel * KERNEL_Y + r) * KERNEL_X + s]);
    float sums[STRIP];
#pragma unroll
    for (u32 p = 0; p < STRIP; p++) sums[p] = 0;
#pragma unroll
    for (u32 row = 0; row < ROWS; row++) {
        // What lies above wraps around and is below the input.
        const u32 y = top * STRIDE_Y + row - PAD_Y;
        if (y >= IN_H) continue;
#pragma unroll
        for (u32 s = 0; s < KERNEL_X; s++) {
            const u32 at = column * STRIDE_X + s * DILATION_X - PAD_X;
            const float x = at < IN_W ? x_value(o, (from * IN_H + y) * IN_W + at) : 0.0f;
#pragma unroll
            for (u32 p = 0; p < STRIP; p++) {
                const u32 by = row - p * STRIDE_Y;
                if (row >= p * STRIDE_Y && by % DILATION_Y == 0 && by / DILATION_Y < KERNEL_Y) sums[p] = fmaf(w[by / DILATION_Y][s], x, sums[p]);
            }
        }
    }
#pragma unroll
    for (u32 p = 0; p < STRIP; p++) {
        const u32 at = (plane * OUT_H + top + p) * OUT_W + column;
        if (top + p < OUT_H) o.output[at] = narrow(Element(), finish(o, at, channel, sums[p]));
    }
}
