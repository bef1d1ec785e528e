"""Compiles CUDA C with NVRTC, which needs no GPU: nvrtc.py LIBRARY FOLDER; every FOLDER/sm_NN-NAME.cu becomes a .ptx beside it.

Prints what the compiler says of each file, and exits with 1 if it refused any.
"""

import ctypes
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

library, folder = ctypes.CDLL(sys.argv[1]), pathlib.Path(sys.argv[2])


def text_of(program, size_function, function):
    size = ctypes.c_size_t()
    size_function(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    function(program, text)
    return text.value.decode()


def compile_one(path):
    target = path.with_suffix(".ptx")
    if target.exists() and target.stat().st_mtime > path.stat().st_mtime:
        return True
    options = ["--std=c++17", "--fmad=true", "--diag-suppress=177", "--gpu-architecture=" + path.name.split("-")[0].replace("sm_", "compute_")]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
    failed = library.nvrtcCompileProgram(program, len(options), array)
    log = text_of(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog).strip()
    if log:
        print(log, flush=True)
    if not failed:
        target.write_text(text_of(program, library.nvrtcGetPTXSize, library.nvrtcGetPTX))
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return not failed


with ThreadPoolExecutor(2) as pool:
    results = list(pool.map(compile_one, sorted(folder.glob("*.cu"))))
print(f"{sum(results)} of {len(results)} compiled")
sys.exit(not all(results))
