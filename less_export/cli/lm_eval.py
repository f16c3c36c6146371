"""``less-lm-eval``: the command line of lm-evaluation-harness, with the model ``less``."""

from __future__ import annotations

from ..errors import LessExportError
from .main import report_error


def main() -> int:
    """Entry point; the harness reads the arguments. Returns 0, or 1 with one line on stderr for errors of ours."""
    try:
        from ..evaluation import harness

        harness.main()
    except LessExportError as error:
        return report_error(str(error))
    return 0
