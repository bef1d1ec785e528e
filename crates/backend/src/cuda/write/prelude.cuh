// What WGSL defines and C leaves open, for kernels that were translated. Needs no header, so that NVRTC alone compiles it; a compiler for a
// processor takes it as well, where something else defines CUDA's words.

namespace cutover {

template <class T, int N> struct array { T v[N]; };
template <class T, int N> struct alignas(N == 3 ? sizeof(T) : N * sizeof(T)) vec { T v[N]; };

template <class To, class From> __device__ __forceinline__ To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &x, sizeof(To));
    return to;
}

// Binary16 as it lies in memory: computed with as float.
struct half_bits { unsigned short v; };
#ifdef CUTOVER_HOST
__device__ __forceinline__ float from_half(half_bits h) { return bits<_Float16>(h); }
__device__ __forceinline__ half_bits to_half(float x) { return bits<half_bits>((_Float16)x); }
__device__ __forceinline__ int dot_i8(unsigned a, unsigned b) {
    int sum = 0;
    for (int at = 0; at < 32; at += 8) sum += (int)(signed char)(a >> at) * (int)(signed char)(b >> at);
    return sum;
}
__device__ __forceinline__ unsigned dot_u8(unsigned a, unsigned b) {
    unsigned sum = 0;
    for (int at = 0; at < 32; at += 8) sum += (a >> at & 255u) * (b >> at & 255u);
    return sum;
}
__device__ __forceinline__ unsigned ones(unsigned x) { return (unsigned)__builtin_popcount(x); }
#else
__device__ __forceinline__ float from_half(half_bits h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.v));
    return x;
}
__device__ __forceinline__ half_bits to_half(float x) {
    half_bits h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.v) : "f"(x));
    return h;
}
__device__ __forceinline__ int dot_i8(unsigned a, unsigned b) { return __dp4a((int)a, (int)b, 0); }
__device__ __forceinline__ unsigned dot_u8(unsigned a, unsigned b) { return __dp4a(a, b, 0u); }
__device__ __forceinline__ unsigned ones(unsigned x) { return (unsigned)__popc(x); }
#endif

// An index, or the last one where it is beyond.
__device__ __forceinline__ unsigned within(unsigned i, unsigned count) { return i < count ? i : count - 1; }
__device__ __forceinline__ unsigned within(int i, unsigned count) { return within((unsigned)i, count); }

// Whole numbers wrap around.
template <class T> struct unsigned_of { typedef T type; };
template <> struct unsigned_of<int> { typedef unsigned type; };
template <> struct unsigned_of<long long> { typedef unsigned long long type; };
template <class T> __device__ __forceinline__ T sum(T a, T b) { typedef typename unsigned_of<T>::type U; return (T)((U)a + (U)b); }
template <class T> __device__ __forceinline__ T difference(T a, T b) { typedef typename unsigned_of<T>::type U; return (T)((U)a - (U)b); }
template <class T> __device__ __forceinline__ T product(T a, T b) { typedef typename unsigned_of<T>::type U; return (T)((U)a * (U)b); }
template <class T> __device__ __forceinline__ T negated(T a) { return difference((T)0, a); }
// Divided by 0 a number is itself and leaves nothing; so it is where the quotient has no place.
template <class T> __device__ __forceinline__ T quotient(T a, T b) {
    if (b == 0) return a;
    if ((T)-1 < 0 && b == (T)-1) return negated(a);
    return a / b;
}
template <class T> __device__ __forceinline__ T remainder(T a, T b) {
    if (b == 0 || ((T)-1 < 0 && b == (T)-1)) return 0;
    return a % b;
}
template <class T> __device__ __forceinline__ T shifted_left(T a, unsigned by) {
    typedef typename unsigned_of<T>::type U;
    return (T)((U)a << (by & (unsigned)(sizeof(T) * 8 - 1)));
}
template <class T> __device__ __forceinline__ T shifted_right(T a, unsigned by) { return a >> (by & (unsigned)(sizeof(T) * 8 - 1)); }

// Towards 0, and the nearest there is; 0 for what is no number.
template <class T> __device__ __forceinline__ T truncated(float x);
template <> __device__ __forceinline__ int truncated<int>(float x) {
    if (x != x) return 0;
    if (x >= 2147483648.0f) return 2147483647;
    if (x < -2147483648.0f) return -2147483647 - 1;
    return (int)x;
}
template <> __device__ __forceinline__ unsigned truncated<unsigned>(float x) {
    if (!(x > 0.0f)) return 0u;
    if (x >= 4294967296.0f) return 4294967295u;
    return (unsigned)x;
}
template <> __device__ __forceinline__ long long truncated<long long>(float x) {
    if (x != x) return 0;
    if (x >= 9223372036854775808.0f) return 9223372036854775807ll;
    if (x < -9223372036854775808.0f) return -9223372036854775807ll - 1;
    return (long long)x;
}
template <> __device__ __forceinline__ unsigned long long truncated<unsigned long long>(float x) {
    if (!(x > 0.0f)) return 0ull;
    if (x >= 18446744073709551616.0f) return 18446744073709551615ull;
    return (unsigned long long)x;
}

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ unsigned magnitude(unsigned x) { return x; }
__device__ __forceinline__ unsigned long long magnitude(unsigned long long x) { return x; }
template <class T> __device__ __forceinline__ T magnitude(T x) { return x < 0 ? negated(x) : x; }
__device__ __forceinline__ float least(float a, float b) { return fminf(a, b); }
template <class T> __device__ __forceinline__ T least(T a, T b) { return a < b ? a : b; }
__device__ __forceinline__ float greatest(float a, float b) { return fmaxf(a, b); }
template <class T> __device__ __forceinline__ T greatest(T a, T b) { return a > b ? a : b; }
template <class T> __device__ __forceinline__ T clamped(T x, T low, T high) { return least(greatest(x, low), high); }
__device__ __forceinline__ float saturated(float x) { return clamped(x, 0.0f, 1.0f); }
template <class T> __device__ __forceinline__ T sign(T x) { return x > 0 ? (T)1 : x < 0 ? (T)-1 : (T)0; }
__device__ __forceinline__ float fraction(float x) { return x - floorf(x); }
__device__ __forceinline__ float mixed(float a, float b, float t) { return a * (1.0f - t) + b * t; }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }

#define CUTOVER_EACH(OPERATOR) \
    template <class T, int N> __device__ __forceinline__ vec<T, N> operator OPERATOR(vec<T, N> a, vec<T, N> b) { \
        vec<T, N> y; \
        for (int at = 0; at < N; at++) y.v[at] = a.v[at] OPERATOR b.v[at]; \
        return y; \
    } \
    template <class T, int N> __device__ __forceinline__ vec<T, N> operator OPERATOR(vec<T, N> a, T b) { \
        vec<T, N> y; \
        for (int at = 0; at < N; at++) y.v[at] = a.v[at] OPERATOR b; \
        return y; \
    } \
    template <class T, int N> __device__ __forceinline__ vec<T, N> operator OPERATOR(T a, vec<T, N> b) { \
        vec<T, N> y; \
        for (int at = 0; at < N; at++) y.v[at] = a OPERATOR b.v[at]; \
        return y; \
    }
CUTOVER_EACH(+)
CUTOVER_EACH(-)
CUTOVER_EACH(*)
CUTOVER_EACH(/)
template <class T, int N> __device__ __forceinline__ vec<T, N> operator-(vec<T, N> a) {
    for (int at = 0; at < N; at++) a.v[at] = -a.v[at];
    return a;
}
template <int N> __device__ __forceinline__ vec<float, N> fused(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
    for (int at = 0; at < N; at++) c.v[at] = fmaf(a.v[at], b.v[at], c.v[at]);
    return c;
}
template <class T, int N> __device__ __forceinline__ vec<T, N> least(vec<T, N> a, vec<T, N> b) {
    for (int at = 0; at < N; at++) a.v[at] = least(a.v[at], b.v[at]);
    return a;
}
template <class T, int N> __device__ __forceinline__ vec<T, N> greatest(vec<T, N> a, vec<T, N> b) {
    for (int at = 0; at < N; at++) a.v[at] = greatest(a.v[at], b.v[at]);
    return a;
}
template <class T, int N> __device__ __forceinline__ vec<T, N> clamped(vec<T, N> a, vec<T, N> low, vec<T, N> high) { return least(greatest(a, low), high); }
template <class T, int N> __device__ __forceinline__ vec<T, N> magnitude(vec<T, N> a) {
    for (int at = 0; at < N; at++) a.v[at] = magnitude(a.v[at]);
    return a;
}
template <class T, int N> __device__ __forceinline__ T dot(vec<T, N> a, vec<T, N> b) {
    T sum = a.v[0] * b.v[0];
    for (int at = 1; at < N; at++) sum = sum + a.v[at] * b.v[at];
    return sum;
}
