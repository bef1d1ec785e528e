// What every hand-made kernel stands on: numbers of 16 bits, 16-byte accesses, asynchronous copies, tensor cores, by inline PTX, so that the
// compiler needs no header of the toolkit. Under host.h the same functions follow the fragment layouts of the PTX manual on a processor.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

// Numbers of 16 bits as they lie in memory.
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

#define WARP 0xffffffffu
#define INFINITY_F32 __uint_as_float(0x7f800000u)

#ifndef CUTOVER_HOST

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

__device__ __forceinline__ float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ f16 narrow_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
// `low` in the lower half.
__device__ __forceinline__ u32 narrow2_f16(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return u32(narrow_f16(low).bits) | u32(narrow_f16(high).bits) << 16;
#endif
}

// The address of shared memory as instructions want it.
__device__ __forceinline__ u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }

// Copies `BYTES` of 4, 8 or 16 into shared memory: `valid` of them, and zeros behind.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, u32 valid) {
#if __CUDA_ARCH__ >= 800
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(valid) : "memory");
    }
#else
    if constexpr (BYTES == 16) {
        *(uint4*)to = valid == 16 ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
    } else if constexpr (BYTES == 8) {
        *(uint2*)to = valid == 8 ? *(const uint2*)from : make_uint2(0, 0);
    } else {
        *(u32*)to = valid == 4 ? *(const u32*)from : 0;
    }
#endif
}
// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the last `GROUPS` groups of this thread's copies are under way.
template <int GROUPS>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Four 8 × 8 matrices of 16-bit elements, whose rows of 16 bytes lie where lanes 8i ..= 8i + 7 say for matrix i: lane l gets elements 2(l % 4)
// and 2(l % 4) + 1 of row l / 4.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// As `load_matrices`, of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// D += A · B of a warp: A 16 × 16 by rows, B 16 × 8 by columns, sums in f32.
__device__ __forceinline__ void multiply_add(f16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void multiply_add(bf16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A 16 × 8, B 8 × 8 of f32 that were rounded to TF32.
__device__ __forceinline__ void multiply_add(float, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
// To the nearest TF32, ties away from zero.
__device__ __forceinline__ u32 round_tf32(u32 x) {
#if __CUDA_ARCH__ >= 800
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
#else
    return x;
#endif
}
// A 16 × 32, B 32 × 8 of bytes; both signed, or A unsigned. Sums are exact.
#define MULTIPLY_ADD_BYTES(A, NAME)                                                                                                       \
    __device__ __forceinline__ void multiply_add(A, i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {                                  \
        MULTIPLY_ADD_BYTES_BODY(NAME)                                                                                                     \
    }
#if __CUDA_ARCH__ >= 800
#define MULTIPLY_ADD_BYTES_BODY(NAME)                                                                                                     \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." NAME ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#define MULTIPLY_ADD_BYTES_BODY(NAME)                                                                                                     \
    for (int half = 0; half < 2; half++) {                                                                                                \
        for (int part = 0; part < 2; part++) {                                                                                            \
            asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." NAME ".s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"                           \
                         : "+r"(d[2 * half]), "+r"(d[2 * half + 1])                                                                       \
                         : "r"(a[half + 2 * part]), "r"(b[part]));                                                                        \
        }                                                                                                                                 \
    }
#endif
MULTIPLY_ADD_BYTES(i8, "s8")
MULTIPLY_ADD_BYTES(u8, "u8")

// 16 bytes that are read once, and 16 that are written.
__device__ __forceinline__ uint4 load16(const void* at) {
    uint4 x;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
    return x;
}
__device__ __forceinline__ void store16(void* at, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
// 2 to the power of x, within 2 units in the last place.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else

#define DYNAMIC_SHARED(name) unsigned char* name = host::dynamic_shared

static inline float widen(f16 x) {
    u32 sign = u32(x.bits >> 15) << 31, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * ldexpf(float(fraction), -24);
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
static inline f16 narrow_f16(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    float size = fabsf(x);
    if (x != x) return {u16(sign | 0x7e00)};
    if (size >= 65520.0f) return {u16(sign | 0x7c00)};
    if (size < 6.103515625e-05f) return {u16(sign | u32(nearbyintf(size * 16777216.0f)))};
    u32 rounded = (bits & 0x7fffffffu) + 0xfff + (bits >> 13 & 1);
    return {u16(sign | ((rounded >> 13) - (112 << 10)))};
}
static inline u32 narrow2_f16(float low, float high) { return u32(narrow_f16(low).bits) | u32(narrow_f16(high).bits) << 16; }

template <int BYTES>
static inline void copy_async(void* to, const void* from, u32 valid) {
    host::check_aligned(to, BYTES);
    host::check_aligned(from, BYTES);
    if (valid > BYTES) host::fail("a copy has more valid bytes than bytes");
    host::Copies& copies = host::fibers[host::current].copies;
    host::Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), BYTES, valid};
    if (host::copies_early) {
        host::do_copy(copy);
        return;
    }
    if (copies.count == host::Copies::MOST) host::fail("too many copies are under way");
    copies.queue[(copies.first + copies.count++) % host::Copies::MOST] = copy;
}
static inline void copy_commit() {
    host::Copies& copies = host::fibers[host::current].copies;
    if (host::copies_early) return;
    if (copies.count == host::Copies::MOST) host::fail("too many copies are under way");
    copies.queue[(copies.first + copies.count++) % host::Copies::MOST] = {nullptr, nullptr, 0, 0};
    copies.groups += 1;
}
template <int GROUPS>
static inline void copy_wait() {
    host::Copies& copies = host::fibers[host::current].copies;
    while (copies.groups > GROUPS) {
        host::Copy copy = copies.queue[copies.first % host::Copies::MOST];
        copies.first = (copies.first + 1) % host::Copies::MOST;
        copies.count -= 1;
        if (copy.bytes == 0)
            copies.groups -= 1;
        else
            host::do_copy(copy);
    }
}

namespace host {
struct MatrixSlot {
    union {
        const unsigned char* row;
        u16 result[8];
    };
    unsigned char rest[48];
};
template <bool TRANSPOSED>
static inline void matrices(u32 (&d)[4], const void* row) {
    check_aligned(row, 16);
    MatrixSlot slot;
    slot.row = static_cast<const unsigned char*>(row);
    MatrixSlot* all = meet(HOST_LOAD + TRANSPOSED * 16, slot, [](unsigned char(*slots)[64]) {
        MatrixSlot* all = reinterpret_cast<MatrixSlot*>(slots);
        u16 elements[4][8][8];
        unsigned banks[4] = {0, 0, 0, 0};
        for (int row = 0; row < 32; row++) {
            memcpy(elements[row / 8][row % 8], all[row].row, 16);
            banks[row / 8] |= 1u << (reinterpret_cast<uintptr_t>(all[row].row) / 16 % 8);
        }
        for (int matrix = 0; matrix < 4; matrix++)
            if (banks[matrix] != 255) fail("rows of a matrix lie in the same banks");
        for (int lane = 0; lane < 32; lane++)
            for (int at = 0; at < 8; at++) {
                int of = lane / 4, pair = lane % 4 * 2 + at % 2;
                all[lane].result[at] = TRANSPOSED ? elements[at / 2][pair][of] : elements[at / 2][of][pair];
            }
    });
    memcpy(d, all[lane()].result, 16);
}

// What lane l holds of A: rows l / 4 and l / 4 + 8, of each half of k the bytes 4(l % 4) ..= 4(l % 4) + 3. Of B: column l / 4, the same bytes.
// Of D: those rows, columns 2(l % 4) and 2(l % 4) + 1.
template <typename Sum>
struct ProductSlot {
    Sum d[4];
    u32 a[4], b[2];
    unsigned char rest[24];
};
template <typename A, typename B, typename Sum, typename ToA, typename ToB>
static inline void product(unsigned kind, Sum (&d)[4], const u32 (&a)[4], const u32 (&b)[2], ToA to_a, ToB to_b) {
    typedef ProductSlot<Sum> Slot;
    Slot slot;
    memcpy(slot.d, d, 16);
    memcpy(slot.a, a, 16);
    memcpy(slot.b, b, 8);
    Slot* all = meet(HOST_MATRIX + kind * 16, slot, [=](unsigned char(*slots)[64]) {
        const int EACH = 4 / sizeof(A), DEPTH = 8 * EACH;
        Slot* all = reinterpret_cast<Slot*>(slots);
        Sum left[16][32], right[8][32];
        for (int lane = 0; lane < 32; lane++)
            for (int part = 0; part < 4; part++)
                for (int e = 0; e < EACH; e++) {
                    A x;
                    memcpy(&x, reinterpret_cast<const char*>(&all[lane].a[part]) + e * sizeof(A), sizeof(A));
                    left[lane / 4 + part % 2 * 8][part / 2 * DEPTH / 2 + lane % 4 * EACH + e] = to_a(x);
                    if (part < 2) {
                        B y;
                        memcpy(&y, reinterpret_cast<const char*>(&all[lane].b[part]) + e * sizeof(B), sizeof(B));
                        right[lane / 4][part * DEPTH / 2 + lane % 4 * EACH + e] = to_b(y);
                    }
                }
        for (int lane = 0; lane < 32; lane++)
            for (int at = 0; at < 4; at++) {
                Sum sum = 0;
                for (int k = 0; k < DEPTH; k++) sum += left[lane / 4 + at / 2 * 8][k] * right[lane % 4 * 2 + at % 2][k];
                all[lane].d[at] += sum;
            }
    });
    memcpy(d, all[lane()].d, 16);
}
}  // namespace host

static inline void load_matrices(u32 (&d)[4], const void* row) { host::matrices<false>(d, row); }
static inline void load_matrices_transposed(u32 (&d)[4], const void* row) { host::matrices<true>(d, row); }
static inline void multiply_add(f16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    auto number = [](f16 x) { return widen(x); };
    host::product<f16, f16>(1, d, a, b, number, number);
}
static inline void multiply_add(bf16, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    auto number = [](bf16 x) { return __uint_as_float(u32(x.bits) << 16); };
    host::product<bf16, bf16>(2, d, a, b, number, number);
}
static inline void multiply_add(float, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    // A tensor core ignores what TF32 has not.
    auto number = [](u32 x) { return __uint_as_float(x & 0xffffe000u); };
    host::product<u32, u32>(3, d, a, b, number, number);
}
static inline void multiply_add(i8, i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    auto number = [](i8 x) { return i32(x); };
    host::product<i8, i8>(4, d, a, b, number, number);
}
static inline void multiply_add(u8, i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    host::product<u8, i8>(5, d, a, b, [](u8 x) { return i32(x); }, [](i8 x) { return i32(x); });
}
static inline u32 round_tf32(u32 x) { return (x & 0x7f800000u) == 0x7f800000u ? x : (x + 0x1000u) & 0xffffe000u; }
static inline uint4 load16(const void* at) {
    host::check_aligned(at, 16);
    return *static_cast<const uint4*>(at);
}
static inline void store16(void* at, uint4 x) {
    host::check_aligned(at, 16);
    *static_cast<uint4*>(at) = x;
}
static inline float exp2_fast(float x) { return exp2f(x); }

#endif

__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 narrow_bf16(float x) {
    u32 bits = __float_as_uint(x);
    u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    bf16 y;
    y.bits = u16((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
    return y;
}
__device__ __forceinline__ u32 narrow2_bf16(float low, float high) {
    return u32(narrow_bf16(low).bits) | u32(narrow_bf16(high).bits) << 16;
}

__device__ __forceinline__ u32 narrow2(f16, float low, float high) { return narrow2_f16(low, high); }
__device__ __forceinline__ u32 narrow2(bf16, float low, float high) { return narrow2_bf16(low, high); }

// `x` as an element of memory: the first argument only says of which type.
__device__ __forceinline__ float narrow(float, float x) { return x; }
__device__ __forceinline__ f16 narrow(f16, float x) { return narrow_f16(x); }
__device__ __forceinline__ bf16 narrow(bf16, float x) { return narrow_bf16(x); }
__device__ __forceinline__ i32 narrow(i32, i32 x) { return x; }
__device__ __forceinline__ i8 narrow(i8, i32 x) { return i8(x); }
__device__ __forceinline__ u8 narrow(u8, i32 x) { return u8(x); }
// Two neighbours at once; `at` is aligned to both.
__device__ __forceinline__ void store2(float* at, float x, float y) { *(float2*)at = make_float2(x, y); }
__device__ __forceinline__ void store2(f16* at, float x, float y) { *(u32*)at = narrow2_f16(x, y); }
__device__ __forceinline__ void store2(bf16* at, float x, float y) { *(u32*)at = narrow2_bf16(x, y); }
__device__ __forceinline__ void store2(i32* at, i32 x, i32 y) { *(uint2*)at = make_uint2(u32(x), u32(y)); }
__device__ __forceinline__ void store2(i8* at, i32 x, i32 y) { *(u16*)at = u16((x & 255) | (y & 255) << 8); }
__device__ __forceinline__ void store2(u8* at, i32 x, i32 y) { *(u16*)at = u16((x & 255) | (y & 255) << 8); }
__device__ __forceinline__ void load2(const float* at, float (&x)[2]) {
    const float2 both = *(const float2*)at;
    x[0] = both.x, x[1] = both.y;
}
template <typename T>
__device__ __forceinline__ void load2(const T* at, float (&x)[2]) {
    const u32 both = *(const u32*)at;
    T low, high;
    low.bits = u16(both), high.bits = u16(both >> 16);
    x[0] = widen(low), x[1] = widen(high);
}
// Four neighbours; `at` is aligned to all.
__device__ __forceinline__ void store4(float* at, const float (&x)[4]) { *(float4*)at = make_float4(x[0], x[1], x[2], x[3]); }
__device__ __forceinline__ void store4(f16* at, const float (&x)[4]) {
    *(uint2*)at = make_uint2(narrow2_f16(x[0], x[1]), narrow2_f16(x[2], x[3]));
}
__device__ __forceinline__ void store4(bf16* at, const float (&x)[4]) {
    *(uint2*)at = make_uint2(narrow2_bf16(x[0], x[1]), narrow2_bf16(x[2], x[3]));
}
__device__ __forceinline__ void store4(i32* at, const i32 (&x)[4]) { *(uint4*)at = make_uint4(u32(x[0]), u32(x[1]), u32(x[2]), u32(x[3])); }
__device__ __forceinline__ u32 bytes4(const i32 (&x)[4]) { return (x[0] & 255) | (x[1] & 255) << 8 | (x[2] & 255) << 16 | u32(x[3]) << 24; }
__device__ __forceinline__ void store4(i8* at, const i32 (&x)[4]) { *(u32*)at = bytes4(x); }
__device__ __forceinline__ void store4(u8* at, const i32 (&x)[4]) { *(u32*)at = bytes4(x); }
// 16 bytes as numbers: 4 of f32, 8 of 16 bits.
__device__ __forceinline__ void unpack(float, uint4 x, float (&y)[4]) {
    y[0] = __uint_as_float(x.x), y[1] = __uint_as_float(x.y), y[2] = __uint_as_float(x.z), y[3] = __uint_as_float(x.w);
}
template <typename T>
__device__ __forceinline__ void unpack_halves(uint4 x, float (&y)[8]) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        T low, high;
        low.bits = u16(words[i]), high.bits = u16(words[i] >> 16);
        y[2 * i] = widen(low), y[2 * i + 1] = widen(high);
    }
}
__device__ __forceinline__ void unpack(f16, uint4 x, float (&y)[8]) { unpack_halves<f16>(x, y); }
__device__ __forceinline__ void unpack(bf16, uint4 x, float (&y)[8]) { unpack_halves<bf16>(x, y); }
__device__ __forceinline__ uint4 pack(float, const float (&y)[4]) {
    return make_uint4(__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3]));
}
__device__ __forceinline__ uint4 pack(f16, const float (&y)[8]) {
    return make_uint4(narrow2_f16(y[0], y[1]), narrow2_f16(y[2], y[3]), narrow2_f16(y[4], y[5]), narrow2_f16(y[6], y[7]));
}
__device__ __forceinline__ uint4 pack(bf16, const float (&y)[8]) {
    return make_uint4(narrow2_bf16(y[0], y[1]), narrow2_bf16(y[2], y[3]), narrow2_bf16(y[4], y[5]), narrow2_bf16(y[6], y[7]));
}
// One element, or the elements of 16 bytes.
template <u32 COUNT, typename T>
__device__ __forceinline__ void load_run(const T* at, float (&x)[COUNT]) {
    if constexpr (COUNT == 1) {
        x[0] = widen(*at);
    } else {
        unpack(T(), load16(at), x);
    }
}
template <u32 COUNT, typename T>
__device__ __forceinline__ void store_run(T* at, const float (&x)[COUNT]) {
    if constexpr (COUNT == 1) {
        *at = narrow(T(), x[0]);
    } else {
        store16(at, pack(T(), x));
    }
}
// Among the 2^n lanes around.
template <int LANES>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int by = LANES / 2; by > 0; by /= 2) x += __shfl_xor_sync(WARP, x, by);
    return x;
}
template <int LANES>
__device__ __forceinline__ float max_of_lanes(float x) {
#pragma unroll
    for (int by = LANES / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(WARP, x, by));
    return x;
}
