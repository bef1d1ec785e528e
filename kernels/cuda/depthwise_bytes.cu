// A depthwise convolution of bytes, [images, height, width, channels], channels a multiple of 4: a thread computes STRIP outputs beside each other
// of four channels, exactly. Filters are [KERNEL_Y, KERNEL_X, channels], signed.
//
// Before this stands what stands before depthwise_planes.cu, and HAS_OUTSIDE: whether `x_outside(o)` points to four of what lies around
// pictures, if that is not zero.
constexpr u32 STRIPS = (OUT_W + STRIP - 1) / STRIP;
constexpr u32 COLUMNS = (STRIP - 1) * STRIDE_X + (KERNEL_X - 1) * DILATION_X + 1;

__device__ __forceinline__ void spread(i8, u32 word, i32 (&x)[4]) {
#pragma unroll
    for (u32 e = 0; e < 4; e++) x[e] = i32(i8(word >> 8 * e));
}
__device__ __forceinline__ void spread(u8, u32 word, i32 (&x)[4]) {
#pragma unroll
    for (u32 e = 0; e < 4; e++) x[e] = i32(u8(word >> 8 * e));
}

extern "C" __global__ void __launch_bounds__(128) ENTRY(const __grid_constant__ Operands o) {
    const u32 i = blockIdx.x * 128 + threadIdx.x;
    if (i >= IMAGES * OUT_H * STRIPS * (CHANNELS / 4)) return;
    const u32 channel = i % (CHANNELS / 4) * 4, left = i / (CHANNELS / 4) % STRIPS * STRIP;
    const u32 row = i / (CHANNELS / 4 * STRIPS) % OUT_H, image = i / (CHANNELS / 4 * STRIPS * OUT_H);
    const u32 outside = HAS_OUTSIDE ? *(const u32*)x_outside(o) : 0;
    i32 sums[STRIP][4];
#pragma unroll
    for (u32 p = 0; p < STRIP; p++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) sums[p][e] = 0;
#pragma unroll
    for (u32 r = 0; r < KERNEL_Y; r++) {
        const u32 y = row * STRIDE_Y + r * DILATION_Y - PAD_Y;
        if (!HAS_OUTSIDE && y >= IN_H) continue;
        i32 w[KERNEL_X][4];
#pragma unroll
        for (u32 s = 0; s < KERNEL_X; s++) spread(i8(), *(const u32*)(o.w + (r * KERNEL_X + s) * CHANNELS + channel), w[s]);
#pragma unroll
        for (u32 column = 0; column < COLUMNS; column++) {
            const u32 at = left * STRIDE_X + column - PAD_X;
            const bool inside = y < IN_H && at < IN_W;
            if (!HAS_OUTSIDE && !inside) continue;
            i32 x[4];
            spread(Element(), inside ? *(const u32*)(o.x + ((image * IN_H + y) * IN_W + at) * CHANNELS + channel) : outside, x);
#pragma unroll
            for (u32 p = 0; p < STRIP; p++) {
                const u32 by = column - p * STRIDE_X;
                if (column >= p * STRIDE_X && by % DILATION_X == 0 && by / DILATION_X < KERNEL_X) {
#pragma unroll
                    for (u32 e = 0; e < 4; e++) sums[p][e] += w[by / DILATION_X][e] * x[e];
                }
            }
        }
    }
#pragma unroll
    for (u32 p = 0; p < STRIP; p++) {
        if (left + p >= OUT_W) break;
        const u32 at = ((image * OUT_H + row) * OUT_W + left + p) * CHANNELS + channel;
#pragma unroll
        for (u32 e = 0; e < 4; e++) sums[p][e] = finish(o, at + e, channel + e, sums[p][e]);
        store4(o.output + at, sums[p]);
    }
}
