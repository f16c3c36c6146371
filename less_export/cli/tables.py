"""How the command line formats figures: tables, bytes and confidence intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.statistics import Interval

#: Columns that hold text wherever they stand; the others but the first hold figures.
_TEXT_COLUMNS = ("what", "dtype", "policy", "source", "shape")
#: The footnote of figures with :func:`beyond_mark`.
BEYOND = "*: more tokens than the model has positions."


def table(title: str, *columns: str) -> Table:
    """An empty table whose first column is text and whose others are figures.

    Cells show what they hold: neither markup of rich nor control characters have an effect.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    class Plain(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(Text(printable(str(cell))) for cell in cells), **options)

    empty = Plain(title=Text(printable(title)), box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        is_text = index == 0 or column in _TEXT_COLUMNS
        empty.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return empty


def show(table: Table) -> None:
    """Print to stdout; 160 columns wide where that is not a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def size(count: float) -> str:
    """Bytes with a unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def interval(x: Interval, digits: int = 2) -> str:
    """``value [low, high]``, or the value alone where there is no interval."""
    return x.text(f".{digits}f")


def beyond_mark(length: int, positions: int | None) -> str:
    """``*`` for a sequence of more tokens than the model has positions (None: unknown)."""
    return BEYOND[0] if positions is not None and length > positions else ""
