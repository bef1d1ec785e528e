// libnvrtc as far as Cutover calls it, for machines without a GPU: kernels become shared objects for the processor, by the C++ compiler, and
// a "cubin" is the path of one. What was compiled once is kept in FOLDER.
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

#ifndef FOLDER
#error "FOLDER and HEADERS say where objects go and where launch.h and host.h are"
#endif

namespace {

enum Result { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, COMPILATION = 6 };

struct Program {
    std::string source, log, image;
};

const char* const FLAGS =
    "-std=c++17 -O1 -fPIC -w -march=native -ffp-contract=off -fno-strict-aliasing -fno-math-errno -I" HEADERS " -I" HOST_FOLDER;

std::string text_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

bool is_there(const std::string& path) {
    struct stat of;
    return stat(path.c_str(), &of) == 0;
}

unsigned long long hash(const std::string& text, unsigned long long state) {
    for (unsigned char c : text) state = (state ^ c) * 1099511628211ull;
    return state;
}

std::string own(const char* kind) {
    static int made = 0;
    return std::string(FOLDER) + "/" + std::to_string(getpid()) + "-" + std::to_string(made++) + kind;
}

int call(const std::string& command, std::string& log) {
    FILE* pipe = popen((command + " 2>&1").c_str(), "r");
    if (pipe == nullptr) return -1;
    char buffer[4096];
    while (size_t read = fread(buffer, 1, sizeof buffer, pipe)) log.append(buffer, read);
    return pclose(pipe);
}

std::string compiler() {
    const char* named = getenv("CXX");
    return named != nullptr ? named : "c++";
}

// The headers, compiled once for all kernels with these flags: the path of what includes them.
std::string header(bool apart, std::string& log) {
    std::string texts = text_of(HEADERS "/launch.h") + text_of(HOST_FOLDER "/host.h") + FLAGS + compiler() + (apart ? "apart" : "");
    char name[32];
    snprintf(name, sizeof name, "/h%016llx.h", hash(texts, 14695981039346656037ull));
    std::string path = FOLDER + std::string(name);
    if (is_there(path + ".gch")) return path;
    std::string part = own(".h");
    std::ofstream(part) << "#include \"launch.h\"\n";
    std::string compiled = own(".gch");
    std::string command = compiler() + " " + FLAGS + (apart ? " -DCUTOVER_APART" : "") + " -x c++-header -o " + compiled + " " + part;
    if (call(command, log) != 0) return "";
    rename(part.c_str(), path.c_str());
    rename(compiled.c_str(), (path + ".gch").c_str());
    return path;
}

// The names of the kernels in `source`.
std::set<std::string> entries(const std::string& source) {
    std::set<std::string> names;
    for (size_t at = 0; (at = source.find("__global__ void", at)) != std::string::npos;) {
        at += strlen("__global__ void");
        auto skip = [&] { while (at < source.size() && isspace((unsigned char)source[at])) at++; };
        skip();
        if (source.compare(at, 17, "__launch_bounds__") == 0) {
            at = source.find(')', at) + 1;
            skip();
        }
        size_t end = at;
        while (end < source.size() && (isalnum((unsigned char)source[end]) || source[end] == '_')) end++;
        if (end > at) names.insert(source.substr(at, end - at));
    }
    return names;
}

std::mutex one;

Result compile(Program& program) {
    std::lock_guard<std::mutex> guard(one);
    // Whoever waits for others does it by one of these.
    bool apart = program.source.find("__sync") == std::string::npos && program.source.find("_sync(") == std::string::npos &&
                 program.source.find("copy_async") == std::string::npos;
    std::string include = header(apart, program.log);
    if (include.empty()) return COMPILATION;
    std::string text = program.source + "\n";
    for (const std::string& name : entries(program.source)) text += "IMITATED_ENTRY(" + name + ")\n";
    char name[64];
    std::string all = include + text;
    snprintf(name, sizeof name, "/%016llx%016llx.so", hash(all, 14695981039346656037ull), hash(all, 1469598103934665603ull));
    program.image = FOLDER + std::string(name);
    // For whoever has NVIDIA's own compiler.
    std::string kept = program.image.substr(0, program.image.size() - 2) + "cu";
    if (!is_there(kept)) std::ofstream(kept) << program.source;
    if (is_there(program.image)) return SUCCESS;
    std::string source = own(".cpp"), object = own(".so");
    std::ofstream(source) << text;
    std::string command = compiler() + " " + FLAGS + (apart ? " -DCUTOVER_APART" : "") + " -include " + include + " -shared -o " + object + " " + source;
    int failed = call(command, program.log);
    remove(source.c_str());
    if (failed) return COMPILATION;
    rename(object.c_str(), program.image.c_str());
    return SUCCESS;
}

}  // namespace

extern "C" {

const char* nvrtcGetErrorString(int result) { return result == SUCCESS ? "no error" : "an error of the imitated NVRTC"; }

int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

static const int ARCHITECTURES[] = {75, 80, 86, 87, 89, 90, 100};
int nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof ARCHITECTURES / sizeof *ARCHITECTURES;
    return SUCCESS;
}
int nvrtcGetSupportedArchs(int* architectures) {
    memcpy(architectures, ARCHITECTURES, sizeof ARCHITECTURES);
    return SUCCESS;
}

int nvrtcCreateProgram(Program** program, const char* source, const char*, int headers, const char* const*, const char* const*) {
    if (headers != 0) return INVALID_INPUT;
    *program = new Program{source, "", ""};
    return SUCCESS;
}

int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

int nvrtcCompileProgram(Program* program, int, const char* const*) { return compile(*program); }

int nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return SUCCESS;
}
int nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->image.size();
    return program->image.empty() ? INVALID_PROGRAM : SUCCESS;
}
int nvrtcGetCUBIN(Program* program, char* image) {
    memcpy(image, program->image.data(), program->image.size());
    return SUCCESS;
}
int nvrtcGetPTXSize(Program* program, size_t* size) {
    *size = program->image.size() + 1;
    return program->image.empty() ? INVALID_PROGRAM : SUCCESS;
}
int nvrtcGetPTX(Program* program, char* text) {
    memcpy(text, program->image.c_str(), program->image.size() + 1);
    return SUCCESS;
}
}
