"""The caches that ``bench_quality.py`` compares, and how their kernels are trained."""

from __future__ import annotations

from dataclasses import dataclass

from less_export.config import ExportConfig

#: Training sequences of half of each text.
TRAIN = 48


@dataclass(frozen=True)
class Setting:
    """One cache: policy and budget, on the three full layers or on all eighteen."""

    policy: str
    budget: str
    all_layers: bool = False
    #: The same budget, divided by what eviction costs in each layer.
    layer_budgets: str | None = None

    @property
    def name(self) -> str:
        layers = "all 18 layers" if self.all_layers else "3 full layers"
        return f"{self.policy} {self.budget}, {layers}{', divided' if self.layer_budgets else ''}"

    def config(self) -> ExportConfig:
        return ExportConfig(
            policy=self.policy,
            budget=self.budget,
            layer_budgets=self.layer_budgets,
            score_half_life="none",
            slots="model",
            max_distance="none",
            compress_sliding=self.all_layers,
        )


SETTINGS = (
    Setting("h2o", "5%"),
    Setting("h2o", "10%"),
    Setting("sink", "5%"),
    Setting("sink", "10%"),
    Setting("h2o", "5%", all_layers=True),
)

#: About as many bytes as the first setting at R = 8 (50 slots), divided differently between slots and rank.
SPLITS = ((Setting("h2o", "42"), 16), (Setting("h2o", "34"), 24))


@dataclass(frozen=True)
class Recipe:
    """How kernels are trained; the defaults are those of ``less-export train`` with rank and hidden of the recipe."""

    rank: int = 8
    hidden: int = 128
    seed: int = 0
    steps: int = 500
    parametrisation: str = "exp"
    sequences: int = TRAIN
    #: End-to-end steps after the layers are trained, 0 for none.
    end_to_end: int = 0

    @property
    def name(self) -> str:
        more = f" {self.sequences} sequences" if self.sequences != TRAIN else ""
        tuned = f" + {self.end_to_end} end to end" if self.end_to_end else ""
        sizes = f"R{self.rank} hidden {self.hidden} {self.parametrisation}"
        return f"{sizes} steps {self.steps} seed {self.seed}{more}{tuned}"
