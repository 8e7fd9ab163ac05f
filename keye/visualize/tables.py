"""Printed tables: with colours and rules in a terminal, otherwise aligned plain text."""

import sys
from collections.abc import Sequence

COLOURS = {"slow": "dark_orange3", "fast": "dodger_blue2", "warning": "yellow", "error": "red", "failed": "red"}


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    total: Sequence[str] | None = None,
) -> None:
    """Print rows of text below their heads.

    Args:
        heads: names of the columns.
        rows: a text per column.
        left: columns that are aligned to the left; the others are aligned to the right.
        total: a last row.
    """
    if not sys.stdout.isatty():
        lines = [heads, *rows, *([total] if total else [])]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        for line in lines:
            cells = zip(line, widths, range(len(heads)), strict=True)
            texts = (text.ljust(width) if column in left else text.rjust(width) for text, width, column in cells)
            print("  ".join(texts).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_footer=total is not None, pad_edge=False)
    for column, head in enumerate(heads):
        table.add_column(
            Text(head, style=COLOURS.get(head, "")),
            footer=Text(total[column] if total else ""),
            justify="left" if column in left else "right",
            overflow="fold",
            no_wrap=column not in left,
        )
    for row in rows:
        # A cell with a colour, such as a frame's type or "failed", colours its row.
        style = next((COLOURS[cell] for cell in row if cell in COLOURS), "")
        table.add_row(*(Text(cell) for cell in row), style=style)
    Console().print(table)


def print_facts(facts: Sequence[tuple[str, str]], width: int = 8) -> None:
    """Print (label, value) pairs, one per line; width: of the labels in plain text."""
    if not sys.stdout.isatty():
        for name, value in facts:
            print(f"{name:<{width}}{value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(Text(name, style=COLOURS.get(name, "bold")), Text(value, overflow="fold"))
    Console().print(grid)


def seconds(value: float) -> str:
    """A duration as text: "12.3 s" below a minute, then "2:05" or "1:02:05"."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
