"""The plugin class through TensorRT's interfaces, on host memory, against the torch reference."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from less_export.contract import OP_NAME, PLUGIN_VERSION, LayerSpec, SlotDtype, StateBits
from less_export.exporter import onnx_op
from less_export.native import nvcc

from . import plugin_host
from .emulation import DTYPES, kernel_layer, normal
from .plugin_host import FIELDS, INPUTS, OUTPUTS, Plugin, describe, described, enqueue, harness, log, plugin_run
from .scenarios import follow, scenario
from .test_cuda import allowed
from .test_ops import empty, torch_run

pytestmark = pytest.mark.slow

LAYER = kernel_layer("h2o", 24, 64, 2, 8)
INT8 = replace(LAYER, slot_dtype="int8")
FAR = replace(LAYER, max_distance=100)
SMALL = replace(INT8, state_bits=16)
#: A layer with every field that a node may have.
ALL = replace(SMALL, max_distance=100)
#: What a layer's node does not say, as the plugin describes it.
ABSENT = {"slot_bits": 0, "state_bits": 32, "max_distance": 0, "rows_by_index": 0}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    log()
    yield
    harness().harness_driver(1)
    assert harness().harness_allocations() == 0, "device memory was not given back"
    assert log() == "", "a message that no test expected"


def refused(result: object, *says: str) -> None:
    """A refusal with a one-line message that holds ``says``."""
    message = log()
    assert result in (-1, None, 0, False)
    assert message.count("\n") == 1
    assert message.startswith(f"{OP_NAME}: ")
    assert all(w in message for w in says), message


def test_identity() -> None:
    plugin = Plugin.of(LAYER)
    name, version, space, metadata, *fields = plugin.texts()
    assert (name, version, space) == (OP_NAME, PLUGIN_VERSION, "")
    assert tuple(fields) == FIELDS == (*onnx_op.node_attributes(ALL), "rows_by_index")
    assert "heavy=12 recent=12" in metadata
    assert harness().creator_matches(ctypes.c_void_p(plugin.handle))


@pytest.mark.parametrize("integers", ["i32", "i64"])
@pytest.mark.parametrize("floats", ["f32", "f64"])
def test_fields_survive_serialisation(integers: str, floats: str) -> None:
    for layer in (LAYER, INT8, SMALL, FAR, ALL, kernel_layer("window", 9, 64, 1, 1), kernel_layer("sink", 9, 64, 1, 4)):
        plugin = Plugin.of(layer, integers, floats)
        again = plugin.round_trip()
        assert again.texts() == plugin.texts() == Plugin(plugin.call("clone")).texts()
        values = dict(x.split("=") for x in again.texts()[3].split())
        assert {n: float(v) for n, v in values.items()} == pytest.approx(
            {n: float(v) for n, v in (ABSENT | onnx_op.node_attributes(layer)).items()}, abs=1e-6
        )


def test_fields_that_are_refused() -> None:
    attributes = onnx_op.node_attributes(ALL) | {"rows_by_index": 1}
    good = [(n, v, "f32" if isinstance(v, float) else "i32") for n, v in attributes.items()]

    def with_field(name: str, value: float | None, kind: str) -> list[tuple[str, float | None, str]]:
        return [(n, value, kind) if n == name else (n, v, k) for n, v, k in good]

    def bad(fields: object, *says: str) -> None:
        refused(Plugin.create(fields).handle, *says)  # type: ignore[arg-type]

    for index, name in enumerate(FIELDS):
        if name != "decay" and name not in ABSENT:
            bad(good[:index] + good[index + 1 :], f"attribute {name} is missing")
        bad([*good, good[index]], f"attribute {name} is given twice")
        bad(with_field(name, None, good[index][2]), f"attribute {name} must have one value, not 0")
    bad([*good, ("plugin_version", 1, "i32")], "unknown attribute plugin_version")
    bad(with_field("policy", 0.0, "f32"), "attribute policy is not an integer")
    bad(with_field("scale", 1, "i32"), "attribute scale is not a finite float")
    bad(with_field("scale", float("nan"), "f32"), "attribute scale is not a finite float")
    bad(with_field("policy", 5, "i32"), "attribute policy must be 0 to 4")
    bad(with_field("absorb", 2, "i64"), "attribute absorb must be 0 or 1")
    bad(with_field("recent", 0, "i32"), "attribute recent must be at least 1")
    bad(with_field("heavy", -1, "i32"), "attribute heavy is -1, out of range")
    bad(with_field("max_distance", -1, "i32"), "attribute max_distance is -1, out of range")
    bad(with_field("heavy", 1 << 40, "i64"), "attribute heavy is 1099511627776, out of range")
    for decay in (0, -0.5, 1.5):
        bad(with_field("decay", decay, "f32"), "attribute decay must be above 0 and at most 1")
    for bits in (1, 4, 16):
        bad(with_field("slot_bits", bits, "i64"), "attribute slot_bits must be 0 or 8")
    for bits in (1, 8, 17):
        bad(with_field("state_bits", bits, "i64"), "attribute state_bits must be 16 or 32")
    bad(with_field("rows_by_index", 2, "i32"), "attribute rows_by_index must be 0 or 1")
    bad(with_field("slot_bits", 0, "i32"), "attribute state_bits is 16, which needs slot_bits 8 and absorb 1")
    bad(with_field("absorb", 0, "i32"), "attribute state_bits is 16, which needs slot_bits 8 and absorb 1")
    refused(harness().plugin_create(None, 0, 0), "no attributes")


def test_scores_of_version_1_never_fade() -> None:
    """Graphs and plans of the operator's first version have no decay."""
    fields = [(n, v, "f32" if n == "scale" else "i32") for n, v in LAYER.attributes().items() if n != "decay"]
    assert Plugin.create(fields).round_trip().texts() == Plugin.of(LAYER).texts()
    assert (
        Plugin.of(LAYER).texts()[3].endswith("decay=1.000000 slot_bits=0 state_bits=32 max_distance=0 rows_by_index=0")
    )


def test_state_bits_that_mean_32() -> None:
    fields = [(n, v, "f32" if isinstance(v, float) else "i32") for n, v in onnx_op.node_attributes(INT8).items()]
    for bits in (0, 32):
        assert Plugin.create([*fields, ("state_bits", bits, "i32")]).texts() == Plugin.of(INT8).texts()


@pytest.mark.parametrize("layer", [LAYER, INT8, FAR, SMALL, ALL], ids=["model", "int8", "distance", "16", "all"])
def test_outputs_follow_the_inputs(layer: LayerSpec) -> None:
    plugin, outputs = Plugin.of(layer), (10 if layer.int8 else OUTPUTS) + layer.state16
    inputs = (18 if layer.int8 else INPUTS) + layer.state16 + (layer.max_distance is not None)
    assert plugin.call("outputs") == outputs
    aliases = [*range(5, 4 + outputs), -1]
    assert [plugin.call("alias", i) for i in range(-1, outputs + 1)] == [-1, -1, *aliases]
    for dtype in DTYPES.values():
        all_ = described(layer, dtype, 3, 5)
        given = (ctypes.c_int32 * inputs)(*(t.type for t in all_[:inputs]))
        found = (ctypes.c_int32 * outputs)()
        assert plugin.call("output_types", given, inputs, found, outputs) == 0
        assert [*found] == [t.type for t in all_[inputs:]]
        array = (plugin_host.Tensor * inputs)(*all_[:inputs])
        made = (plugin_host.Tensor * outputs)()
        assert plugin.call("output_shapes", array, inputs, made, outputs) == 0
        assert [(t.rank, [*t.dims]) for t in made] == [(t.rank, [*t.dims]) for t in all_[inputs:]]
        for position in range(inputs + outputs):
            for kind in plugin_host.TYPES:
                for form in (0, 1):  # linear, and one that is not linear
                    trial = [*all_]
                    trial[position] = describe(kind, [*all_[position].dims][: all_[position].rank], form)
                    both = (plugin_host.Tensor * len(trial))(*trial)
                    takes = plugin.call("supports", position, both, inputs, outputs)
                    fits = kind in DTYPES.values() if position == 0 else trial[position].type == all_[position].type
                    assert takes == (fits and form == 0), (position, kind, form)
    takes = f"takes {inputs} inputs and has {outputs} outputs"
    refused(plugin.call("output_types", given, 13, found, outputs), f"{takes}, not 13 and {outputs}")
    refused(plugin.call("output_shapes", array, inputs, made, 7), f"{takes}, not {inputs} and 7")


@pytest.mark.parametrize("method", ["configure", "shape_change"])
def test_tensors_that_are_refused(method: str) -> None:
    plugin, good = Plugin.of(LAYER), described(LAYER, torch.float16, 3, 5)
    assert plugin.tensors(method, good) == 0

    def bad(index: int, dtype: torch.dtype, shape: list[int], *says: str, layer: Plugin = plugin) -> None:
        tensors = [*good]
        tensors[index] = describe(dtype, shape)
        refused(layer.tensors(method, tensors), *says)

    f16, f32, i32 = torch.float16, torch.float32, torch.int32
    bad(0, i32, [3, 4, 5, 64], "q is int32, but must be float16, bfloat16 or float32")
    bad(1, torch.bfloat16, [3, 2, 5, 64], "k is bfloat16, but must be float16")
    bad(3, f16, [3, 4, 5, 8], "log_phi_q is float16, but must be float32")
    bad(9, torch.int64, [3, 2, 24], "past_position is int64, but must be int32")
    bad(11, f16, [3, 2, 8], "past_z is float16, but must be float32")
    bad(2, f16, [3, 2, 6, 64], "v has shape [", "6,64]", "dimension 2 must be 5")
    bad(6, f16, [3, 2, 25, 64], "past_value has shape", "dimension 2 must be 24")
    bad(7, f16, [3, 2, 24, 4], "past_psi has shape", "dimension 3 must be 8")
    bad(10, f32, [3, 8, 64], "past_h has shape [", "but must have 4 dimensions")
    bad(13, i32, [2], "new_length has shape [2], but dimension 0 must be 3")
    bad(12, i32, [0], "past_length has shape [0], but dimension 0")
    refused(plugin.tensors(method, good, outputs=7), "not 15 and 7")
    refused(Plugin.of(INT8).tensors(method, good), "takes 18 inputs and has 10 outputs, not 12 and 10")
    odd = kernel_layer("h2o", 24, 60, 2, 8)
    refused(Plugin.of(odd).tensors(method, described(odd, f16, 3, 5)), "head_dim must be a multiple of 8")
    other = Plugin.of(kernel_layer("h2o", 26, 64, 2, 8))
    refused(other.tensors(method, good), "heavy + recent must equal the number of slots")


@pytest.mark.parametrize("method", ["configure", "shape_change"])
def test_tensors_of_int8_slots_that_are_refused(method: str) -> None:
    plugin, good = Plugin.of(INT8), described(INT8, torch.float16, 3, 5)
    assert plugin.tensors(method, good) == 0
    for index, dtype, shape, says in (
        (5, torch.float16, [3, 2, 24, 64], "past_key is float16, but must be int8"),
        (6, torch.int32, [3, 2, 24, 16], "past_value is int32, but must be int8"),
        (7, torch.int8, [3, 2, 24, 8], "past_psi is int8, but must be float16"),
        (12, torch.float16, [3, 2, 24], "past_key_scale is float16, but must be float32"),
        (13, torch.float32, [3, 2, 25], "past_value_scale has shape [3,2,25], but dimension 2 must be 24"),
        (14, torch.int32, [2], "past_length has shape [2], but dimension 0 must be 3"),
        (16, torch.float32, [1, 2, 64], "key_mean has shape [1,2,64], but must have 2 dimensions"),
        (17, torch.float32, [2, 32], "key_std has shape [2,32], but dimension 1 must be 64"),
    ):
        tensors = [*good]
        tensors[index] = describe(dtype, shape)
        refused(plugin.tensors(method, tensors), says)


@pytest.mark.parametrize("method", ["configure", "shape_change"])
def test_tensors_of_a_state_of_16_bits_that_are_refused(method: str) -> None:
    plugin, good = Plugin.of(SMALL), described(SMALL, torch.float16, 3, 5)
    assert plugin.tensors(method, good) == 0
    for index, dtype, shape, says in (
        (7, torch.float16, [3, 2, 24, 8], "past_psi is float16, but must be int8"),
        (10, torch.float32, [3, 2, 8, 64], "past_h is float32, but must be int8"),
        (10, torch.int8, [3, 2, 8, 64], "past_h has shape [3,2,8,64], but dimension 3 must be 128"),
        (10, torch.int8, [3, 2, 8, 127], "past_h has shape [3,2,8,127], but dimension 3 must be 128"),
        (14, torch.float16, [3, 2, 8], "past_h_scale is float16, but must be float32"),
        (14, torch.float32, [3, 2, 9], "past_h_scale has shape [3,2,9], but dimension 2 must be 8"),
        (15, torch.int32, [2], "past_length has shape [2], but dimension 0 must be 3"),
        (18, torch.float32, [2, 32], "key_std has shape [2,32], but dimension 1 must be 64"),
    ):
        tensors = [*good]
        tensors[index] = describe(dtype, shape)
        refused(plugin.tensors(method, tensors), says)
    refused(plugin.tensors(method, described(INT8, torch.float16, 3, 5)), "takes 19 inputs and has 11 outputs")


@pytest.mark.parametrize("method", ["configure", "shape_change"])
@pytest.mark.parametrize("layer", [FAR, ALL], ids=["distance", "all"])
def test_tables_that_are_refused(layer: LayerSpec, method: str) -> None:
    plugin, good = Plugin.of(layer), described(layer, torch.float16, 3, 5)
    assert plugin.tensors(method, good) == 0
    index = 19 if layer.int8 else 14
    for dtype, shape, says in (
        (torch.float16, [128, 64], "rotary is float16, but must be float32"),
        (torch.float32, [1, 128, 64], "rotary has shape [1,128,64], but must have 2 dimensions"),
        (torch.float32, [128, 66], "rotary must have 2 to head_dim columns"),
        (torch.float32, [128, 31], "rotary must have 2 to head_dim columns, an even number"),
        (torch.float32, [100, 64], "rotary must have more rows than the largest distance"),
    ):
        tensors = [*good]
        tensors[index] = describe(dtype, shape)
        refused(plugin.tensors(method, tensors), says)
    long = described(layer, torch.float16, 3, 129)
    refused(plugin.tensors(method, long), "rotary has 128 rows, but the chunk 129 tokens")
    refused(plugin.tensors(method, described(replace(layer, max_distance=None), torch.float16, 3, 5)), "takes ")


def test_workspace_covers_smaller_steps() -> None:
    plugin = Plugin.of(LAYER)
    sizes = {n: plugin.tensors("workspace", described(LAYER, torch.float16, *n)) for n in [(1, 1), (3, 1), (3, 70)]}
    assert 4096 <= sizes[1, 1] <= sizes[3, 1] <= sizes[3, 70]


@pytest.mark.parametrize("layer", [LAYER, INT8, ALL], ids=["model", "int8", "all"])
def test_enqueue_without_memory(layer: LayerSpec) -> None:
    plugin = Plugin.of(layer)
    tensors, kinds = described(layer, torch.float32, 1, 1), plugin_host.input_dtypes(layer, torch.float32)
    given = [torch.zeros([*t.dims][: t.rank], dtype=k) for t, k in zip(tensors, kinds, strict=False)]
    results = [torch.zeros_like(given[0]), *given[5 : 5 + len(layer.state_fields)]]
    for index in range(len(given)):
        refused(
            enqueue(plugin, tensors, [None if i == index else x for i, x in enumerate(given)], results, 1), "memory"
        )
    for index in range(len(results)):
        partly = [None if i == index else x for i, x in enumerate(results)]
        refused(enqueue(plugin, tensors, given, partly, 1), f"output {index} has no memory")
    refused(enqueue(plugin, tensors, given, results, None), "enqueue without workspace")


def check_accuracy(layer: LayerSpec, dtype: str, run: object) -> None:
    """Slots are exact, and errors at most twice those of the torch reference at the same precision."""
    steps = scenario(layer, [(70, 9), (1, 1), (1, 0), (1, 1), (30, 66), (0, 1), (1, 1)], 5, normal(dtype))
    fresh = empty(layer, DTYPES[dtype], len(steps[0].inputs["new_length"]))
    reference = follow(torch_run(layer, dtype=DTYPES[dtype]), steps, fresh)
    limits = allowed(layer, reference)
    for name, error in follow(run, steps, fresh).items():  # type: ignore[arg-type]
        assert error <= limits[name], (name, error, reference[name])


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(
    ("policy", "dtype", "in_place", "slots", "distance", "state_bits"),
    [
        ("h2o", "float16", True, "model", None, 32),
        ("tova", "bfloat16", True, "model", None, 32),
        ("sink", "float32", False, "model", None, 32),
        ("window", "float16", False, "model", None, 32),
        ("h2o", "bfloat16", True, "int8", None, 32),
        ("sink", "float16", False, "int8", None, 32),
        ("tova", "float16", False, "model", 40, 32),
        ("window", "bfloat16", True, "int8", 40, 32),
        ("h2o", "float16", True, "int8", None, 16),
        ("sink", "bfloat16", False, "int8", 40, 16),
    ],
)
def test_enqueue_is_the_operator(
    policy: str, dtype: str, in_place: bool, slots: SlotDtype, distance: int | None, state_bits: StateBits,
    attached: bool,
) -> None:  # fmt: skip
    """Prefill past the budget, decode, parked rows, more prefill; with its own counters and without.

    A hundred slots a head are spread over several blocks, which synchronise through the counters.
    """
    layer = kernel_layer(policy, 100, 64, 2, 1 if policy == "window" else 8)
    layer = replace(layer, slot_dtype=slots, max_distance=distance, state_bits=state_bits)
    made = Plugin.of(layer, "i64").round_trip()
    assert harness().harness_allocations() == 0  # nothing before attaching
    plugin = made.attach() if attached else made
    assert harness().harness_allocations() == attached
    check_accuracy(layer, dtype, plugin_run(plugin, layer, dtype, in_place))


def test_without_a_driver_it_attaches_all_the_same() -> None:
    """TensorRT-RTX attaches while it builds, on machines without a GPU, and crashes where that fails."""
    harness().harness_driver(0)
    plugin = Plugin.of(LAYER).attach()
    assert plugin.handle
    assert harness().harness_allocations() == 0
    check_accuracy(LAYER, "float16", plugin_run(plugin, LAYER, "float16"))


def test_a_driver_that_is_too_old_is_said() -> None:
    """No driver is no reason: engines are built without one."""
    try:
        harness().harness_driver_version(10020)
        said = nvcc.why_unusable(harness())
        harness().harness_driver_version(99000)
        assert nvcc.why_unusable(harness()) is None
    finally:
        harness().harness_driver_version(0)
    assert re.fullmatch(
        r"the driver supports CUDA up to 10\.2, and the kernels were built with CUDA \d+\.\d: "
        r"update the driver, or build them with an older CUDA",
        said or "",
    )
    assert nvcc.why_unusable(harness()) is None


def test_every_context_has_counters_of_its_own() -> None:
    made = Plugin.of(LAYER)
    copies = [made.attach() for _ in range(3)]
    again = copies[0].attach()
    assert harness().harness_allocations() == 4
    copies.clear()
    assert harness().harness_allocations() == 1
    del again
    assert harness().harness_allocations() == 0
