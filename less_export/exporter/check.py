"""The self-check of every export: a twin of the model, two layers of each kind at true width.

The twin has random weights, a small vocabulary, few experts and short windows, and is exported by the same code as
the real model. Its ONNX graph must agree with eager Hugging Face until the first eviction, well past every window,
and with the torch reference after that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..contract import Contract, LayerSpec, StateTensor, limits_distances
from ..errors import UsageError, ValidationError, install_hint
from ..hf import rotary, weights
from ..hf.compat import use_attention
from ..hf.config_layers import keep_layers, layer_kinds
from ..hf.decoder import LessDecoder, fresh_state, parameter_of
from ..hf.surgery import discover
from ..less import state16
from ..less.feature_maps import Kernels, random_kernels
from ..less.int8 import ONE_CODE
from . import fuse, onnx_op
from .bind import bind
from .trace import trace

_VOCAB, _WINDOW, _BUDGET, _EXPERTS = 256, 12, 32, 8
#: Names that configs use for the number of experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Tokens per step: chunks and single tokens, before and past window and budget.
_STEPS = (9, 14, 1, 1, 7, 16, 1, 1, 1, 1, 5)
#: Largest difference of logits, as a share of the largest logit; float32 rounding is a hundred times less.
TOLERANCE = 1e-4
#: The same against a model whose keys and values are not rounded to int8.
ROUNDED_TOLERANCE = 0.05


def require_runtime() -> None:
    """Raise :class:`UsageError` where the check cannot run."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        raise UsageError(f"checking the export needs ONNX Runtime: {install_hint('cpu')}, or --no-validate") from None


def self_check(hf_config: Any, contract: Contract, scratch: Path) -> float:
    """Export the twin and compare; returns the largest relative difference of its logits.

    Raises:
        ValidationError: the graph does not compute what the model computes.
        UsageError: ONNX Runtime is missing.
    """
    require_runtime()
    import onnxruntime

    config, indices = twin_config(hf_config, contract)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    twin, kernels = _twin_contract(model, contract, indices)
    folder = scratch / "twin"
    folder.mkdir()
    graph = twin_graph(model, config, twin, kernels, folder)
    ir.save(graph, folder / "twin.onnx")
    session = onnxruntime.InferenceSession(str(folder / "twin.onnx"), providers=["CPUExecutionProvider"])

    total = sum(_STEPS)
    ids = torch.randint(0, _VOCAB, (2, total), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    reference = LessDecoder(model, twin, kernels).eval()
    state = fresh_state(twin, 2)
    fed = [x.numpy() for x in state]
    past, worst = torch.zeros(2, dtype=torch.int32), 0.0
    unit = float(expected.abs().max())
    rounds = any(layer.int8 for layer in twin.layers)
    for count in _STEPS:
        done = int(past[0])
        new = torch.full((2,), count, dtype=torch.int32)
        chunk = ids[:, done : done + count]
        values = [chunk.numpy(), past.numpy(), new.numpy(), *fed]
        logits, *fed = session.run(None, dict(zip((s.name for s in twin.inputs()), values, strict=True)))
        with torch.no_grad():
            own, *state = reference(chunk, past, new, state)
        truths = [("the torch reference", own, TOLERANCE)]
        if done + count <= exact_length(twin):
            bound = ROUNDED_TOLERANCE if rounds and done else TOLERANCE
            truths.insert(0, ("eager Hugging Face", expected[:, done : done + count], bound))
        for name, truth, bound in truths:
            error = float(np.abs(logits - truth.numpy()).max()) / unit
            worst = max(worst, error) if bound == TOLERANCE else worst
            if not error <= bound:
                raise ValidationError(
                    f"the exported graph differs from {name} by {error:.1e} of the largest logit at tokens "
                    f"{done}..{done + count - 1} (at most {bound:.0e}): this model is not exported correctly"
                )
        if rounds:  # one code that another last bit rounds to its neighbour changes all later logits
            _compare_states(twin, fed, state)
            fed = [x.numpy() for x in state]
        past = past + new
    return worst


def _compare_states(twin: Contract, fed: list[Any], state: list[torch.Tensor]) -> None:
    """Raise :class:`ValidationError` unless the graph's state is the reference's; a few codes may differ by one."""
    specs = list(twin.state())
    ours, theirs = ({s.past.name: x for s, x in zip(specs, x, strict=True)} for x in (fed, [x.numpy() for x in state]))
    for spec in specs:
        got, want = (_read(twin, spec, x) for x in (ours, theirs))
        if "capacity" in spec.field.dims:
            filled = theirs[f"past.{spec.layer}.position"] >= 0
            got, want = got[filled], want[filled]
        error = np.abs(got.astype(np.float64) - want)
        if spec.dtype == "int8" and spec.field.name != "h":
            same = error.max(initial=0) <= 1 and np.count_nonzero(error) <= 1 + error.size // 100
        else:  # H moves by one code of a value that it absorbs
            coded = spec.field.name == "h" and twin.layers[spec.layer].int8
            bound = ONE_CODE if coded else TOLERANCE
            same = bool((error <= bound * max(np.abs(want).max(initial=0), 1)).all())
        if not same:
            raise ValidationError(
                f"the exported graph's {spec.present.name} differs from the torch reference's: this model is not "
                "exported correctly"
            )


def _read(twin: Contract, spec: StateTensor, state: Mapping[str, Any]) -> Any:
    """A tensor of the state, or the means that ``h`` of 16 bits stands for."""
    value = state[spec.past.name]
    if spec.field.name != "h" or not twin.layers[spec.layer].state16:
        return value
    return state16.absorbed(value, *(state[f"past.{spec.layer}.{name}"] for name in ("h_scale", "z")))


def exact_length(twin: Contract) -> int:
    """How many tokens the twin takes before it evicts one that the model would see, or sees one nearer than it is."""
    budgets = [s.capacity for s in twin.layers if s.policy.evicts]
    distances = [s.max_distance + 1 for s in twin.layers if s.max_distance is not None]
    return min([*budgets, *distances], default=sum(_STEPS))


def two_of_each_kind(hf_config: Any, contract: Contract) -> list[int]:
    """The first two layers of each kind: by attention, by config entries and by parameters.

    Some configs give a rule instead of a list (the first few layers dense, every second one with experts). Such a rule
    counts from layer 0, so all layers before the last one of the list are included too.
    """
    kinds: dict[Any, list[int]] = {}
    stated = layer_kinds(hf_config.get_text_config())
    built = _built(weights.bare_model(hf_config, torch.float32), len(stated))
    for index, (layer, statement, parts) in enumerate(zip(contract.layers, stated, built, strict=True)):
        kind = bool(layer.window), layer.head_dim, layer.kv_heads, layer.absorb, statement, parts
        kinds.setdefault(kind, []).append(index)
    indices = sorted(i for same in kinds.values() for i in same[:2])
    listed = len(set(zip(stated, built, strict=True))) == len(set(stated))
    return indices if listed else list(range(indices[-1] + 1))


def _built(model: PreTrainedModel, count: int) -> list[str]:
    """Names and shapes of each layer's parameters; equal strings mean equal layers."""
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    layers = next(stacks, nn.ModuleList(nn.Identity() for _ in range(count)))
    return [repr([(n, tuple(p.shape)) for n, p in layer.named_parameters()]) for layer in layers]


def twin_config(hf_config: Any, contract: Contract) -> tuple[Any, list[int]]:
    """A config with two layers of each kind, and their indices in the model."""
    config = copy.deepcopy(hf_config)
    text = config.get_text_config()
    indices = two_of_each_kind(config, contract)
    keep_layers(text, indices)
    text.vocab_size = _VOCAB
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = _VOCAB
    used = getattr(text, "num_experts_per_tok", None)
    for name in _EXPERT_COUNTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and isinstance(used, int) and getattr(text, "n_group", None) in (None, 1):
            setattr(text, name, min(count, max(used, _EXPERTS)))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    if getattr(text, "sliding_window", None):
        text.sliding_window = _WINDOW
    if hasattr(text, "initializer_range"):  # activations keep their size, so that attention matters
        text.initializer_range = text.hidden_size**-0.5
    use_attention(config, "eager")
    return config, indices


def _twin_contract(model: PreTrainedModel, contract: Contract, indices: list[int]) -> tuple[Contract, Kernels]:
    """The contract of the twin: the same policies with a small budget, random kernels where there are any."""
    attention = discover(model)
    heads = [x.heads for x in attention]
    absorbing = [i for i, index in enumerate(indices) if contract.layers[index].absorb]
    rank = next((contract.layers[indices[i]].rank for i in absorbing), 1)
    kernels = random_kernels(heads, absorbing, rank, 8) if absorbing else Kernels({}, {})
    layers: list[LayerSpec] = []
    for layer, index in zip(attention, indices, strict=True):
        policy = contract.layers[index].policy
        window = layer.window or sum(_STEPS)
        capacity = min(_BUDGET, window) if policy.evicts else window
        heavy, recent = policy.split(capacity)
        distance = contract.layers[index].max_distance
        layers.append(
            replace(
                contract.layers[index],
                query_heads=layer.query_heads, kv_heads=layer.kv_heads, head_dim=layer.head_dim, scale=layer.scale,
                heavy=heavy, recent=recent, window=layer.window, capacity=capacity,
                rank=rank if contract.layers[index].absorb else 1,
                max_distance=None if distance is None else min(distance, _BUDGET),
            )
        )  # fmt: skip
    twin = replace(contract, layers=tuple(layers), vocab_size=_VOCAB, dtype="float32", logits="all", chunk=max(_STEPS))
    if limits_distances(layers):
        rotations = rotary.probe(weights.bare_model(model.config, torch.float32))
        kernels = replace(kernels, rotary=rotary.tables(rotations, max(_BUDGET + 1, twin.chunk)))
    return twin, kernels


def twin_graph(model: PreTrainedModel, config: Any, twin: Contract, kernels: Kernels, folder: Path) -> ir.Model:
    """Trace and rewrite the twin exactly as an export for ONNX Runtime, its weights in a file of their own."""
    path, kernel_path = folder / "twin.safetensors", folder / "kernels.safetensors"
    save_file({n: p.contiguous() for n, p in model.named_parameters()}, path)
    bare = weights.bare_model(config, torch.float32)
    tensors, missing = weights.locate(bare, [path])
    assert not missing, missing
    tensors = {f"model.{n}": t for n, t in tensors.items()}
    if kernels.tensors():
        kernels.save(kernel_path)
        header = weights.read_header(kernel_path)
        tensors |= {parameter_of(n): t for n, t in header.items()}
    graph = trace(LessDecoder(bare, twin, kernels).eval(), twin, tensors)
    bind(graph, tensors, {path: path.name, kernel_path: kernel_path.name}, folder)
    fuse.fuse(graph)
    onnx_op.add_bodies(graph)
    return graph
