"""``less-lm-eval``: the command line of lm-evaluation-harness, with the model ``less``."""

from __future__ import annotations

from .ending import ended


def main() -> int:
    """Entry point; the harness reads the arguments. Returns 0, 1 with one line on stderr, or 130 if interrupted."""

    def run() -> int:
        from ..evaluation import harness

        harness.main()
        return 0

    return ended(run, lambda: "interrupted")
