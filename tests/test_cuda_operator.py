"""The operator for ONNX Runtime's CUDA provider: on host memory with the emulated kernels, and as it is compiled.

For the host it is registered for the CPU provider, so that ONNX Runtime runs it like any other kernel. Emulated kernels
are slow: a few steps of small shapes.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from less_export import testing
from less_export.cli import main as cli
from less_export.contract import LayerSpec
from less_export.errors import EngineError, UsageError
from less_export.native import nvcc, ort_cuda
from less_export.runtime import ort

from . import emulation
from .conftest import PLUGIN_ARCH
from .oracle import Arrays, layer_of
from .scenarios import Normal, follow, scenario
from .sharing import once
from .test_native_operator import bound, inputs_of, shorter
from .test_ops import empty, onnx_run, session_of, torch_run
from .test_plugin_build import Toolkit, toolkit  # noqa: F401  (a fixture)
from .tiny_decoder import CONTRACT

OPERATOR = Path(__file__).parents[1] / "ops_ort"
#: Chunks, decode steps and rows without tokens.
MIXED = [(5, 3, 0), (1, 1, 1), (12, 2, 7), (1, 0, 1), (0, 6, 1)]
DECODE = [(1, 1, 0), (1, 1, 1), (1, 0, 1)] * 3
VARIANTS = {
    "h2o": layer_of("h2o", 4, 3),
    "tova sliding": layer_of("tova", 6, 1, window=9),
    "sink": layer_of("sink", 2, 5),
    "window": layer_of("window", 0, 7, window=7),
    "full": layer_of("full", 0, 40),
    "h2o int8": layer_of("h2o", 4, 3, slot_dtype="int8"),
    "h2o 16": layer_of("h2o", 4, 3, slot_dtype="int8", state_bits=16),
    "h2o distance": layer_of("h2o", 4, 3, max_distance=6),
    "h2o distance 16": layer_of("h2o", 4, 3, slot_dtype="int8", state_bits=16, max_distance=6),
}


@functools.cache
def host_library() -> Path:
    """The operator's own sources, the emulated kernels and a CUDA runtime on host memory."""
    kernels = emulation.library()
    sources = [*OPERATOR.glob("cuda/*.cpp"), OPERATOR / "src/node.cpp", OPERATOR / "tests/host_cuda.cpp"]
    sources.append(emulation.PLUGIN / "src/library_facts.cpp")
    headers = [*OPERATOR.glob("cuda/*.h"), *OPERATOR.glob("src/*.h")]
    texts = [p.read_text() for p in sorted([*sources, *headers])]
    folder = emulation.compiled("operator", str(kernels), *texts)

    def make(out: Path) -> None:
        command = ["g++", "-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        command += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-DLESS_ORT_PROVIDER=nullptr"]
        command += ["-I", str(OPERATOR / "src"), "-I", str(emulation.PLUGIN / "include")]
        command += ["-isystem", str(emulation.cuda_include()), *map(str, sources), str(kernels)]
        command += ["-Wl,-Bsymbolic", f"-Wl,-rpath,{kernels.parent}", "-Wl,-z,nodelete", "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr

    return once(folder / "libless_ort_host.so", make)


@pytest.fixture
def runtime() -> Iterator[ctypes.CDLL]:
    """The CUDA runtime on host memory, which has nothing allocated before and after the test."""
    library = ctypes.CDLL(str(host_library()))
    assert library.host_allocated() == 0
    yield library
    library.host_capture(0)
    library.host_limit(-1)
    library.host_driver(0)
    assert library.host_allocated() == 0


@pytest.mark.parametrize("decode", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_operator_equals_the_oracle(runtime: ctypes.CDLL, name: str, half: bool, decode: bool) -> None:
    """Its errors are about those of the torch reference on the same data."""
    layer, dtype = VARIANTS[name], "float16" if half else "float32"
    steps = scenario(layer, DECODE if decode else MIXED, 0, Normal(rounded=emulation.rounded(dtype)))
    kind = emulation.DTYPES[dtype]
    reference = follow(torch_run(layer, dtype=kind), steps, empty(layer, kind))
    run = onnx_run(layer, half, host_library())
    for output, error in follow(run, steps, empty(layer, kind)).items():
        floor = 2e-3 if half and output == "out" else 1e-4 if layer.state16 and output in ("out", "h") else 5e-6
        assert error <= 2 * reference[output] + floor, (output, error, reference[output])
    assert runtime.host_allocated() > 0  # it is the operator that ran, not its body
    del run


@pytest.mark.parametrize("name", ["h2o", "h2o distance 16"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_in_place_is_the_same(runtime: ctypes.CDLL, name: str, half: bool) -> None:
    layer = VARIANTS[name]
    session = session_of(layer, half, host_library())
    kinds = {node.name: np.float16 if "float16" in node.type else None for node in session.get_inputs()}
    state = empty(layer)
    for step in scenario(layer, MIXED[:3], 3):
        arrays = inputs_of(session, step.inputs, state)
        arrays = {n: x.astype(kinds[n] or x.dtype) for n, x in arrays.items()}
        here, elsewhere = (bound(session, arrays, in_place) for in_place in (True, False))
        for output, x in here.items():
            assert x.tobytes() == elsewhere[output].tobytes(), output
        state = [here[f"present_{f.name}"] for f in layer.state_fields]
    del session


def first_step(layer: LayerSpec, session: onnxruntime.InferenceSession) -> Arrays:
    (step,) = scenario(layer, [(5, 3, 1)], 0)
    return inputs_of(session, step.inputs, empty(layer))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shorter("k", 2), "another shape"),
        (shorter("past_length", 0), "another shape"),
        (shorter("past_h_scale", 0), "another shape"),
        (lambda x: {**x, "rotary": x["rotary"][:, :1]}, "the table of angles"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    runtime: ctypes.CDLL, change: Callable[[Arrays], Arrays], reason: str
) -> None:
    layer = VARIANTS["h2o distance 16"]
    session = session_of(layer, library=host_library())
    arrays = change(first_step(layer, session))
    with pytest.raises(Exception, match=rf"LessAttention.*{reason}|Got invalid dimensions|INVALID_ARGUMENT"):
        session.run(None, arrays)
    assert runtime.host_allocated() == 0


def test_layers_that_the_kernels_do_not_know_are_refused(runtime: ctypes.CDLL) -> None:
    layer = replace(VARIANTS["h2o"], head_dim=12)
    session = session_of(layer, library=host_library())
    with pytest.raises(Exception, match="LessAttention: head_dim must be a multiple of 8 up to 256"):
        session.run(None, first_step(layer, session))
    assert runtime.host_allocated() == 0


# ------------------------------------------------------------------------------------------------------- memory


def test_layers_share_the_memory_of_a_stream(runtime: ctypes.CDLL) -> None:
    """Counters and a workspace for all of them; the larger one of a chunk besides. The last layer frees them."""
    layer = VARIANTS["h2o"]
    sessions = [session_of(layer, library=host_library()) for _ in range(2)]
    (chunk,) = scenario(layer, [(5, 3, 1)], 0)
    (token,) = scenario(layer, [(1, 1, 1)], 0)
    counts = []
    for step in (token, chunk, token):
        for session in sessions:
            session.run(None, inputs_of(session, step.inputs, empty(layer)))
            counts.append(runtime.host_allocated())
    assert counts[0] == counts[1] <= counts[2] == counts[-1] <= 3
    del session, sessions[0]
    assert runtime.host_allocated() == counts[-1]
    sessions.clear()


def test_a_capture_neither_allocates_nor_fails_once_a_step_has_run(runtime: ctypes.CDLL) -> None:
    layer = VARIANTS["h2o"]
    session = session_of(layer, library=host_library())
    arrays = first_step(layer, session)
    runtime.host_capture(1)
    with pytest.raises(Exception, match="LessAttention: a graph is captured before a step of this size has run"):
        session.run(None, arrays)
    runtime.host_capture(0)
    want = session.run(None, arrays)
    runtime.host_capture(1)
    for x, y in zip(session.run(None, arrays), want, strict=True):
        assert x.tobytes() == y.tobytes()
    del session


@pytest.mark.parametrize("allocations", [0, 1])
def test_without_memory(runtime: ctypes.CDLL, allocations: int) -> None:
    """One line, and the next step runs."""
    layer = VARIANTS["h2o"]
    session = session_of(layer, library=host_library())
    arrays = first_step(layer, session)
    runtime.host_limit(allocations)
    with pytest.raises(Exception, match="LessAttention: allocating a workspace: out of memory") as caught:
        session.run(None, arrays)
    assert len(str(caught.value).strip().splitlines()) == 1
    runtime.host_limit(-1)
    session.run(None, arrays)
    del session, caught  # which holds the session


def test_bfloat16(runtime: ctypes.CDLL) -> None:
    """ONNX Runtime's own nodes do not compute in it, the operator does."""
    layer = VARIANTS["h2o"]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(host_library()))
    model = testing.operator_model(layer, ir.DataType.BFLOAT16, (0, 0))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = {node.name: "bfloat16" in node.type for node in session.get_inputs()}
    assert kinds["q"]
    assert kinds["past_psi"]
    steps = scenario(layer, [(5, 3, 1)], 0, Normal(rounded=emulation.rounded("bfloat16")))
    arrays = inputs_of(session, steps[0].inputs, empty(layer, torch.bfloat16))
    (want, *_) = torch_run(layer, dtype=torch.bfloat16)([arrays[n] for n in kinds])
    binding = session.io_binding()
    for name, array in arrays.items():
        if kinds[name]:  # the upper halves of float32
            halves = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(halves, onnx.TensorProto.BFLOAT16)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
    out = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        np.zeros(arrays["q"].shape, np.uint16), onnx.TensorProto.BFLOAT16
    )
    binding.bind_ortvalue_output("out", out)
    for node in session.get_outputs()[1:]:
        binding.bind_output(node.name, "cpu")
    session.run_with_iobinding(binding)
    address = ctypes.cast(out.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    halves = np.ctypeslib.as_array(address, arrays["q"].shape)
    got = (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-2)
    del session, binding


# ------------------------------------------------------------------------------------------- choice and library


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "gpu_arch", lambda: None)
    with pytest.warns(
        RuntimeWarning, match="LessAttention runs as ONNX nodes, which is slower: no CUDA driver, or no GPU"
    ):
        assert ort._kernel(CONTRACT, "cuda", None) is None
    with pytest.raises(EngineError, match="no CUDA driver, or no GPU"):
        ort._kernel(CONTRACT, "cuda", "native")
    assert ort._kernel(CONTRACT, "cuda", "onnx") is None
    monkeypatch.setattr(nvcc, "gpu_arch", lambda: "sm_75")
    with pytest.raises(EngineError, match="the operator is for GPUs from sm_80 on, this one is sm_75"):
        ort._kernel(CONTRACT, "cuda", "native")


def test_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "gpu_arch", lambda: "sm_89")
    monkeypatch.setattr(nvcc, "places", lambda: iter([]))
    monkeypatch.setenv("LESS_EXPORT_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="which is slower: run less-export build-operator --cuda --gpu-arch sm_89"):
        assert ort._kernel(CONTRACT, "cuda", None) is None


def test_what_the_library_says(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is too old and layers that the kernels do not know leave the step to the nodes."""
    monkeypatch.setattr(ort_cuda, "library_for_this_gpu", host_library)
    for dtype in ("float32", "float16"):
        assert ort._kernel(replace(CONTRACT, dtype=dtype), "cuda", None) == host_library()
    wide = replace(CONTRACT, layers=(CONTRACT.layers[0], replace(CONTRACT.layers[1], head_dim=12)))
    assert ort._kernel(wide, "cuda", None) is None
    with pytest.raises(UsageError, match=r"cannot run this graph \(layer 1: head_dim must be a multiple of 8"):
        ort._kernel(wide, "cuda", "native")
    runtime.host_driver(10020)
    with pytest.warns(RuntimeWarning, match=r"which is slower: .* the driver supports CUDA up to 10\.2"):
        assert ort._kernel(CONTRACT, "cuda", None) is None
    with pytest.raises(EngineError, match=r"the driver supports CUDA up to 10\.2"):
        ort._kernel(CONTRACT, "cuda", "native")


def test_command(
    toolkit: Toolkit,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compiled once, from the kernels and the operator's own files, without TensorRT's headers."""
    log, out = toolkit(), tmp_path / "mine.so"
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    command = ["build-operator", "--cuda", "--gpu-arch", "sm_89"]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_text() == "compiled\n"
    lines = log.read_text().splitlines()
    files = [line.split(" -c ")[1].split()[0].split("/")[-1] for line in lines[:-1]]
    kernels = [n.split("/")[-1] for n in nvcc.listed("sources.txt") if n.endswith(".cu")]
    assert sorted(files) == sorted([*kernels, "library_facts.cpp", "memory.cpp", "node.cpp", "operator_cuda.cpp"])
    assert "-cudart=static" in lines[-1]
    assert not any(str(tmp_path) + " " in line.split(" -o ")[0] for line in lines)
    assert cli.main(command) == 0
    cached = Path(capsys.readouterr().out.strip())
    assert cached.is_relative_to(tmp_path / "cache" / "operators")
    assert cached.name == ort_cuda.LIBRARY
    assert log.read_text().splitlines() == lines
    for wrong in (["--gpu-arch", "sm_89"], ["--cuda", "--gpu-arch", "sm_75"]):
        assert cli.main(["build-operator", *wrong]) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("less-export: error: ")


def test_a_library_in_the_cache_needs_no_nvcc(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Whether it was built for the GPU or for all; what is not as it was stored is not taken."""
    toolkit()
    monkeypatch.setattr(nvcc, "gpu_arch", lambda: "sm_89")
    with pytest.raises(EngineError, match="run less-export build-operator --cuda --gpu-arch sm_89"):
        ort_cuda.library_for_this_gpu()
    every = ort_cuda.library()
    assert ort_cuda.library_for_this_gpu() == every
    own = ort_cuda.library(("sm_89",))
    assert ort_cuda.library_for_this_gpu() == own != every
    monkeypatch.setattr(nvcc, "places", lambda: iter([]))
    assert ort_cuda.library_for_this_gpu() == own
    own.write_text("another")
    assert ort_cuda.library_for_this_gpu() == every
    every.unlink()
    with pytest.raises(EngineError, match="the operator for CUDA needs nvcc"):
        ort_cuda.library()


@pytest.mark.exhaustive  # nvcc compiles the kernels for the plugin in every run
@pytest.mark.usefixtures("_cache")
def test_the_library_is_compiled_and_registered() -> None:
    """It needs neither a driver nor a library of CUDA's, and exports what is asked of it alone."""
    library = ort_cuda.library((PLUGIN_ARCH,))
    onnxruntime.SessionOptions().register_custom_ops_library(str(library))
    defined = subprocess.check_output(["nm", "-D", "--defined-only", library], text=True)
    own = {line.split()[-1] for line in defined.splitlines() if " T " in line}
    assert own == {"RegisterCustomOps", "lessWhyUnsupported", "lessWhyUnusable"}
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert not re.search(r"NEEDED.*\[lib(cuda|nv|onnxruntime)", needed)
    assert ort_cuda.why_layers_unsupported(library, CONTRACT) is None
    with pytest.raises(Exception, match="Could not find an implementation for LessAttention"):
        session_of(VARIANTS["h2o"], library=library)  # not for the CPU provider
