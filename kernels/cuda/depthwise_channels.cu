// A depthwise convolution of [images, height, width, channels], channels a multiple of those in 16 bytes: a thread computes STRIP outputs beside
// each other of that many channels. Filters are [KERNEL_Y, KERNEL_X, channels].
//
// Before this stands what stands before depthwise_planes.cu.
constexpr u32 WIDE = 16 / sizeof(Element);
constexpr u32 STRIPS = (OUT_W + STRIP - 1) / STRIP;
constexpr u32 COLUMNS = (STRIP - 1) * STRIDE_X + (KERNEL_X - 1) * DILATION_X + 1;

extern "C" __global__ void __launch_bounds__(128) ENTRY(const __grid_constant__ Operands o) {
    const u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i >= IMAGES * OUT_H * STRIPS * (CHANNELS / WIDE)) return;
    const u32 channel = i % (CHANNELS / WIDE) * WIDE, left = i / (CHANNELS / WIDE) % STRIPS * STRIP;
    const u32 row = i / (CHANNELS / WIDE * STRIPS) % OUT_H, image = i / (CHANNELS / WIDE * STRIPS * OUT_H);
    float sums[STRIP][WIDE];
#pragma unroll
    for (u32 p = 0; p < STRIP; p++)
#pragma unroll
        for (u32 e = 0; e < WIDE; e++) sums[p][e] = 0;
#pragma unroll
    for (u32 r = 0; r < KERNEL_Y; r++) {
        const u32 y = row * STRIDE_Y + r * DILATION_Y - PAD_Y;
        if (y >= IN_H) continue;
        float w[KERNEL_X][WIDE];
#pragma unroll
        for (u32 s = 0; s < KERNEL_X; s++) unpack(Element(), load16(o.w + (r * KERNEL_X + s) * CHANNELS + channel), w[s]);
#pragma unroll
        for (u32 column = 0; column < COLUMNS; column++) {
            const u32 at = left * STRIDE_X + column - PAD_X;
            float x[WIDE];
            if (at >= IN_W) continue;
            unpack(Element(), load16(o.x + ((image * IN_H + y) * IN_W + at) * CHANNELS + channel), x);
#pragma unroll
            for (u32 p = 0; p < STRIP; p++) {
                const u32 by = column - p * STRIDE_X;
                if (column >= p * STRIDE_X && by % DILATION_X == 0 && by / DILATION_X < KERNEL_X) {
#pragma unroll
                    for (u32 e = 0; e < WIDE; e++) sums[p][e] = fmaf(w[by / DILATION_X][e], x[e], sums[p][e]);
                }
            }
        }
    }
#pragma unroll
    for (u32 p = 0; p < STRIP; p++) {
        if (left + p >= OUT_W) break;
        const u32 at = ((image * OUT_H + row) * OUT_W + left + p) * CHANNELS + channel;
#pragma unroll
        for (u32 e = 0; e < WIDE; e++) sums[p][e] = finish(o, at + e, channel + e, sums[p][e]);
        store16(o.output + at, pack(Element(), sums[p]));
    }
}
