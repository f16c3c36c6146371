"""How far the means of a 16-bit low-rank state drift from exact ones in a million steps, with and without the dither.

One token leaves a step. Its psi is random and rounded as in a slot; its value is noise around what its strongest
feature stands for. Exact means are sums in float64. The result is ``benchmarks/results/state.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from bench_common import write_results
from torch import Tensor

from less_export.less import state16

RANK, WIDTH = 8, 64
#: Tokens after which the error is noted.
MARKS = (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000)


def nearest(position: Tensor, rank: int, head_dim: int) -> Tensor:
    """In place of the dither: rounding to the nearest code."""
    return torch.full((len(position), 1, rank, head_dim), 0.5)


def drift(dither: Callable[[Tensor, int, int], Tensor], tokens: int) -> dict[str, float]:
    """Root mean square error of the means, relative to their root mean square, after each of ``MARKS`` tokens."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(RANK, WIDTH, generator=generator)
    state = (torch.zeros(1, 1, RANK, 2 * WIDTH, dtype=torch.int8), *torch.zeros(2, 1, 1, RANK))
    exact, count, errors = torch.zeros(RANK, WIDTH).double(), torch.zeros(RANK).double(), {}
    with mock.patch.object(state16, "dither", dither):
        for token in range(tokens):
            raw = torch.softmax(2 * torch.randn(1, 1, 1, RANK, generator=generator), -1)
            psi = state16.rounded_psi(raw)[0, 0, 0]
            value = centres[psi.argmax()] + torch.randn(WIDTH, generator=generator)
            exact += psi[:, None].double() * value
            count += psi
            total = psi[:, None] * value
            state = state16.absorb(*state, psi[None, None], total[None, None], torch.tensor([token], dtype=torch.int32))
            if token + 1 in MARKS:
                mean = exact / count[:, None]
                error = state16.means(*state[:2])[0, 0] - mean
                errors[str(token + 1)] = float((error.square().mean() / mean.square().mean()).sqrt())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=MARKS[-1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"dither": state16.dither, "nearest": nearest}
    rows = {name: drift(dither, args.tokens) for name, dither in kinds.items()}
    print(rows)
    write_results("state", {"rank": RANK, "head_dim": WIDTH, "rows": rows})


if __name__ == "__main__":
    main()
