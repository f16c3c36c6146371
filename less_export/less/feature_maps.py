"""The kernels of the low-rank term: phi for queries, psi for keys, and the file that holds them.

phi: D -> hidden -> R per query head, psi: D -> hidden -> R per KV head, both non-negative (LESS,
arXiv 2402.09398, section 3.2). phi is passed on as log phi in float32: real layers reach log-masses of 40.
psi of the default parametrisation sums to one over R, so that z counts tokens.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..bundle.files import write_atomically
from ..contract import SLOT_DTYPES, Heads, LayerSpec, StateBits, limits_distances
from ..dtypes import COMPUTE_DTYPES, torch_dtype
from ..errors import KernelError, UsageError
from .int8 import Centring
from .kernel_shapes import exp_shapes
from .rotary import RotaryTable

#: Newest version of the file. Version 2 added centring, version 3 rotary tables; the oldest that suffices is written.
FORMAT_VERSION = 4
_HEADER = "less_kernels"
#: Dtypes of stored parameters that graphs can point at.
_DTYPES = tuple(map(torch_dtype, COMPUTE_DTYPES))
#: Kernels are used without a warning at budgets up to this factor larger or smaller than in training.
_REACH = 4
#: Model name in the provenance of :func:`random_kernels`.
_RANDOM = "random"


def weight_limit(position: Tensor, length: int) -> Tensor:
    """What log phi of queries at ``position`` [...,T] loses past ``length`` tokens, f32 [...,1,T,1].

    The mass of the state grows with every token that it absorbs. Kernels have learned how much it should weigh against
    the slots in sequences of ``length`` tokens; past that, its weight is held at what it would be there.
    """
    return torch.log(length / (position.float() + 1.0).clamp(min=float(length)))[..., None, :, None]


class FeatureMap(nn.Module, abc.ABC):
    """phi and psi of one layer; hidden layers run in the compute dtype, the R-wide ones in float32.

    ``length``: tokens of the sequences that it was trained on, past which the state weighs no more; None where nobody
    knows.
    """

    parametrisation: ClassVar[str]
    #: Whether psi sums to one over R, as a state of 16 bits needs.
    normalised: ClassVar[bool]
    length: int | None = None

    def __init__(self, heads: Heads, rank: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.rank, self.hidden = heads, rank, hidden
        for name, shape in self.shapes(heads, rank, hidden).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @staticmethod
    @abc.abstractmethod
    def shapes(heads: Heads, rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Parameter shapes by name."""

    @abc.abstractmethod
    def log_phi(self, q: Tensor) -> Tensor:
        """[B,Hq,T,D] queries -> log phi [B,Hq,T,R] f32, -inf where phi is zero."""

    @abc.abstractmethod
    def psi(self, k: Tensor) -> Tensor:
        """[B,Hk,T,D] keys -> psi [B,Hk,T,R] in the dtype of ``k``, non-negative."""

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """log phi, limited, and psi of whole sequences, whose first token is at position 0."""
        log_phi = self.log_phi(q)
        if self.length is not None and q.shape[2] > self.length:
            log_phi = log_phi + weight_limit(torch.arange(q.shape[2], device=q.device), self.length)
        return log_phi, self.psi(k)


class ExpMap(FeatureMap):
    """log phi = MLP(q) + q S + b;  psi = softmax over R of MLP(k) + k S + b."""

    parametrisation, normalised = "exp", True

    @staticmethod
    def shapes(heads: Heads, rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
        return exp_shapes(heads, rank, hidden)

    def _features(self, side: str, x: Tensor) -> Tensor:
        def weight(name: str) -> Tensor:
            return self.get_parameter(f"{side}_{name}")

        hidden = F.gelu(x @ weight("in").to(x.dtype))
        out = hidden.float() @ weight("out").float() + x.float() @ weight("skip").float()
        return out + weight("bias").float()

    def log_phi(self, q: Tensor) -> Tensor:
        return self._features("q", q)

    def psi(self, k: Tensor) -> Tensor:
        return torch.softmax(self._features("k", k), -1).to(k.dtype)


class PaperMap(FeatureMap):
    """The authors' parametrisation: |gelu| features, psi with interaction and scaling (section 3.2).

    ``q_offset`` holds the log of the constant that a rescaling of psi (``k_gain``) divides out.
    """

    parametrisation, normalised = "paper", False

    @staticmethod
    def shapes(heads: Heads, rank: int, hidden: int) -> dict[str, tuple[int, ...]]:
        hq, hk = heads.query_heads, heads.kv_heads
        return {
            "q_in": (hq, heads.head_dim, hidden),
            "q_out": (hq, hidden, rank),
            "q_offset": (hq, 1, 1),
            "k_in": (hk, heads.head_dim, hidden),
            "k_out": (hk, hidden, rank),
            "k_interaction": (hk, rank, rank),
            "k_scale": (hk, 1, rank),
            "k_scale_interaction": (hk, 1, rank),
            "k_gain": (hk, 1, 1),
        }

    def _hidden(self, side: str, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.get_parameter(f"{side}_in").to(x.dtype))
        return F.gelu(hidden.float() @ self.get_parameter(f"{side}_out").float())

    def log_phi(self, q: Tensor) -> Tensor:
        phi = self._hidden("q", q).abs()
        zero = phi == 0  # replaced before log is taken: its gradient at 0 is not finite
        return torch.where(zero, -torch.inf, torch.where(zero, 1.0, phi).log()) + self.get_parameter("q_offset").float()

    def psi(self, k: Tensor) -> Tensor:
        base = self.get_parameter("k_scale").float().abs() * self._hidden("k", k)
        mixed = base @ self.get_parameter("k_interaction").float()
        psi = (base + mixed * self.get_parameter("k_scale_interaction").float()).abs()
        return (psi * self.get_parameter("k_gain").float().abs()).to(k.dtype)


PARAMETRISATIONS: dict[str, type[FeatureMap]] = {m.parametrisation: m for m in (ExpMap, PaperMap)}


def state_for(parametrisation: str | None, bits: StateBits | None) -> StateBits | None:
    """The bits of a low-rank state for kernels of a parametrisation: ``bits``, or None for the default.

    Raises:
        UsageError: 16 bits, and its psi does not sum to one.
    """
    if parametrisation is None or PARAMETRISATIONS[parametrisation].normalised:
        return bits
    if bits == 16:
        raise UsageError(f"--state 16 is impossible: psi of parametrisation {parametrisation} does not sum to one")
    return 32


@dataclass(frozen=True)
class Kernels:
    """What is measured or trained for a model: feature maps, centring of keys, rotary tables, and their provenance.

    ``layers`` are trained feature maps by layer index (layers without one stay sparse), ``centring`` the constants
    with which int8 slots centre keys, by layer index (0 and 1 where there are none), ``rotary`` the tables of layers
    with a largest distance. ``provenance`` is free JSON (model, policy, budget, data hashes, errors); ``model`` in it
    names the model the kernels were trained for.
    """

    layers: Mapping[int, FeatureMap]
    provenance: Mapping[str, Any]
    centring: Mapping[int, Centring] = field(default_factory=dict)
    rotary: Sequence[RotaryTable] = ()

    @property
    def rotated(self) -> bool | None:
        """Whether the feature maps read q and k after the rotary embedding; None where it does not matter.

        Kernels of versions that knew nothing else do not say so.
        """
        if not self.layers or self.provenance.get("model") == _RANDOM:
            return None
        return bool(self.provenance.get("rotated", True))

    @property
    def centring_rotated(self) -> bool | None:
        """Whether the keys that centring was measured on were rotated; None without centring."""
        facts = self.provenance.get("centring")
        stated = facts.get("rotated") if isinstance(facts, dict) else None
        return bool(self.provenance.get("rotated", True) if stated is None else stated) if self.centring else None

    @property
    def parametrisation(self) -> str | None:
        return next((m.parametrisation for m in self.layers.values()), None)

    @property
    def hidden(self) -> int | None:
        return next((m.hidden for m in self.layers.values()), None)

    @property
    def slots(self) -> dict[int, int]:
        """The slots of the layers they were trained for, as provenance states them."""
        stated = self.provenance.get("slots")
        names = [x for x in stated if x.isdecimal() and len(x) < 6] if isinstance(stated, dict) else []
        found = {int(x): _slots(stated, int(x)) for x in names}
        return {i: n for i, n in sorted(found.items()) if n is not None and 0 < n < 2**31}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors under their names in the file."""
        maps = {f"layers.{i}.{n}": p.data for i, m in self.layers.items() for n, p in m.named_parameters()}
        centring = {f"centring.{i}.{n}": x for i, c in self.centring.items() for n, x in c.named().items()}
        return maps | centring | {f"rotary.{kind}": t.angles for kind, t in enumerate(self.rotary)}

    def nbytes(self) -> int:
        """Bytes of the feature maps."""
        return sum(p.numel() * p.element_size() for m in self.layers.values() for p in m.parameters())

    def check(self, model: Sequence[Heads]) -> None:
        """Raise :class:`KernelError` unless every layer fits ``model``."""
        for index, layer in self.layers.items():
            if not 0 <= index < len(model):
                raise KernelError(
                    f"kernels for layer {index}, but the model has {len(model)} layers: wrong kernel file"
                )
            if layer.heads != model[index]:
                raise KernelError(
                    f"kernels of another model: layer {index} has {model[index].query_heads} query heads, "
                    f"{model[index].kv_heads} KV heads and head_dim {model[index].head_dim}, the kernels are for "
                    f"{layer.heads.query_heads}, {layer.heads.kv_heads} and {layer.heads.head_dim}"
                )
        for index, centring in self.centring.items():
            expected = (model[index].kv_heads, model[index].head_dim) if index < len(model) else None
            if centring.mean.shape != expected:
                raise KernelError(f"centring of keys for layer {index} of another model: wrong kernel file")
        for index, kind in ((i, t) for t in self.rotary for i in t.layers):
            head_dim = model[index].head_dim if 0 <= index < len(model) else 0
            channels = head_dim if kind.order is None else len(kind.order)
            if channels != head_dim or kind.angles.shape[1] > head_dim:
                raise KernelError(f"rotary table for layer {index} of another model: wrong kernel file")

    def doubts(self, names: Collection[str], plan: Sequence[LayerSpec]) -> list[str]:
        """Reasons to doubt these kernels for the model called ``names`` with the layers ``plan``, one line each.

        Their provenance may name another model, another policy, other slots, or a budget far from the plan's.
        """
        found, facts = [], self.provenance
        model, policy, slots = (facts.get(n) for n in ("model", "policy", "slots"))
        if isinstance(model, str) and model != _RANDOM and _last(model) not in map(_last, names):
            how = "trained" if self.layers else "calibrated"
            verb = "train" if self.layers else "calibrate"
            found.append(f"the kernels were {how} for {model}: if {next(iter(names))} is another model, {verb} its own")
        used = {i: plan[i] for i in sorted(self.layers) if plan[i].absorb}
        others = sorted({s.policy.name for s in used.values()} - {policy})
        if isinstance(policy, str) and others:
            found.append(f"the kernels were trained for policy {policy}, not {others[0]}: quality may suffer")
        then, now = facts.get("score_half_life"), next((s.score_half_life for s in used.values()), None)
        known = used and isinstance(policy, str) and not others and (then is None or isinstance(then, int))
        if known and then != now:
            found.append(
                f"the kernels were trained with --score-half-life {then or 'none'}, not {now or 'none'}: "
                "quality may suffer"
            )
        stated, slot_dtype = facts.get("slot_dtype", "model"), next((s.slot_dtype for s in used.values()), None)
        if isinstance(policy, str) and stated in SLOT_DTYPES and slot_dtype not in (None, stated):
            found.append(f"the kernels were trained with --slots {stated}, not {slot_dtype}: quality may suffer")
        if used and self.rotated == limits_distances(plan):
            how, distance = ("rotated", "N") if self.rotated else ("unrotated", "none")
            found.append(
                f"the kernels were trained on {how} queries and keys, not for --max-distance {distance}: train again"
            )
        for index, layer in used.items():
            then = _slots(slots, index)
            if then is not None and not then <= _REACH * layer.capacity <= _REACH**2 * then:
                found.append(
                    f"the kernels were trained with {then} slots, not {layer.capacity} (layer {index}): "
                    "quality may suffer"
                )
                break
        return found

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the layers' shapes and the provenance in its header."""
        layers = {
            str(i): {
                "heads": vars(m.heads),
                "rank": m.rank,
                "hidden": m.hidden,
                **({} if m.length is None else {"length": m.length}),
            }
            for i, m in self.layers.items()
        }
        knows_length = any(m.length is not None for m in self.layers.values())
        header = {
            "format_version": FORMAT_VERSION if knows_length else 3 if self.rotary else 2 if self.centring else 1,
            "parametrisation": self.parametrisation,
            "layers": layers,
            **({"centring": sorted(self.centring)} if self.centring else {}),
            **({"rotary": [{"layers": t.layers, "order": t.order} for t in self.rotary]} if self.rotary else {}),
            "provenance": dict(self.provenance),
        }
        tensors = {n: t.contiguous() for n, t in self.tensors().items()}
        write_atomically(path, save(tensors, {_HEADER: json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> Kernels:
        """Read a kernel file; raises :class:`KernelError` for any other file."""
        try:
            with safe_open(str(path), "pt") as file:
                stated = (file.metadata() or {}).get(_HEADER)
                if stated is None:
                    raise KernelError(f"{path} holds no LESS kernels: give a file written by less-export")
                header = json.loads(stated)
                if header["format_version"] > FORMAT_VERSION:
                    raise KernelError(f"{path} was written by a newer less-export: upgrade to read it")
                family = PARAMETRISATIONS[header["parametrisation"]] if header["layers"] else ExpMap
                layers: dict[int, FeatureMap] = {}
                for index, facts in header["layers"].items():
                    layer = family(Heads(**facts["heads"]), facts["rank"], facts["hidden"])
                    for name, parameter in layer.named_parameters():
                        tensor = file.get_tensor(f"layers.{index}.{name}")
                        if tensor.shape != parameter.shape or tensor.dtype not in _DTYPES:
                            raise KernelError(f"{path}: layers.{index}.{name} has the wrong shape or dtype")
                        if not bool(tensor.isfinite().all()):
                            raise KernelError(f"{path}: layers.{index}.{name} holds NaN or inf; train it again")
                        parameter.data = tensor
                    layer.length = _load_length(facts.get("length"), f"{path}: layer {index}")
                    layers[int(index)] = layer
                centring = {int(i): _load_centring(file, int(i), path) for i in header.get("centring", [])}
                kinds = enumerate(header.get("rotary", []))
                rotary = tuple(_load_table(file, kind, facts, path) for kind, facts in kinds)
                return cls(layers, dict(header["provenance"]), centring, rotary)
        except FileNotFoundError:
            raise KernelError(f"no kernel file at {path}") from None
        except KernelError:
            raise
        except Exception as error:  # whatever safetensors and torch raise for a damaged header
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise KernelError(f"{path} is not a usable kernel file ({reason})") from error


def _load_length(stated: Any, place: str) -> int | None:
    """The length that a layer of a kernel file states."""
    if stated is not None and not (type(stated) is int and 1 <= stated < 2**31):
        raise KernelError(f"{place} was trained on sequences of an impossible length: train it again")
    return stated


def _load_centring(file: Any, layer: int, path: str | Path) -> Centring:
    """A layer's constants from an open kernel file."""
    centring = Centring(*(file.get_tensor(f"centring.{layer}.{n}") for n in ("mean", "std")))
    for name, x in centring.named().items():
        if x.ndim != 2 or x.shape != centring.mean.shape or x.dtype != torch.float32:
            raise KernelError(f"{path}: centring.{layer}.{name} has the wrong shape or dtype")
    if not bool(centring.mean.isfinite().all()) or not bool((centring.std.isfinite() & (centring.std > 0)).all()):
        raise KernelError(f"{path}: the centring of layer {layer} is not finite, or has a std of 0; calibrate again")
    return centring


def _load_table(file: Any, kind: int, facts: Mapping[str, Any], path: str | Path) -> RotaryTable:
    """A kind of rotary embedding from an open kernel file."""
    angles, order = file.get_tensor(f"rotary.{kind}"), facts["order"]
    if angles.ndim != 2 or angles.shape[1] % 2 or not angles.numel() or angles.dtype != torch.float32:
        raise KernelError(f"{path}: rotary.{kind} has the wrong shape or dtype")
    if not bool((angles.abs() <= 1).all()):  # NaN is not
        raise KernelError(f"{path}: rotary.{kind} holds what is no cosine or sine: export again")
    if order is not None and sorted(order) != list(range(max(len(order), angles.shape[1]))):
        raise KernelError(f"{path}: the order of rotary.{kind} is no order of channels: export again")
    return RotaryTable(tuple(map(int, facts["layers"])), None if order is None else tuple(order), angles)


def _slots(stated: Any, layer: int) -> int | None:
    """Slots of a layer as provenance states them, ``{"0": [heavy, recent]}``."""
    split = stated.get(str(layer)) if isinstance(stated, dict) else None
    return sum(split) if isinstance(split, list) and all(isinstance(x, int) for x in split) else None


def _last(name: str) -> str:
    """A model's name without its organisation."""
    return name.rsplit("/", 1)[-1].casefold()


def random_kernels(
    model: Sequence[Heads], layers: Sequence[int], rank: int, hidden: int, parametrisation: str = "exp", seed: int = 0
) -> Kernels:
    """Kernels with random weights of a sensible size: for tests and for measuring speed, not for quality."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for index in layers:
        layer = PARAMETRISATIONS[parametrisation](model[index], rank, hidden)
        for parameter in layer.parameters():
            fan_in = parameter.shape[-2] if parameter.shape[-2] > 1 else 1
            parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        maps[index] = layer
    return Kernels(maps, {"model": _RANDOM})
