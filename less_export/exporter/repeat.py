"""Tracing one layer of each kind, and repeating it in the graph: a trace takes most of an export's time.

Layers are of one kind if they differ in nothing but the values of their weights. While the model is traced, the first
of each kind runs between two marks, and a mark stands in for each of the others. Then the nodes between the two marks
are copied in place of each mark, with the weights and the state of that layer.

The self-check of an export traces its twin, two layers of each kind with other weights, in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, nn

from ..contract import OP_DOMAIN, OP_VERSION, PAST_LENGTH, Contract
from ..errors import UnsupportedModelError
from ..hf.compat import on_interface
from ..hf.decoder import LessDecoder
from ..hf.layerwise import layer_list, stand_in

_MARK = "Mark"
#: What a mark stands for: the beginning of a layer, its end, or the whole of it.
_BEGIN, _END, _WHOLE = range(3)
#: Attributes of modules that tell layers apart without changing what these compute.
_NUMBERS = {"layer_idx"}


class UnrepeatableError(Exception):
    """The graph of a layer cannot be copied: the whole model must be traced."""


@torch.library.custom_op(f"{OP_DOMAIN}::mark", mutates_args=())
def _mark(x: Tensor, layer: int, role: int) -> Tensor:
    return x.clone()


_mark.register_fake(lambda x, layer, role: torch.empty_like(x))


def _translate(x: Any, layer: int, role: int) -> Any:
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    schema = onnx.defs.OpSchema(
        _MARK,
        OP_DOMAIN,
        OP_VERSION,
        inputs=[parameter("x", "T")],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[attribute(n, onnx.defs.OpSchema.AttrType.INT, "", required=True) for n in ("layer", "role")],
    )
    operator = onnxscript.values.Op(onnxscript.values.Opset(OP_DOMAIN, OP_VERSION), _MARK, schema)
    return operator(x, layer=layer, role=role)


def translation() -> dict[Any, Any]:
    """The part of ``custom_translation_table`` that marks need."""
    return {torch.ops.less.mark.default: _translate}


@dataclass(frozen=True)
class Repetition:
    """Layers that are copies of others: ``first`` [layers], the first layer of each one's kind.

    path: of the list of layers, as parameters of the traced module begin.
    """

    layers: nn.ModuleList
    path: str
    first: tuple[int, ...]

    @property
    def copies(self) -> dict[int, int]:
        """The layers that are not traced, and those that stand for them."""
        return {i: first for i, first in enumerate(self.first) if first != i}

    def prefixes(self, layer: int) -> tuple[str, ...]:
        """Beginnings of the names of a layer's tensors."""
        return tuple(f"{path}.{layer}." for path in (self.path, "maps", "centring"))


def find(decoder: LessDecoder, unbound: Collection[str]) -> Repetition | None:
    """The layers of a decoder that need not be traced; None if there are none, or its layers cannot be marked.

    ``unbound``: tensors of the graph whose values come later, and may differ.
    """
    count = len(decoder.contract.layers)
    if not on_interface(decoder.model):  # there layers are counted as they attend
        return None
    try:
        _, layers = layer_list(decoder.model, count)
    except UnsupportedModelError:
        return None
    path = next(n for n, m in decoder.named_modules() if m is layers)
    kinds: list[list[Any]] = []
    first: list[int] = []
    for index, layer in enumerate(layers):
        table, own = decoder.parts_of(index)
        facts: list[Any] = [decoder.contract.layers[index], table, _facts(layer, f"{path}.{index}", unbound)]
        facts += [(name, _facts(module, f"{name}.{index}", unbound)) for name, module in own.items()]
        same = next((i for i, known in zip(first, kinds, strict=True) if i == first[i] and known == facts), index)
        first.append(same)
        kinds.append(facts)
    repetition = Repetition(layers, path, tuple(first))
    return repetition if repetition.copies else None


def _facts(root: nn.Module, path: str, unbound: Collection[str]) -> list[Any]:
    """What a module computes, but for the values of tensors that are bound later; equal for layers of one kind."""
    facts: list[Any] = []
    for name, module in root.named_modules():
        plain = {n: x for n, x in vars(module).items() if not n.startswith("_") and n not in _NUMBERS}
        facts.append((name, type(module), _Values(plain)))
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        later = f"{path}.{name}" in unbound
        facts.append((name, tuple(tensor.shape), tensor.dtype, later, _Values({} if later else {"": tensor})))
    return facts


class _Values:
    """Values by name, equal if nothing shows that they differ in anything."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Values)
            and self.values.keys() == other.values.keys()
            and all(_equal(x, other.values[n]) for n, x in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[n], b[n]) for n in a)
    if isinstance(a, functools.partial):
        return _equal([a.func, a.args, a.keywords], [b.func, b.args, b.keywords])
    plain = isinstance(a, str | int | float | torch.dtype | torch.device) or dataclasses.is_dataclass(a)
    return plain and bool(a == b)


@contextlib.contextmanager
def marked(decoder: LessDecoder, repetition: Repetition) -> Iterator[None]:
    """Let marks stand in for the copies, and stand around the layers that are copied, while the context is open.

    Raises:
        UnrepeatableError: while the decoder runs, if a layer gets or gives more than the others of its kind.
    """
    calls: dict[int, tuple[Any, bool]] = {}

    def original(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = _split(args, kwargs)
            begin = _mark(hidden, layer, _BEGIN)
            out = forward(begin, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": begin})
            calls[layer] = rest, isinstance(out, tuple)
            if not isinstance(out, tuple):
                return _mark(out, layer, _END)
            if any(x is not None for x in out[1:]):
                raise UnrepeatableError(f"layer {layer} gives more than hidden states")
            return (_mark(out[0], layer, _END), *out[1:])

        return run

    def copy(layer: int, first: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = _split(args, kwargs)
            if first not in calls or not _same(rest, calls[first][0]):
                raise UnrepeatableError(f"layer {layer} does not get what layer {first} gets")
            out = _mark(hidden, layer, _WHOLE)
            return (out,) if calls[first][1] else out

        return run

    copies, layers = repetition.copies, repetition.layers
    with contextlib.ExitStack() as stack:
        for layer in set(copies.values()):
            stack.enter_context(stand_in(layers[layer], original(layer, layers[layer].forward)))
        for layer, first in copies.items():
            stack.enter_context(stand_in(layers[layer], copy(layer, first)))
        decoder.absent = tuple(copies)
        stack.callback(setattr, decoder, "absent", ())
        yield


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """The hidden states that a layer is called with, and everything else."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UnrepeatableError("a layer is called without hidden states")
    return hidden, [args[1:], {n: x for n, x in kwargs.items() if n != "hidden_states"}]


def _same(a: Any, b: Any) -> bool:
    """Whether two layers get the same: the same tensors, not equal ones."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[n], b[n]) for n in a)
    return a is b or (isinstance(a, str | int | float) and type(a) is type(b) and a == b)


# ------------------------------------------------------------------ in the graph


def unroll(model: ir.Model, repetition: Repetition, contract: Contract, unbound: Collection[str]) -> None:
    """Put a copy of its layer's nodes in place of every mark, and the state of the copies among inputs and outputs.

    Raises:
        UnrepeatableError: the nodes of a layer cannot be told from the others.
    """
    graph, copies = model.graph, repetition.copies
    found = [n for n in graph if n.op_type == _MARK and n.domain == OP_DOMAIN]
    marks = {_role(n): n for n in found}
    _share_rows(graph)
    if len(marks) != len(found):
        raise UnrepeatableError("a layer runs more than once")
    parts = {layer: _part(graph, layer, repetition, marks) for layer in set(copies.values())}
    nodes = [id(n) for part in parts.values() for n in part]
    if len(set(nodes)) != len(nodes):
        raise UnrepeatableError("two layers share nodes")
    inputs, outputs = ({x.name or "": x for x in values} for values in (graph.inputs, graph.outputs))
    for layer, first in copies.items():
        mark, result = marks[layer, _WHOLE], _input(marks[first, _END])
        values = _tensors(graph, parts[first], repetition, first, layer, unbound)
        values[marks[first, _BEGIN].outputs[0]] = _input(mark)
        graph.insert_before(mark, _copy(parts[first], first, layer, values, inputs, outputs))
        _replace(graph, mark, values.get(result, result))
    for (_, role), mark in marks.items():
        if role != _WHOLE:
            _replace(graph, mark, _input(mark))
    for ours, by_name, specs in (
        (graph.inputs, inputs, contract.inputs()),
        (graph.outputs, outputs, contract.outputs()),
    ):
        ours.clear()
        ours.extend(by_name[s.name] for s in specs)


def _copy(
    part: Sequence[ir.Node],
    first: int,
    layer: int,
    values: dict[ir.Value, ir.Value],
    inputs: dict[str, ir.Value],
    outputs: dict[str, ir.Value],
) -> list[ir.Node]:
    """Copies of the nodes of ``first`` for ``layer``, whose state is added to the graph's inputs and outputs by name.

    Args:
        values: what the copies take instead of its keys; what they give is added.
    """
    for name in [n for n in inputs if n.startswith(f"past.{first}.")]:
        other = _of_layer(name, first, layer)
        inputs[other] = values[inputs[name]] = _like(inputs[name], other)
    copies = [copy_node(node, values, f".{layer}") for node in part]
    for name in [n for n in outputs if n.startswith(f"present.{first}.")]:
        other = _of_layer(name, first, layer)
        outputs[other] = values[outputs[name]]
        outputs[other].name = other
    return copies


def _replace(graph: ir.Graph, mark: ir.Node, value: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(mark.outputs[0], value)
    graph.remove(mark, safe=True)


def _share_rows(graph: ir.Graph) -> None:
    """Take the number of rows from an input that belongs to no layer."""
    inputs = {x.name: x for x in graph.inputs}
    for node in graph:
        value = node.inputs[0] if node.op_type == "Shape" else None
        rows_only = node.attributes.get_int("start", 0) == 0 and node.attributes.get_int("end", -1) == 1
        if value is not None and value.is_graph_input() and rows_only:
            node.replace_input_with(0, inputs[PAST_LENGTH])


def _of_layer(name: str, first: int, layer: int) -> str:
    """The name of a tensor of the state, for another layer."""
    return name.replace(f".{first}.", f".{layer}.", 1)


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _input(mark: ir.Node) -> ir.Value:
    (value,) = mark.inputs
    assert value is not None
    return value


def _role(mark: ir.Node) -> tuple[int, int]:
    return mark.attributes["layer"].as_int(), mark.attributes["role"].as_int()


def _part(graph: ir.Graph, layer: int, repetition: Repetition, marks: dict[tuple[int, int], ir.Node]) -> list[ir.Node]:
    """The nodes of a layer, in order: those that depend on its input, its state or its tensors."""
    own: set[ir.Value | None] = {marks[layer, _BEGIN].outputs[0]}
    own |= {x for x in graph.inputs if (x.name or "").startswith(f"past.{layer}.")}
    own |= {x for n, x in graph.initializers.items() if n.startswith(repetition.prefixes(layer))}
    others = set(marks.values())
    part = [n for n in graph if n not in others and _joins(n, own)]
    inside = {*part, marks[layer, _END]}
    for node in part:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise UnrepeatableError(f"layer {layer} has a branch or a loop")
        for value in node.outputs:
            result = value.is_graph_output() and not (value.name or "").startswith(f"present.{layer}.")
            if result or any(user not in inside for user, _ in value.uses()):
                raise UnrepeatableError(f"layer {layer} gives more than hidden states and its state")
    return part


def _joins(node: ir.Node, own: set[ir.Value | None]) -> bool:
    """Whether a node takes any of the values ``own``; its results are then added to them."""
    if own.isdisjoint(node.inputs):
        return False
    own.update(node.outputs)
    return True


def _tensors(
    graph: ir.Graph, part: Sequence[ir.Node], repetition: Repetition, first: int, layer: int, unbound: Collection[str]
) -> dict[ir.Value, ir.Value]:
    """The weights of ``layer`` by those of ``first``."""
    values: dict[ir.Value, ir.Value] = {}
    for value in dict.fromkeys(x for node in part for x in node.inputs if x is not None):
        name = value.name or ""
        prefix = next((p for p in repetition.prefixes(first) if name.startswith(p)), None)
        if prefix is None or name not in unbound or not value.is_initializer():
            continue
        other = repetition.prefixes(layer)[repetition.prefixes(first).index(prefix)] + name.removeprefix(prefix)
        if other not in graph.initializers:
            graph.initializers[other] = _like(value, other)
        values[value] = graph.initializers[other]
    return values


def copy_node(node: ir.Node, values: dict[ir.Value, ir.Value], suffix: str) -> ir.Node:
    """A copy of a node that takes ``values`` instead of their keys, to which its own results are added."""
    outputs = [_like(x, f"{x.name}{suffix}") for x in node.outputs]
    inputs = [x if x is None else values.get(x, x) for x in node.inputs]
    values.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        outputs=outputs,
        name=f"{node.name}{suffix}",
    )
