"""How benchmarks print their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same fields, three digits of each number."""
    table = Table(title=title)
    for field, value in rows[0].items():  # names stay whole in a narrow terminal
        table.add_column(field, overflow="fold" if isinstance(value, str) else "ellipsis")
    for row in rows:
        table.add_row(*(f"{c:.3g}" if isinstance(c, float) else str(c) for c in row.values()))
    console.print(table)
