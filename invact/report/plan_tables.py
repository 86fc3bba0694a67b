"""A plan as tables for a console: one row for what a reader need not tell apart."""

from __future__ import annotations

from rich.console import Console

from invact.deriving.derived_tensor import DerivedTensor
from invact.report.amounts import format_bytes
from invact.report.figures import Figures
from invact.report.records import APPROXIMATE, INVERT, KEEP, FusedNorm, Site
from invact.report.tables import Column, print_table


def print_tables(figures: Figures, console: Console) -> None:
    """Sites, fused norms, derived tensors and checkpointed blocks, in any width; what there is none of is left out."""
    if figures.sites:
        _print_sites(figures, console)
    else:
        console.print("No pointwise activation was found in this model, as a module or in a method.")
    if figures.fused:
        _print_fused(figures, console)
    if figures.derived:
        _print_derived(figures, console)
    if figures.blocks:
        _print_blocks(figures, console)


def _print_sites(figures: Figures, console: Console) -> None:
    columns = [
        Column("sites", right=True),
        Column("example", least=16),
        Column("activation", least=10),
        Column("class", least=14),
        Column("action"),
        Column("reason", least=20),
        Column("saved", right=True),
    ]
    kinds = figures.site_kinds()
    rows = [_row(kind) for kind in kinds]
    print_table(console, columns, rows, styles=["dim" if kind[0].action == KEEP else None for kind in kinds])


def _print_fused(figures: Figures, console: Console) -> None:
    columns = [
        Column("norms", right=True),
        Column("example", least=16),
        Column("class", least=14),
        Column("in one", least=20),
        Column("moved", right=True),
        Column("before", right=True),
    ]
    print_table(console, columns, [_fused_row(kind) for kind in figures.fused_kinds()])


def _print_blocks(figures: Figures, console: Console) -> None:
    columns = [
        Column("blocks", right=True),
        Column("checkpointed", least=20),
        Column("won", right=True),
        Column("of a forward run twice", right=True),
    ]
    rows = [
        [
            str(len(alike)),
            alike[0].path + (f" to {alike[-1].path}" if len(alike) > 1 else ""),
            format_bytes(sum(block.bytes_won for block in alike)),
            f"{sum(block.share for block in alike):.1%}",
        ]
        for alike in figures.alike_blocks()
    ]
    print_table(console, columns, rows)


def _print_derived(figures: Figures, console: Console) -> None:
    columns = [
        Column("tensors", right=True),
        Column("not kept", least=14),
        Column("example", least=16),
        Column("wanted by", least=16),
        Column("instead", least=20),
        Column("saved", right=True),
        Column("moved", right=True),
    ]
    print_table(console, columns, [_derived_row(kind) for kind in figures.derived_kinds()])


def _row(kind: list[Site]) -> list[str]:
    first = kind[0]
    return [
        str(len(kind)),
        first.path or "(the model itself)",
        first.activation,
        first.module_class,
        first.action,
        first.reason,
        format_bytes(sum(site.bytes_saved for site in kind)) if first.action in (INVERT, APPROXIMATE) else "-",
    ]


def _fused_row(kind: list[FusedNorm]) -> list[str]:
    first = kind[0]
    return [
        str(len(kind)),
        first.path or "(the model itself)",
        first.module_class,
        first.reason,
        format_bytes(sum(norm.bytes_moved for norm in kind)),
        format_bytes(sum(norm.bytes_moved_in_steps for norm in kind)),
    ]


def _derived_row(kind: list[DerivedTensor]) -> list[str]:
    first = kind[0]
    return [
        str(len(kind)),
        first.what,
        first.path or "(the model itself)",
        (first.kept_by or "(the model itself)") + (f" and {first.keepers - 1} more" if first.keepers > 1 else ""),
        first.reason,
        format_bytes(sum(tensor.bytes_saved for tensor in kind)),
        format_bytes(sum(tensor.bytes_moved for tensor in kind)),
    ]
