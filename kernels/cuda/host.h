// CUDA C on a processor, for tests: with this header before them, kernels compile as C++ and run block by block.
//
// A thread is a fiber with a stack of its own. It runs until it meets a barrier or an operation of its warp, and goes on when all others have
// come there; which of them runs next is a permutation that the launch's seed decides, so a race shows as a difference between two seeds.
// Copies by `cp.async` happen as late as the program allows with an even seed, as soon as it allows with an odd one. Shared memory begins
// as NaN in every block. What no device would do is an error that says so: a barrier that not all reach, lanes that meet in different
// operations, an address that is not aligned; and so is a matrix whose rows lie in the same banks.
//
// Not imitated: how long anything takes, memory that threads of different blocks share within a launch, and the order of a tensor core's
// sums, which is nobody's promise.
#pragma once
#define CUTOVER_HOST 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// A variable of a block: one block runs at a time.
#define __shared__ static __attribute__((section("cutover_shared")))

extern "C" {
extern char __start_cutover_shared[] __attribute__((weak));
extern char __stop_cutover_shared[] __attribute__((weak));
}

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

namespace host {

[[noreturn]] static inline void fail(const char* why) {
    fprintf(stderr, "block %u,%u,%u thread %u,%u,%u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, why);
    fflush(stderr);
    _exit(3);
}

static inline void check_aligned(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("an address is not aligned");
}

// ---- fibers

static const size_t STACK_BYTES = 128 << 10;
static const unsigned MOST_THREADS = 1024;

#if defined(__x86_64__) || defined(__aarch64__)
// Saves what a call must keep on the stack, whose pointer goes to `*from`, and goes on where `to` was saved.
extern "C" void cutover_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.local cutover_switch
.type cutover_switch, @function
cutover_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cutover_switch, .-cutover_switch
)");
static const size_t SAVED_WORDS = 7;
static const size_t RETURN_WORD = 6;
#else
asm(R"(
.text
.local cutover_switch
.type cutover_switch, %function
cutover_switch:
    sub sp, sp, #176
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #176
    ret
.size cutover_switch, .-cutover_switch
)");
static const size_t SAVED_WORDS = 22;
static const size_t RETURN_WORD = 11;
#endif
struct Context {
    void* stack_pointer;
};
static inline void begin(Context& context, char* stack, void (*entry)()) {
    // `entry` begins as after a call: on x86-64 a word off a multiple of 16.
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
    void** saved = top - (SAVED_WORDS + SAVED_WORDS % 2);
    memset(saved, 0, SAVED_WORDS * sizeof(void*));
    saved[RETURN_WORD] = reinterpret_cast<void*>(entry);
    context.stack_pointer = saved;
}
static inline void change(Context& from, Context& to) { cutover_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
    ucontext_t context;
};
static inline void begin(Context& context, char* stack, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK_BYTES;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}
static inline void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// ---- a block

struct Copy {
    char* to;
    const char* from;
    unsigned bytes, valid;
};
// Copies that a thread has begun: `Copy::bytes` of 0 ends a group.
struct Copies {
    static const unsigned MOST = 512;
    Copy queue[MOST];
    unsigned first, count, groups;
};

enum State { RUNS, WAITS_FOR_BLOCK, WAITS_FOR_WARP, DONE };

struct Fiber {
    Context context;
    State state;
    dim3 index;
    unsigned step;  // operations of the warp it has come to
    Copies copies;
};

struct Warp {
    // Operands of an operation, and of the one before it, which lanes may still be reading the results of.
    alignas(16) unsigned char slots[2][32][64];
    unsigned kind, arrived;
};

static Fiber* fibers;
static char* stacks;
static Warp warps[MOST_THREADS / 32];
static Context scheduler;
static unsigned order[MOST_THREADS];
static unsigned count, current, block_arrived;
static bool copies_early;
static void (*kernel)(const void*);
static const void* arguments;
alignas(1024) static unsigned char dynamic_shared[256 << 10];
static std::mutex one_launch;

static inline unsigned lane() { return current % 32; }
static inline unsigned lanes_of_warp() { return count - current / 32 * 32 < 32 ? count - current / 32 * 32 : 32; }

static inline void yield() { change(fibers[current].context, scheduler); }

static inline void do_copy(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.valid);
    memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
}

static void fiber_main() {
    kernel(arguments);
    Fiber& self = fibers[current];
    self.state = DONE;
    yield();
    fail("a finished thread went on");
}

static inline void block_barrier() {
    block_arrived += 1;
    if (block_arrived == count) {
        block_arrived = 0;
        for (unsigned i = 0; i < count; i++)
            if (fibers[i].state == WAITS_FOR_BLOCK) fibers[i].state = RUNS;
        // Who came last waits like the others, so that it is not always the first to go on.
        yield();
        return;
    }
    fibers[current].state = WAITS_FOR_BLOCK;
    yield();
}

// Brings `mine` together with those of the other lanes. The last to come calls `complete` with all of them, which may write results into
// their places; every lane then gets the array.
template <typename T, typename Complete>
static inline T* meet(unsigned kind, const T& mine, Complete complete) {
    static_assert(sizeof(T) <= 64, "an operation of a warp has larger operands");
    Fiber& self = fibers[current];
    Warp& warp = warps[current / 32];
    unsigned char(*slots)[64] = warp.slots[self.step++ % 2];
    if (warp.arrived == 0) warp.kind = kind;
    if (warp.kind != kind) fail("lanes of a warp are in different operations");
    memcpy(slots[lane()], &mine, sizeof(T));
    warp.arrived += 1;
    if (warp.arrived == lanes_of_warp()) {
        warp.arrived = 0;
        complete(slots);
        unsigned first = current / 32 * 32;
        for (unsigned i = first; i < first + lanes_of_warp(); i++)
            if (fibers[i].state == WAITS_FOR_WARP) fibers[i].state = RUNS;
        yield();
    } else {
        self.state = WAITS_FOR_WARP;
        yield();
    }
    return reinterpret_cast<T*>(slots);
}

template <typename T>
static inline T from_lane(unsigned kind, T mine, unsigned source) {
    struct Slot {
        T value;
        unsigned char rest[64 - sizeof(T)];
    };
    Slot slot;
    slot.value = mine;
    Slot* all = meet(kind, slot, [](unsigned char(*)[64]) {});
    return source < lanes_of_warp() ? all[source].value : mine;
}

static inline uint64_t mix(uint64_t& state) {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void run_block() {
    memset(warps, 0, sizeof(Warp) * ((count + 31) / 32));
    block_arrived = 0;
    for (unsigned i = 0; i < count; i++) {
        Fiber& fiber = fibers[i];
        fiber.state = RUNS;
        fiber.step = 0;
        fiber.copies.first = fiber.copies.count = fiber.copies.groups = 0;
        fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        begin(fiber.context, stacks + i * STACK_BYTES, fiber_main);
    }
    for (unsigned done = 0; done < count;) {
        bool moved = false;
        for (unsigned at = 0; at < count; at++) {
            Fiber& fiber = fibers[order[at]];
            if (fiber.state != RUNS) continue;
            moved = true;
            current = order[at];
            threadIdx = fiber.index;
            change(scheduler, fiber.context);
            done += fiber.state == DONE;
        }
        if (!moved) fail("some threads wait for others that never come");
    }
}

// Runs `grid` blocks of `block` threads. Even seeds copy late, odd ones early; seed 0 runs threads in order.
static void launch(void (*with)(const void*), const void* of, dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed) {
    std::lock_guard<std::mutex> guard(one_launch);
    if (fibers == nullptr) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for stacks");
        stacks = static_cast<char*>(memory);
        fibers = static_cast<Fiber*>(calloc(MOST_THREADS, sizeof(Fiber)));
    }
    kernel = with;
    arguments = of;
    gridDim = grid;
    blockDim = block;
    count = block.x * block.y * block.z;
    if (count == 0 || count > MOST_THREADS) fail("a block has no threads, or more than 1024");
    if (shared_bytes > sizeof(dynamic_shared)) fail("more shared memory than a device has");
    copies_early = seed % 2 == 1;
    for (unsigned i = 0; i < count; i++) order[i] = i;
    uint64_t state = seed;
    for (unsigned i = count; seed != 0 && i > 1; i--) {
        unsigned other = mix(state) % i;
        unsigned kept = order[i - 1];
        order[i - 1] = order[other];
        order[other] = kept;
    }
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                memset(dynamic_shared, 0xff, shared_bytes);
                if (__start_cutover_shared) memset(__start_cutover_shared, 0xff, __stop_cutover_shared - __start_cutover_shared);
                run_block();
            }
}

}  // namespace host

// ---- what CUDA C has built in

#define __expf expf

enum HostOperation { HOST_SYNC = 1, HOST_SHUFFLE, HOST_VOTE, HOST_MATRIX, HOST_LOAD };

static inline void __syncthreads() { host::block_barrier(); }
static inline void __syncwarp(unsigned = 0xffffffffu) { host::from_lane<unsigned>(HOST_SYNC, 0, 0); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <typename T>
static inline T __shfl_sync(unsigned, T value, int source, int width = 32) {
    unsigned lane = host::lane();
    return host::from_lane(HOST_SHUFFLE, value, lane / width * width + source % width);
}
template <typename T>
static inline T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    unsigned lane = host::lane(), source = lane ^ mask;
    return host::from_lane(HOST_SHUFFLE, value, source / width > lane / width ? lane : source);
}
template <typename T>
static inline T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
    unsigned lane = host::lane();
    return host::from_lane(HOST_SHUFFLE, value, lane % width + by < unsigned(width) ? lane + by : lane);
}
template <typename T>
static inline T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
    unsigned lane = host::lane();
    return host::from_lane(HOST_SHUFFLE, value, lane % width >= by ? lane - by : lane);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned bits = 0;
    struct Slot {
        unsigned value;
        unsigned char rest[60];
    };
    Slot slot;
    slot.value = predicate != 0;
    Slot* all = host::meet(HOST_VOTE, slot, [](unsigned char(*)[64]) {});
    for (unsigned i = 0; i < host::lanes_of_warp(); i++) bits |= all[i].value << i;
    return bits;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <typename T>
static inline T __ldg(const T* at) {
    return *at;
}
template <typename To, typename From>
static inline To host_bits(From from) {
    To to;
    static_assert(sizeof(To) == sizeof(From), "");
    memcpy(&to, &from, sizeof(to));
    return to;
}
static inline unsigned __float_as_uint(float x) { return host_bits<unsigned>(x); }
static inline int __float_as_int(float x) { return host_bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return host_bits<float>(x); }
static inline float __int_as_float(int x) { return host_bits<float>(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
    return c;
}
#define HOST_MIN_MAX(T)                                     \
    static inline T min(T a, T b) { return b < a ? b : a; } \
    static inline T max(T a, T b) { return a < b ? b : a; }
HOST_MIN_MAX(int)
HOST_MIN_MAX(unsigned)
HOST_MIN_MAX(long long)
HOST_MIN_MAX(unsigned long long)
#undef HOST_MIN_MAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
template <typename T>
static inline T atomicAdd(T* at, T by) {
    T before = *at;
    *at = before + by;
    return before;
}
template <typename T>
static inline T atomicExch(T* at, T to) {
    T before = *at;
    *at = to;
    return before;
}
template <typename T>
static inline T atomicCAS(T* at, T expected, T to) {
    T before = *at;
    if (before == expected) *at = to;
    return before;
}
template <typename T>
static inline T atomicMin(T* at, T by) {
    T before = *at;
    if (by < before) *at = by;
    return before;
}
template <typename T>
static inline T atomicMax(T* at, T by) {
    T before = *at;
    if (before < by) *at = by;
    return before;
}

// Memory that ends where nothing may be read or written, for a buffer of `bytes`, aligned to 16: an access beyond its end by one chunk
// stops the process.
static inline char* host_guarded(size_t bytes) {
    const size_t PAGE = 64 << 10;
    size_t kept = (bytes + 15) / 16 * 16;
    size_t size = (kept + PAGE - 1) / PAGE * PAGE;
    void* memory = mmap(nullptr, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) host::fail("no memory for a buffer");
    char* begin = static_cast<char*>(memory) + PAGE;
    if (size > 0) mprotect(begin, size, PROT_READ | PROT_WRITE);
    return begin + (size - kept);
}
static inline void host_release(char* buffer, size_t bytes) {
    const size_t PAGE = 64 << 10;
    size_t kept = (bytes + 15) / 16 * 16;
    size_t size = (kept + PAGE - 1) / PAGE * PAGE;
    munmap(buffer - (size - kept) - PAGE, size + 2 * PAGE);
}
