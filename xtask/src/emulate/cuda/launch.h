// How an imitated driver gets at a kernel that was compiled for a processor: its arguments are copied when it is launched, as a driver
// does, and it runs later.
#pragma once
#include "host.h"
#include <tuple>

namespace imitated {

template <auto KERNEL>
struct Entry;

template <class... A, void (*KERNEL)(A...)>
struct Entry<KERNEL> {
    using Arguments = std::tuple<A...>;
    static void* pack(void** from) { return new Arguments{*static_cast<A*>(*from++)...}; }
    static void drop(void* packed) { delete static_cast<Arguments*>(packed); }
    static void thread(const void* packed) { std::apply(KERNEL, *static_cast<const Arguments*>(packed)); }
    static void run(const void* packed, const unsigned* grid, const unsigned* block, unsigned shared, unsigned long long seed) {
#ifdef CUTOVER_APART
        // Threads that never meet need no stacks.
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block[0], block[1], block[2]};
        for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++)
                    for (threadIdx.z = 0; threadIdx.z < block[2]; threadIdx.z++)
                        for (threadIdx.y = 0; threadIdx.y < block[1]; threadIdx.y++)
                            for (threadIdx.x = 0; threadIdx.x < block[0]; threadIdx.x++) thread(packed);
#else
        host::launch(thread, packed, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, seed);
#endif
    }
};

}  // namespace imitated

#define IMITATED_ENTRY(NAME)                                                                                             \
    extern "C" void* NAME##_pack(void** from) { return imitated::Entry<&NAME>::pack(from); }                            \
    extern "C" void NAME##_drop(void* packed) { imitated::Entry<&NAME>::drop(packed); }                                 \
    extern "C" void NAME##_run(const void* packed, const unsigned* grid, const unsigned* block, unsigned shared,        \
                               unsigned long long seed) {                                                               \
        imitated::Entry<&NAME>::run(packed, grid, block, shared, seed);                                                 \
    }
