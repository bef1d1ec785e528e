// libnvidia-ml as far as Cutover calls it, for machines without a GPU: one device, of the imitated one's name, that takes 100 watts. IMITATED_CUDA
// may hold `no-energy` (a device that counts none).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

enum Result { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };

int device, started = 0;

bool is_told(const char* name) {
    const char* all = getenv("IMITATED_CUDA");
    return all != nullptr && (std::string(",") + all + ",").find(std::string(",") + name + ",") != std::string::npos;
}

}  // namespace

extern "C" {

int nvmlInit_v2() {
    started++;
    return SUCCESS;
}
int nvmlShutdown() {
    if (started == 0) return UNINITIALIZED;
    started--;
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
    *count = 1;
    return started > 0 ? SUCCESS : UNINITIALIZED;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** to) {
    *to = &device;
    return index == 0 ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetName(void* of, char* name, unsigned length) {
    snprintf(name, length, "imitated CUDA device");
    return of == &device ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetTotalEnergyConsumption(void* of, unsigned long long* millijoules) {
    if (of != &device) return INVALID_ARGUMENT;
    if (is_told("no-energy")) return NOT_SUPPORTED;
    *millijoules = (unsigned long long)(1e5 * std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count());
    return SUCCESS;
}
}
