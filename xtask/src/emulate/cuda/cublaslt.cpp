// libcublasLt as far as Cutover calls it, for machines without a GPU: products of matrices that count columns first, computed on the processor
// in the order of the imitated driver's streams, their factors rounded to TF32 where that was asked for, and what its epilogues do to sums. Layouts that do not fit together or
// reach beyond device memory stop the process, as does a handle that goes with anything left. IMITATED_CUDA may hold `no-products` (no handle)
// and `refused-products` (the heuristics find nothing).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <mutex>
#include <string>
#include <unistd.h>

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, F16 = 2, BF16 = 14 };
enum Compute { COMPUTE_F32 = 68, COMPUTE_TF32 = 77 };
enum Epilogue { DEFAULT = 1, RELU = 2, BIAS = 4, GELU = 32 };

const uint64_t MAGIC = 0x6375744f76657221;
const size_t WORKSPACE = 4096;

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
    int32_t count = 1;
    int64_t stride = 0;
};

struct Operation {
    int compute, scale;
    int32_t transposed[2] = {0, 0};
    uint32_t epilogue = 1;
    uint64_t bias = 0;
};

struct Preference {
    uint64_t most = 0;
};

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};

std::mutex one;
long handles = 0, made = 0;

[[noreturn]] void fail(const char* why) {
    fprintf(stderr, "imitated cuBLASLt: %s\n", why);
    fflush(stderr);
    _exit(4);
}

bool is_told(const char* name) {
    const char* all = getenv("IMITATED_CUDA");
    return all != nullptr && (std::string(",") + all + ",").find(std::string(",") + name + ",") != std::string::npos;
}

// Of the imitated driver, which is loaded before.
template <typename F>
F* of_driver(const char* name) {
    void* driver = dlopen("libcuda.so", RTLD_NOW);
    void* found = driver == nullptr ? nullptr : dlsym(driver, name);
    if (found == nullptr) fail("there is no imitated driver");
    return (F*)found;
}

size_t size(int type) { return type == F32 ? 4 : 2; }

float at(const char* from, int type, int64_t i) {
    if (type == F32) return ((const float*)from)[i];
    if (type == F16) return (float)((const _Float16*)from)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)from)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

float tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x1000) & ~0x1fffu;
    memcpy(&x, &bits, 4);
    return x;
}

void put(char* to, int type, int64_t i, float x) {
    if (type == F32) {
        ((float*)to)[i] = x;
    } else if (type == F16) {
        ((_Float16*)to)[i] = (_Float16)x;
    } else {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        ((uint16_t*)to)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

uint64_t last(const Layout& of) { return (of.count - 1) * of.stride + (of.columns - 1) * of.leading + of.rows; }

// Whether the layouts are of one product, and one that there is something for.
Status check(const Operation& operation, const Layout& a, const Layout& b, const Layout& c) {
    const Layout* all[3] = {&a, &b, &c};
    for (const Layout* of : all) {
        if (of->leading < (int64_t)of->rows || of->rows == 0 || of->columns == 0) return INVALID_VALUE;
        if (of->count != c.count) return INVALID_VALUE;
    }
    const uint64_t m = operation.transposed[0] ? a.columns : a.rows, k = operation.transposed[0] ? a.rows : a.columns;
    const uint64_t other = operation.transposed[1] ? b.columns : b.rows, n = operation.transposed[1] ? b.rows : b.columns;
    if (m != c.rows || n != c.columns || k != other || a.type != b.type) return INVALID_VALUE;
    if (operation.compute == COMPUTE_TF32 && a.type != F32) return NOT_SUPPORTED;
    if (operation.scale != F32 || (operation.compute != COMPUTE_F32 && operation.compute != COMPUTE_TF32)) return NOT_SUPPORTED;
    if (c.type != F32 && c.type != a.type) return NOT_SUPPORTED;
    switch (operation.epilogue) {
        case DEFAULT:
        case RELU:
        case GELU:
        case BIAS:
        case BIAS | RELU:
        case BIAS | GELU: return SUCCESS;
        default: return NOT_SUPPORTED;
    }
}

float gelu(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }

template <typename T>
int create(T** to, T value) {
    std::lock_guard<std::mutex> guard(one);
    *to = new T(value);
    made++;
    return SUCCESS;
}

template <typename T>
int destroy(T* of) {
    std::lock_guard<std::mutex> guard(one);
    delete of;
    made--;
    return SUCCESS;
}

template <typename T>
int set(T& to, const void* from, size_t bytes) {
    if (bytes != sizeof(T)) return INVALID_VALUE;
    memcpy(&to, from, bytes);
    return SUCCESS;
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }

int cublasLtCreate(void** handle) {
    if (is_told("no-products")) return NOT_INITIALIZED;
    std::lock_guard<std::mutex> guard(one);
    handles++;
    *handle = &handles;
    return SUCCESS;
}
int cublasLtDestroy(void* handle) {
    std::lock_guard<std::mutex> guard(one);
    if (handle != &handles || handles == 0) fail("a handle is destroyed that is not there");
    if (--handles == 0 && made != 0) fail("a description is left where the last handle goes");
    return SUCCESS;
}

int cublasLtMatmulDescCreate(Operation** to, int compute, int scale) { return create(to, Operation{compute, scale}); }
int cublasLtMatmulDescDestroy(Operation* of) { return destroy(of); }
int cublasLtMatmulDescSetAttribute(Operation* of, int attribute, const void* from, size_t bytes) {
    switch (attribute) {
        case 3: return set(of->transposed[0], from, bytes);
        case 4: return set(of->transposed[1], from, bytes);
        case 7: return set(of->epilogue, from, bytes);
        case 8: return set(of->bias, from, bytes);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(Layout** to, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    return create(to, Layout{type, rows, columns, leading});
}
int cublasLtMatrixLayoutDestroy(Layout* of) { return destroy(of); }
int cublasLtMatrixLayoutSetAttribute(Layout* of, int attribute, const void* from, size_t bytes) {
    switch (attribute) {
        case 5: return set(of->count, from, bytes);
        case 6: return set(of->stride, from, bytes);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatmulPreferenceCreate(Preference** to) { return create(to, Preference{}); }
int cublasLtMatmulPreferenceDestroy(Preference* of) { return destroy(of); }
int cublasLtMatmulPreferenceSetAttribute(Preference* of, int attribute, const void* from, size_t bytes) {
    return attribute == 1 ? set(of->most, from, bytes) : (int)INVALID_VALUE;
}

int cublasLtMatmulAlgoGetHeuristic(void* handle, const Operation* operation, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
                                   const Preference* preference, int wanted, Heuristic* found, int* count) {
    if (handle != &handles || wanted < 1) return INVALID_VALUE;
    *count = 0;
    if (is_told("refused-products") || c != d || preference->most < WORKSPACE) return NOT_SUPPORTED;
    if (Status status = check(*operation, *a, *b, *c)) return status;
    *found = Heuristic{{{MAGIC}}, WORKSPACE, SUCCESS, 1.0f, {}};
    *count = 1;
    return SUCCESS;
}

int cublasLtMatmul(void* handle, const Operation* operation, const void* alpha, const void* a, const Layout* of_a, const void* b, const Layout* of_b,
                   const void* beta, const void* c, const Layout* of_c, void* d, const Layout* of_d, const Algorithm* algorithm, void* workspace,
                   size_t workspace_bytes, void* stream) {
    if (handle != &handles || algorithm->data[0] != MAGIC || workspace_bytes < WORKSPACE) return INVALID_VALUE;
    const float times = *(const float*)beta;
    if (of_c != of_d) return NOT_SUPPORTED;
    if (Status status = check(*operation, *of_a, *of_b, *of_d)) return status;
    auto* is_on_device = of_driver<bool(const void*, size_t)>("imitated_is_on_device");
    const bool has_bias = operation->epilogue & BIAS;
    if (!is_on_device(a, last(*of_a) * size(of_a->type)) || !is_on_device(b, last(*of_b) * size(of_b->type)) ||
        !is_on_device(d, last(*of_d) * size(of_d->type)) || (times != 0.0f && !is_on_device(c, last(*of_d) * size(of_d->type))) || !is_on_device(workspace, workspace_bytes) ||
        (has_bias && !is_on_device((const void*)operation->bias, of_d->rows * size(of_d->type))))
        fail("a product reaches beyond device memory");
    const Operation what = *operation;
    const Layout la = *of_a, lb = *of_b, ld = *of_d;
    const float scale = *(const float*)alpha;
    const char *from_a = (const char*)a, *from_b = (const char*)b;
    const char* from_c = (const char*)c;
    char* to = (char*)d;
    auto* run = new std::function<void()>([=] {
        const bool rounds = what.compute == COMPUTE_TF32;
        const uint64_t depth = what.transposed[0] ? la.rows : la.columns;
        for (int z = 0; z < ld.count; z++)
            for (uint64_t j = 0; j < ld.columns; j++)
                for (uint64_t i = 0; i < ld.rows; i++) {
                    float sum = 0;
                    for (uint64_t k = 0; k < depth; k++) {
                        float x = at(from_a, la.type, z * la.stride + (what.transposed[0] ? i * la.leading + k : k * la.leading + i));
                        float y = at(from_b, lb.type, z * lb.stride + (what.transposed[1] ? k * lb.leading + j : j * lb.leading + k));
                        sum += rounds ? tf32(x) * tf32(y) : x * y;
                    }
                    sum *= scale;
                    // What is not added is not read.
                    if (times != 0.0f) sum += times * at(from_c, ld.type, z * ld.stride + j * ld.leading + i);
                    if (has_bias) sum += at((const char*)what.bias, ld.type, i);
                    if (what.epilogue & RELU) sum = sum > 0 ? sum : 0;
                    if (what.epilogue & GELU) sum = gelu(sum);
                    put(to, ld.type, z * ld.stride + j * ld.leading + i, sum);
                }
    });
    auto* enqueue = of_driver<int(void*, void (*)(void*), void (*)(void*), void*)>("imitated_enqueue");
    return enqueue(
        stream, [](void* run) { (*(std::function<void()>*)run)(); }, [](void* run) { delete (std::function<void()>*)run; }, run);
}
}
