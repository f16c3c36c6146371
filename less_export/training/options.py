"""Options of a training run, validated once."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import ExportConfig, HalfLife, MaxDistance
from ..contract import SlotDtype, StateBits
from ..errors import UsageError
from ..less.feature_maps import PARAMETRISATIONS, state_for
from ..less.policies import by_name, choosable

Quality = Literal["fast", "high"]
#: Steps per layer, training sequences, and steps in which all kernels are tuned together, of each quality.
QUALITIES: dict[str, tuple[int, int, int]] = {"fast": (200, 48, 120), "high": (500, 192, 480)}
DEFAULT_RANK, DEFAULT_HIDDEN, DEFAULT_LENGTH = 4, 128, 1024
#: Values of ``layer_budgets``: divide the budget by measured costs; give every layer the same.
AUTO, EQUAL = "auto", "equal"
#: Largest seed: layers add their number to it, and torch takes 64 bits.
_SEED = 2**63 - 1
#: How long processes wait for each other: one may train for hours while the others are idle.
_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; ``None`` takes the recipe's value, or the default.

    Args:
        policy: as in :class:`~less_export.config.ExportConfig`, without ``"full"``.
        budget: as in an export.
        layer_budgets: as in an export; ``"auto"``, the default where the recipe has none: divide the budget by what
            eviction costs in each layer; ``"equal"``: the same budget for every layer.
        score_half_life: as in an export.
        slots: as in an export.
        state: as in an export; 32 for ``"paper"``, whose psi does not sum to one.
        max_distance: as in an export.
        context: as in an export.
        compress_sliding: as in an export.
        rank: features R of the kernels.
        hidden: hidden width of the kernels.
        parametrisation: ``"exp"``, or ``"paper"`` for the authors'.
        quality: ``"fast"`` or ``"high"``; the defaults of ``steps``, ``seqs`` and ``tune_steps``.
        steps: steps per layer; 0 keeps the k-means start.
        seqs: training sequences; validation takes an eighth more.
        seq_len: tokens per sequence.
        layers: train only these layers, like ``"0-7,9"``.
        end_to_end: tune all kernels together at the end.
        tune_steps: steps of that.
        seed: the same seed gives the same kernels on the same machine.
        device: like ``"cpu"`` or ``"cuda:1"``; default a GPU if there is one.

    Raises:
        UsageError: a value out of range.
    """

    policy: str | None = None
    budget: str | None = None
    layer_budgets: str | None = None
    score_half_life: HalfLife | None = None
    slots: SlotDtype | None = None
    state: StateBits | None = None
    max_distance: MaxDistance | None = None
    context: int | None = None
    compress_sliding: bool | None = None
    rank: int | None = None
    hidden: int | None = None
    parametrisation: str = "exp"
    quality: Quality = "fast"
    steps: int | None = None
    seqs: int | None = None
    seq_len: int | None = None
    layers: str | None = None
    end_to_end: bool = True
    tune_steps: int | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.parametrisation not in PARAMETRISATIONS:
            choices = ", ".join(PARAMETRISATIONS)
            raise UsageError(f"unknown parametrisation '{self.parametrisation}': choose one of {choices}")
        if self.quality not in QUALITIES:
            raise UsageError(f"unknown quality '{self.quality}': choose one of {', '.join(QUALITIES)}")
        if self.policy is not None and by_name(self.policy).keeps_all:
            choices = ", ".join(choosable(evicting=True))
            raise UsageError(
                f"policy {self.policy} evicts nothing, so there is nothing to train: choose one of {choices}"
            )
        for name in ("rank", "hidden", "seqs", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        for name in ("steps", "tune_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 0, not {value}")
        if not 0 <= self.seed <= _SEED:
            raise UsageError(f"--seed must be between 0 and {_SEED}, not {self.seed}")
        self.cache()

    def cache(self) -> ExportConfig:
        """The options of the cache."""
        return ExportConfig(
            policy=self.policy, budget=self.budget,
            layer_budgets=None if self.division_by_training else self.layer_budgets,
            score_half_life=self.score_half_life, slots=self.slots,
            state=state_for(self.parametrisation, self.state), max_distance=self.max_distance,
            context=self.context, compress_sliding=self.compress_sliding,
        )  # fmt: skip

    @property
    def divided(self) -> bool:
        """Whether the budget is divided by measured costs."""
        return self.layer_budgets == AUTO

    @property
    def division_by_training(self) -> bool:
        """Whether training decides on the budgets of layers, and neither the user nor the recipe."""
        return self.layer_budgets in (AUTO, EQUAL)

    @property
    def tune_step_count(self) -> int:
        return QUALITIES[self.quality][2] if self.tune_steps is None else self.tune_steps

    @property
    def step_count(self) -> int:
        return QUALITIES[self.quality][0] if self.steps is None else self.steps

    @property
    def sequence_count(self) -> int:
        return self.seqs or QUALITIES[self.quality][1]


def parse_layers(text: str | None, available: list[int]) -> list[int]:
    """Layers of ``"0-7,9"`` among those that have a low-rank term; all of them for None.

    Raises:
        UsageError: ``text`` is not such a list, or names a layer that evicts nothing.
    """
    if text is None:
        return available
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if match is None:
            raise UsageError(f"--layers '{text}' is not a list like 0-7,9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"--layers {text}: {first}-{last} is reversed, write {last}-{first}")
        layers = range(first, last + 1)
        # Stops at the first, however long the range is.
        unavailable = next((i for i in layers if i not in available), None)
        if unavailable is not None:
            raise UsageError(
                f"--layers {text}: layer {unavailable} evicts nothing or does not exist; "
                f"layers that evict: {','.join(map(str, available))}"
            )
        chosen.update(layers)
    return sorted(chosen)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; a single one without it."""

    rank: int
    count: int

    @classmethod
    def here(cls) -> Processes:
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def join(self) -> None:
        """Join the process group."""
        if self.count > 1:
            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Leave the process group; after an error, torchrun then ends the other processes."""
        if self.count > 1:
            torch.distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def on_machine(self) -> int:
        """Number of processes that share this machine's memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
