"""Stand-ins for CUDA's libraries, from which ONNX Runtime's CUDA provider starts on a machine without a GPU.

They allocate and copy host memory and launch nothing: enough to load a model, which assigns nodes to providers, and too
little to run one. Every function that the provider imports exists; those that are not in ``SOURCE`` return success.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

#: The libraries, and for those without versioned symbols what their functions are called.
LIBRARIES = {
    "libcudart.so.13": None,
    "libcublas.so.13": None,
    "libcublasLt.so.13": None,
    "libcurand.so.10": r"curand",
    "libcuda.so.1": r"cu[A-Z]",
}
#: Functions that have to do something, a line each.
SOURCE = """
int cudaMalloc(void** p, size_t n) { return posix_memalign(p, 256, n); }
int cudaMallocHost(void** p, size_t n) { return posix_memalign(p, 256, n); }
int cudaHostAlloc(void** p, size_t n, unsigned flags) { return posix_memalign(p, 256, n); }
int cudaFree(void* p) { free(p); return 0; }
int cudaFreeHost(void* p) { free(p); return 0; }
int cudaMemcpy(void* to, void const* from, size_t n, int kind) { memcpy(to, from, n); return 0; }
int cudaMemcpyAsync(void* to, void const* from, size_t n, int kind, void* stream) { memcpy(to, from, n); return 0; }
int cudaMemset(void* p, int x, size_t n) { memset(p, x, n); return 0; }
int cudaMemsetAsync(void* p, int x, size_t n, void* stream) { memset(p, x, n); return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
int cudaGetDeviceProperties(char* facts, int device) { memset(facts, 0, 700); return 0; }
int cudaDeviceGetAttribute(int* x, int which, int device) { *x = which == 75 ? 9 : which == 76 ? 0 : 128; return 0; }
int cudaMemGetInfo(size_t* unused, size_t* all) { *unused = *all = (size_t)1 << 36; return 0; }
int cudaRuntimeGetVersion(int* version) { *version = 13000; return 0; }
int cudaPointerGetAttributes(char* facts, void* p) { memset(facts, 0, 32); return 0; }
int cudaStreamCreate(void** stream) { *stream = malloc(1); return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { *stream = malloc(1); return 0; }
int cudaEventCreate(void** event) { *event = malloc(1); return 0; }
int cudaEventCreateWithFlags(void** event, unsigned flags) { *event = malloc(1); return 0; }
int cudaStreamIsCapturing(void* stream, int* status) { *status = 0; return 0; }
char const* cudaGetErrorString(int error) { return "stand-in"; }
char const* cudaGetErrorName(int error) { return "stand-in"; }
void** __cudaRegisterFatBinary(void* binary) { static void* handle; return &handle; }
int cublasCreate_v2(void** handle) { *handle = malloc(1); return 0; }
int cublasLtCreate(void** handle) { *handle = malloc(1); return 0; }
"""


def build(provider: Path, folder: Path) -> None:
    """Write the stand-ins that ``provider`` (libonnxruntime_providers_cuda.so) imports into ``folder``."""
    imported = defaultdict[str, set[str]](set)
    command = ["nm", "-D", "--undefined-only", str(provider)]
    for line in subprocess.check_output(command, text=True).splitlines():
        name, _, version = line.split()[-1].partition("@")
        imported[version].add(name)
    written = {m[1]: m[0] for m in re.finditer(r"^.*?(\w+)\(.*$", SOURCE, re.MULTILINE)}
    for library, pattern in LIBRARIES.items():
        versioned = pattern is None
        names = imported[library] if versioned else {n for n in imported[""] if re.match(pattern or "", n)}
        text = "#include <stdlib.h>\n#include <string.h>\n"
        text += "\n".join(written.get(n, f"int {n}(void) {{ return 0; }}") for n in sorted(names)) + "\n"
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text(text)
        script.write_text(f"{library} {{ global: *; }};\n")
        compile_it = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source]
        subprocess.run([*compile_it, *[f"-Wl,--version-script={script}"] * versioned], check=True)
