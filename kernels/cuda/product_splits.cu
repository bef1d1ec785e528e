// The second pass of a product whose k was split over blocks: the parts of each element of C, added in order.
extern "C" __global__ void __launch_bounds__(256) ENTRY_splits(const __grid_constant__ Operands o) {
    constexpr u32 COUNT = Z * M * N;
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= COUNT) return;
    Sum sum = 0;
#pragma unroll 8
    for (u32 split = 0; split < SPLITS; split++) sum += parts_of(o)[size_t(split) * COUNT + i];
    const u32 z = i / (M * N), m = i / N % M, n = i % N;
    const u32 at = result_place(z, m, n);
    output_array(o)[at] = narrow(Result(), finish_sum(o, at, channel_of(z, m, n), sum));
}
