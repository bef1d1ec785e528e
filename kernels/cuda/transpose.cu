// [batch, ROWS, COLUMNS] as [batch, COLUMNS, ROWS], through tiles of 64 × 64 in shared memory whose rows are an odd number of banks apart.
//
// Before this stand ROWS, COLUMNS, BATCH, `From` and `Result`, and `x_value(o, i)`.
constexpr u32 TILE = 64;
constexpr u32 TILES_X = (COLUMNS + TILE - 1) / TILE;
constexpr u32 TILES_Y = (ROWS + TILE - 1) / TILE;

extern "C" __global__ void __launch_bounds__(256) ENTRY(const __grid_constant__ Operands o) {
    __shared__ float tile[TILE][TILE + 1];
    const u32 x0 = blockIdx.x % TILES_X * TILE, y0 = blockIdx.x / TILES_X % TILES_Y * TILE, batch = blockIdx.x / (TILES_X * TILES_Y);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Two neighbours a lane where they are aligned.
#pragma unroll
    for (u32 by = 0; by < TILE; by += 8) {
        const u32 y = y0 + warp + by;
        if (y >= ROWS) break;
        const u32 at = (batch * ROWS + y) * COLUMNS + x0;
        if constexpr (PAIRS_IN) {
            if (x0 + 2 * lane < COLUMNS) {
                float pair[2];
                load2(x_array(o) + at + 2 * lane, pair);
                tile[warp + by][2 * lane] = pair[0], tile[warp + by][2 * lane + 1] = pair[1];
            }
        } else {
#pragma unroll
            for (u32 part = 0; part < TILE; part += 32)
                if (x0 + part + lane < COLUMNS) tile[warp + by][part + lane] = x_value(o, at + part + lane);
        }
    }
    __syncthreads();
#pragma unroll
    for (u32 by = 0; by < TILE; by += 8) {
        const u32 x = x0 + warp + by;
        if (x >= COLUMNS) break;
        const u32 at = (batch * COLUMNS + x) * ROWS + y0;
        if constexpr (ROWS % 2 == 0) {
            if (y0 + 2 * lane < ROWS) {
                const float first = finish(o, at + 2 * lane, x, tile[2 * lane][warp + by]);
                store2(o.output + at + 2 * lane, first, finish(o, at + 2 * lane + 1, x, tile[2 * lane + 1][warp + by]));
            }
        } else {
#pragma unroll
            for (u32 part = 0; part < TILE; part += 32)
                if (y0 + part + lane < ROWS)
                    o.output[at + part + lane] = narrow(Result(), finish(o, at + part + lane, x, tile[part + lane][warp + by]));
        }
    }
}
