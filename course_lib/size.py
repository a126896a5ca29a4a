"""What `course size` shows: the report of `course_lib.sizing.report` as tables, or as JSON."""

import dataclasses
import json

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from course_lib.sizing.memory import OVERHEAD_FACTOR
from course_lib.sizing.report import SizeReport


def as_json(report: SizeReport) -> str:
    """The whole report; keys are the names of its fields, which carry the units."""
    return json.dumps(dataclasses.asdict(report), indent=2)


def as_tables(report: SizeReport) -> RenderableType:
    """The report for a terminal of 80 columns or more."""
    blocks: list[RenderableType] = [
        _headline(report),
        _memory(report),
        _gpus(report),
        _plan(report),
        _mig(report),
        *(f"[yellow]Note:[/] {escape(note)}" for note in report.notes),
        "[dim]Times are floors and rates are ceilings of the roofline: real engines are slower. "
        "Prices and cold-start phases are examples; put your own into data/catalog.[/]",
    ]
    return Group(*(part for block in blocks for part in (block, "")))


def _headline(report: SizeReport) -> str:
    model = report.model
    active = f" ({_count(report.active_params_b)} active a token)" if model.moe_layers else ""
    return (
        f"[bold]{escape(model.name)}[/], {_count(report.total_params_b)} parameters{active}\n"
        f"{model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}, "
        f"weights in {report.weights}, KV cache in {report.kv}\n"
        f"{_requests(report)} of {report.context_len} tokens"
    )


def _memory(report: SizeReport) -> Table:
    needs = report.requirements
    per_1k_tokens = needs.kv_cache_gb / (report.context_len * report.concurrency) * 1000
    table = _table("Memory", "", "", "", show_header=False)
    table.add_row("weights", _gb(needs.weights_gb), "")
    table.add_row("KV cache", _gb(needs.kv_cache_gb), f"  {per_1k_tokens:.2g} GB for 1000 tokens")
    overhead = f"with {OVERHEAD_FACTOR - 1:.0%} overhead"
    table.add_row(overhead, _gb(needs.total_with_overhead_gb), "")
    return table


def _gpus(report: SizeReport) -> Table:
    table = _table(
        "GPUs it takes",
        "",
        "usable GB",
        "by memory",
        "tensor parallel",
        "tokens/s, 1 user",
        "$/hour",
    )
    for row in report.gpus:
        table.add_row(
            row.name,
            f"{row.usable_gb:g}",
            f"{row.needed}",
            "-" if row.tensor_parallel_size is None else f"{row.tensor_parallel_size}",
            f"{row.decode_ceiling_tokens_per_s:,.0f}",
            f"{row.usd_per_hour:,.2f}",
            style="bold" if row.name == report.gpu.name else None,
        )
    return table


def _plan(report: SizeReport) -> Table:
    speed, capacity, dollars = report.speed, report.kv_capacity, report.dollars
    fits = capacity.tokens // report.context_len
    batch = speed.compute_bound_batch_size
    table = _table(f"On {speed.gpus} x {report.gpu.name}", "", "", show_header=False)
    table.columns[1].justify = "left"
    table.add_row(
        "KV cache of the engine",
        f"{_gb(capacity.kv_cache_gb)}, {capacity.tokens:,} tokens: {fits} such requests",
    )
    table.add_row(
        f"TTFT, prompt of {report.context_len}",
        f"at least {_ms(speed.ttft_ms)}, bound by {speed.prefill.bound}",
    )
    table.add_row(
        f"TPOT, {_requests(report)}",
        f"at least {_ms(speed.tpot_ms)}, bound by {speed.decode.bound}",
    )
    table.add_row("decode, all together", f"at most {speed.decode_tokens_per_s:,.0f} tokens/s")
    table.add_row(
        "decode compute-bound from",
        "no batch at this context" if batch is None else f"batch {batch}",
    )
    table.add_row(
        "price",
        f"{_usd(dollars.usd_per_hour)} an hour, at least "
        f"{_usd(dollars.usd_per_million_tokens)} a million tokens",
    )
    table.add_row("cold start", f"{dollars.cold_start_s:.0f} s, {_usd(dollars.usd_per_cold_start)}")
    return table


def _mig(report: SizeReport) -> RenderableType:
    if not report.mig:
        return f"[bold]MIG slices[/]\n{report.gpu.name} has no MIG."
    table = _table(f"MIG slices of one {report.gpu.name}", "", "usable GB", "fits", "replicas")
    for fit in report.mig:
        table.add_row(
            fit.profile.name,
            f"{fit.usable_gb:.1f}",
            "yes" if fit.fits else "no",
            f"{fit.replicas_per_gpu}",
            style="bold" if fit == report.best_mig else None,
        )
    return table


def _table(title: str, *columns: str, show_header: bool = True) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=show_header,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _requests(report: SizeReport) -> str:
    return f"{report.concurrency} request{'s' if report.concurrency > 1 else ''}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _count(billions: float) -> str:
    return f"{billions:.2f}B" if billions >= 1 else f"{billions * 1000:.1f}M"


def _gb(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{gigabytes:.2g} GB"


def _usd(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 0.1 else f"${dollars:.2g}"
