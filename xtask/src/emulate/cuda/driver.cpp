// libcuda as far as Cutover calls it, for machines without a GPU: one device, whose memory is the host's and whose kernels are what the
// imitated NVRTC made for the processor.
//
// Nothing that is asked of a stream happens before somebody waits, so that whoever relies on it earlier sees what was there. New memory is
// NaN, and an access beyond it stops the process. While a stream records, whatever CUDA forbids then is refused and spoils the recording.
// When the context goes with anything left on it, the process stops and says what. IMITATED_CUDA may hold, separated by commas:
// `driver:N` (the version told), `none` (no device), `no-graphs`, `memory:N` (bytes), `lost:N` (the Nth launch fails, and all after it).
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

const size_t PAGE = 64 << 10;

struct Module;

struct Function {
    Module* module;
    void* (*pack)(void**);
    void (*drop)(void*);
    void (*run)(const void*, const unsigned*, const unsigned*, unsigned, unsigned long long);
};

struct Module {
    void* library;
    std::map<std::string, Function> functions;
};

// When it is passed, in seconds; before that, 0.
struct Event {
    double time = 0;
    bool is_asked_for = false;
};

struct Operation {
    enum Kind { COPY, CLEAR, LAUNCH, CALL, MARK } kind;
    char* to = nullptr;
    const char* from = nullptr;
    size_t bytes = 0;
    Function* function = nullptr;
    Event* event = nullptr;
    // Of a library.
    void (*call)(void*) = nullptr;
    std::shared_ptr<void> arguments;
    unsigned grid[3], block[3], shared = 0;
};

struct Graph {
    std::vector<Operation> operations;
};

struct Stream {
    std::vector<Operation> waiting;
    std::unique_ptr<Graph> recording;
    bool is_spoilt = false;
};

std::recursive_mutex one;
thread_local void* current = nullptr;
// What this thread records, in the mode that forbids it alone what can't be recorded.
thread_local Stream* recorded = nullptr;

int contexts = 0;
int context;
bool is_lost = false;
unsigned long long launches = 0;
size_t device_bytes = 0;
std::map<char*, std::pair<size_t, size_t>> device_memory;  // address: bytes, bytes of the mapping
std::map<char*, size_t> host_memory;
std::set<Module*> modules;
std::set<Stream*> streams;
std::set<Graph*> graphs, instances;
std::set<Event*> events;

long long told(const char* name, long long otherwise) {
    const char* all = getenv("IMITATED_CUDA");
    if (all == nullptr) return otherwise;
    std::string text = std::string(",") + all + ",";
    std::string key = std::string(",") + name;
    size_t at = text.find(key + ":");
    if (at != std::string::npos) return atoll(text.c_str() + at + key.size() + 1);
    return text.find(key + ",") != std::string::npos ? 1 : otherwise;
}

size_t most() { return (size_t)told("memory", 8ll << 30); }

[[noreturn]] void fail(const char* why) {
    fprintf(stderr, "imitated CUDA: %s\n", why);
    fflush(stderr);
    _exit(4);
}

// What every call checks first.
Result check() {
    if (current == nullptr) return INVALID_CONTEXT;
    return is_lost ? LAUNCH_FAILED : SUCCESS;
}

// And what is forbidden while this thread records.
Result check_apart() {
    if (recorded != nullptr) {
        recorded->is_spoilt = true;
        return CAPTURE_UNSUPPORTED;
    }
    return check();
}

bool is_within(const std::map<char*, size_t>& memory, const char* at, size_t bytes) {
    auto after = memory.upper_bound(const_cast<char*>(at));
    if (after == memory.begin()) return false;
    auto of = std::prev(after);
    return at + bytes <= of->first + of->second;
}

bool is_on_device(const char* at, size_t bytes) {
    auto after = device_memory.upper_bound(const_cast<char*>(at));
    if (after == device_memory.begin()) return false;
    auto of = std::prev(after);
    return at + bytes <= of->first + of->second.first;
}

void run(std::vector<Operation>& operations) {
    std::vector<Operation> all = std::move(operations);
    operations.clear();
    for (Operation& operation : all) {
        if (is_lost) return;
        switch (operation.kind) {
            case Operation::COPY: memcpy(operation.to, operation.from, operation.bytes); break;
            case Operation::MARK: operation.event->time = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); break;
            case Operation::CLEAR: memset(operation.to, 0, operation.bytes); break;
            case Operation::LAUNCH:
            case Operation::CALL:
                launches++;
                if ((long long)launches == told("lost", -1)) {
                    is_lost = true;
                    return;
                }
                if (operation.kind == Operation::CALL) {
                    operation.call(operation.arguments.get());
                } else {
                    operation.function->run(operation.arguments.get(), operation.grid, operation.block, operation.shared, launches);
                }
        }
    }
}

void run_all() {
    for (Stream* stream : streams) run(stream->waiting);
}

Result enqueue(Stream* stream, Operation operation) {
    if (stream == nullptr || streams.count(stream) == 0) return INVALID_HANDLE;
    if (Result result = check()) return result;
    if (stream->recording) {
        stream->recording->operations.push_back(std::move(operation));
    } else {
        stream->waiting.push_back(std::move(operation));
    }
    return SUCCESS;
}

const std::map<int, int> ATTRIBUTES = {
    {1, 1024},     // threads of a block
    {8, 48 << 10}, // shared memory of a block
    {10, 32},      // lanes of a warp
    {13, 1000000}, // kHz
    {16, 4},       // multiprocessors
    {75, 9},       // compute capability
    {76, 0},
    {97, 227 << 10},
};

}  // namespace

#define LOCKED std::lock_guard<std::recursive_mutex> guard(one)

extern "C" {

int cuGetErrorName(int error, const char** name) {
    switch (error) {
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        default: *name = "CUDA_ERROR"; break;
    }
    return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : error == LAUNCH_FAILED ? "unspecified launch failure" : "an error";
    return SUCCESS;
}

int cuDriverGetVersion(int* version) {
    *version = (int)told("driver", 13000);
    return SUCCESS;
}
int cuInit(unsigned) { return told("none", 0) ? NO_DEVICE : SUCCESS; }
int cuDeviceGetCount(int* count) {
    *count = 1;
    return SUCCESS;
}
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}
int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, length, "imitated CUDA device");
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = most();
    return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    auto found = ATTRIBUTES.find(attribute);
    if (found == ATTRIBUTES.end()) return INVALID_VALUE;
    *value = found->second;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** result, int) {
    LOCKED;
    contexts++;
    *result = &context;
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) {
    LOCKED;
    if (--contexts > 0) return SUCCESS;
    run_all();
    if (!device_memory.empty()) fail("device memory is left on a context that goes");
    if (!host_memory.empty()) fail("pinned memory is left on a context that goes");
    if (!modules.empty()) fail("a module is left on a context that goes");
    if (!streams.empty()) fail("a stream is left on a context that goes");
    if (!events.empty()) fail("an event is left on a context that goes");
    if (!graphs.empty() || !instances.empty()) fail("a graph is left on a context that goes");
    is_lost = false;
    return SUCCESS;
}
int cuCtxSetCurrent(void* to) {
    current = to;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    LOCKED;
    if (Result result = check()) return result;
    *total = most();
    *free = most() - device_bytes;
    return SUCCESS;
}
int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
    LOCKED;
    if (Result result = check_apart()) return result;
    if (bytes == 0) return INVALID_VALUE;
    if (device_bytes + bytes > most()) return OUT_OF_MEMORY;
    size_t kept = (bytes + 255) / 256 * 256, size = (kept + PAGE - 1) / PAGE * PAGE;
    void* mapping = mmap(nullptr, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    char* begin = (char*)mapping + PAGE;
    mprotect(begin, size, PROT_READ | PROT_WRITE);
    char* at = begin + (size - kept);
    memset(at, 0xff, kept);
    device_memory[at] = {bytes, size};
    device_bytes += bytes;
    *address = (unsigned long long)at;
    return SUCCESS;
}
int cuMemFree_v2(unsigned long long address) {
    LOCKED;
    run_all();
    auto found = device_memory.find((char*)address);
    if (found == device_memory.end()) fail("device memory is freed that is not there");
    size_t kept = (found->second.first + 255) / 256 * 256;
    device_bytes -= found->second.first;
    munmap(found->first - (found->second.second - kept) - PAGE, found->second.second + 2 * PAGE);
    device_memory.erase(found);
    return is_lost ? LAUNCH_FAILED : SUCCESS;
}
int cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    LOCKED;
    if (Result result = check_apart()) return result;
    *address = malloc(bytes);
    memset(*address, 0xff, bytes);
    host_memory[(char*)*address] = bytes;
    return SUCCESS;
}
int cuMemFreeHost(void* address) {
    LOCKED;
    run_all();
    if (host_memory.erase((char*)address) == 0) fail("pinned memory is freed that is not there");
    free(address);
    return is_lost ? LAUNCH_FAILED : SUCCESS;
}

int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, Stream* stream) {
    LOCKED;
    if (!is_on_device((char*)to, bytes)) fail("a copy to what is no device memory");
    if (!is_within(host_memory, (const char*)from, bytes)) fail("a copy from memory that is not pinned, which is no copy in the background");
    Operation operation{Operation::COPY};
    operation.to = (char*)to, operation.from = (const char*)from, operation.bytes = bytes;
    return enqueue(stream, operation);
}
int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, Stream* stream) {
    LOCKED;
    if (!is_on_device((char*)from, bytes)) fail("a copy from what is no device memory");
    if (!is_within(host_memory, (char*)to, bytes)) fail("a copy to memory that is not pinned, which is no copy in the background");
    Operation operation{Operation::COPY};
    operation.to = (char*)to, operation.from = (const char*)from, operation.bytes = bytes;
    return enqueue(stream, operation);
}
int cuMemsetD8Async(unsigned long long at, unsigned char, size_t bytes, Stream* stream) {
    LOCKED;
    if (!is_on_device((char*)at, bytes)) fail("what is no device memory is cleared");
    Operation operation{Operation::CLEAR};
    operation.to = (char*)at, operation.bytes = bytes;
    return enqueue(stream, operation);
}

int cuModuleLoadData(Module** module, const void* image) {
    LOCKED;
    if (Result result = check_apart()) return result;
    void* library = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return INVALID_IMAGE;
    *module = new Module{library, {}};
    modules.insert(*module);
    return SUCCESS;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    LOCKED;
    if (Result result = check_apart()) return result;
    std::string of = name;
    Function found = {module, (void* (*)(void**))dlsym(module->library, (of + "_pack").c_str()),
                      (void (*)(void*))dlsym(module->library, (of + "_drop").c_str()),
                      (void (*)(const void*, const unsigned*, const unsigned*, unsigned, unsigned long long))dlsym(module->library, (of + "_run").c_str())};
    if (found.run == nullptr) return NOT_FOUND;
    *function = &(module->functions[of] = found);
    return SUCCESS;
}
int cuModuleUnload(Module* module) {
    LOCKED;
    for (Stream* stream : streams)
        for (const Operation& operation : stream->waiting)
            if (operation.function != nullptr && operation.function->module == module) fail("a module goes while its kernel is under way");
    if (modules.erase(module) == 0) fail("a module is unloaded that is not there");
    dlclose(module->library);
    delete module;
    return SUCCESS;
}
int cuFuncSetAttribute(Function*, int, int) { return check(); }

int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   Stream* stream, void** arguments, void**) {
    LOCKED;
    if (gx == 0 || gy == 0 || gz == 0 || gx > 2147483647u || gy > 65535 || gz > 65535) return INVALID_VALUE;
    if (bx * by * bz == 0 || bx * by * bz > 1024 || shared > 227 << 10) return INVALID_VALUE;
    Operation operation{Operation::LAUNCH};
    operation.function = function;
    operation.arguments = std::shared_ptr<void>(function->pack(arguments), function->drop);
    unsigned dimensions[6] = {gx, gy, gz, bx, by, bz};
    memcpy(operation.grid, dimensions, sizeof operation.grid);
    memcpy(operation.block, dimensions + 3, sizeof operation.block);
    operation.shared = shared;
    return enqueue(stream, operation);
}

// For imitated libraries: what they do in a stream's order, and whether it is on the device.
int imitated_enqueue(Stream* stream, void (*call)(void*), void (*drop)(void*), void* data) {
    LOCKED;
    Operation operation{Operation::CALL};
    operation.call = call;
    operation.arguments = std::shared_ptr<void>(data, drop);
    return enqueue(stream, operation);
}
bool imitated_is_on_device(const void* at, size_t bytes) {
    LOCKED;
    return is_on_device((const char*)at, bytes);
}

int cuStreamCreate(Stream** stream, unsigned flags) {
    LOCKED;
    if (Result result = check_apart()) return result;
    // Those that wait for stream 0 are nothing we ask for.
    if (flags != 1) return NOT_SUPPORTED;
    *stream = new Stream;
    streams.insert(*stream);
    return SUCCESS;
}
int cuStreamDestroy_v2(Stream* stream) {
    LOCKED;
    if (streams.erase(stream) == 0) fail("a stream is destroyed that is not there");
    run(stream->waiting);
    delete stream;
    return SUCCESS;
}
int cuStreamSynchronize(Stream* stream) {
    LOCKED;
    if (Result result = check()) return result;
    if (stream->recording) {
        stream->is_spoilt = true;
        return CAPTURE_UNSUPPORTED;
    }
    run(stream->waiting);
    return is_lost ? LAUNCH_FAILED : SUCCESS;
}

int cuEventCreate(Event** event, unsigned flags) {
    LOCKED;
    if (Result result = check_apart()) return result;
    // Those that time nothing are nothing we ask for.
    if (flags != 0) return NOT_SUPPORTED;
    *event = new Event;
    events.insert(*event);
    return SUCCESS;
}
int cuEventDestroy_v2(Event* event) {
    LOCKED;
    run_all();
    if (events.erase(event) == 0) fail("an event is destroyed that is not there");
    delete event;
    return SUCCESS;
}
int cuEventRecord(Event* event, Stream* stream) {
    LOCKED;
    if (events.count(event) == 0) return INVALID_HANDLE;
    // What is recorded tells no time afterwards.
    if (stream != nullptr && stream->recording) fail("an event is marked in a recording");
    event->time = 0, event->is_asked_for = true;
    Operation operation{Operation::MARK};
    operation.event = event;
    return enqueue(stream, operation);
}
int cuEventElapsedTime_v2(float* ms, Event* start, Event* end) {
    LOCKED;
    if (Result result = check()) return result;
    if (events.count(start) == 0 || events.count(end) == 0 || !start->is_asked_for || !end->is_asked_for) return INVALID_HANDLE;
    if (start->time == 0 || end->time == 0) return NOT_READY;
    *ms = (float)(1e3 * (end->time - start->time));
    return SUCCESS;
}

int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    LOCKED;
    if (Result result = check()) return result;
    if (told("no-graphs", 0)) return CAPTURE_UNSUPPORTED;
    // Of this thread alone.
    if (mode != 1) return NOT_SUPPORTED;
    stream->recording = std::make_unique<Graph>();
    stream->is_spoilt = false;
    recorded = stream;
    return SUCCESS;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
    LOCKED;
    *graph = nullptr;
    if (!stream->recording || recorded != stream) return INVALID_VALUE;
    recorded = nullptr;
    std::unique_ptr<Graph> made = std::move(stream->recording);
    if (stream->is_spoilt) return CAPTURE_INVALIDATED;
    *graph = made.release();
    graphs.insert(*graph);
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(Graph** instance, Graph* graph, unsigned long long) {
    LOCKED;
    if (Result result = check()) return result;
    *instance = new Graph(*graph);
    instances.insert(*instance);
    return SUCCESS;
}
int cuGraphDestroy(Graph* graph) {
    LOCKED;
    if (graphs.erase(graph) == 0) fail("a graph is destroyed that is not there");
    delete graph;
    return SUCCESS;
}
int cuGraphExecDestroy(Graph* instance) {
    LOCKED;
    if (instances.erase(instance) == 0) fail("an instance of a graph is destroyed that is not there");
    delete instance;
    return SUCCESS;
}
int cuGraphLaunch(Graph* instance, Stream* stream) {
    LOCKED;
    if (instances.count(instance) == 0) fail("a graph is launched that is not there");
    if (stream->recording) return CAPTURE_UNSUPPORTED;
    for (const Operation& operation : instance->operations)
        if (Result result = enqueue(stream, operation)) return result;
    return SUCCESS;
}
}
