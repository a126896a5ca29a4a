"""Servers side by side under one load: ours, vLLM, SGLang, llama.cpp's, or any with OpenAI's API.

    python benchmarks/compare_servers.py --server ours=http://127.0.0.1:8000 \\
        --server vllm=http://127.0.0.1:8001 [--users 8 | --rate 4] [--rounds 3] [--output FILE]

Start the servers first, one after the other on the same device or each on its own of the same kind;
what else runs there is in the figures. Every server gets the same requests. They run in turn, in
each round in the opposite order, and each round has prompts of its own, as a prefix cache would
know those of the last one. A figure is the median of the rounds, the ratio is to the first server.

`--output` writes the rows, one for each server and round: `server`, `url`, `model`, `round`,
`requests`, `served`, `outcomes`, `requests_per_s`, `output_tokens_per_s`, `goodput_share`, and
`ttft`, `tpot`, `itl`, `e2e` at p50, p95 and p99, such as `ttft_p95_ms`.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from course_lib.load import notes, parse_lengths
from course_lib.measurements import measured_here
from course_lib.serving.load_client import SLO, LoadReport, ServerNotUsable, Workload, load
from course_lib.serving.load_report import LATENCIES

Row = dict[str, Any]

#: What the table shows: the field of a row, its label, and how to write it.
SHOWN = (
    ("output_tokens_per_s", "output tokens/s", "{:,.1f}"),
    ("requests_per_s", "requests/s", "{:.2f}"),
    ("goodput_share", "goodput, share", "{:.3f}"),
    *(
        (f"{latency}_{point}_ms", f"{'end to end' if latency == 'e2e' else latency.upper()} "
         f"{point} (ms)", "{:,.1f}")
        for latency in LATENCIES
        for point in ("p50", "p95", "p99")
    ),
)  # fmt: skip


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Values by name, from "NAME=VALUE"."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value or name in pairs:
            raise ValueError(f"{option} must be NAME=VALUE, each name once, got {text!r}")
        pairs[name] = value
    return pairs


def row_of(name: str, number: int, report: LoadReport) -> Row:
    """The figures of one server in one round; None where nothing was measured."""
    row: Row = {
        "server": name,
        "url": report.url,
        "model": report.model,
        "round": number,
        "requests": len(report.records),
        "served": len(report.served),
        "outcomes": report.outcomes,
        "requests_per_s": report.requests_per_s,
        "output_tokens_per_s": report.output_tokens_per_s,
        "goodput_share": report.goodput().share,
        "client_cpu_share": report.client_cpu_share,
    }
    for latency, found in report.latency.items():
        for point in ("p50", "p95", "p99"):
            time_s = getattr(found, point, None)
            row[f"{latency}_{point}_ms"] = None if time_s is None else 1000 * time_s
    return row


def comparison(rows: Sequence[Row]) -> Table:
    """Medians of each server, and their ratios to the first one."""
    names = list(dict.fromkeys(row["server"] for row in rows))
    table = Table("", title="Median of the rounds, and ratio to the first")
    for name in names:
        table.add_column(escape(name), justify="right")
    for key, label, form in SHOWN:
        medians = [median(rows, name, key) for name in names]
        cells = []
        for value in medians:
            if value is None:
                cells.append("--")
                continue
            ratio = f"  {value / medians[0]:5.2f}x" if medians[0] else "      --"
            cells.append(form.format(value) + ratio)
        table.add_row(label, *cells)
    return table


def median(rows: Sequence[Row], name: str, key: str) -> float | None:
    """Of one field over the rounds of a server; None if it was never measured."""
    values = [row[key] for row in rows if row["server"] == name and row[key] is not None]
    return statistics.median(values) if values else None


def run_rounds(
    servers: Mapping[str, str], rounds: int, workload: Workload, options: Mapping[str, Any],
    models: Mapping[str, str], console: Console,
) -> tuple[list[Row], dict[str, str], dict[str, list[str]]]:  # fmt: skip
    """Rows of all servers and rounds; why servers failed; what to know about those that did not."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    remarks: dict[str, list[str]] = {}
    # Seeds below those of the rounds, so that nobody has seen a prompt before it is measured.
    warm_up = replace(workload, users=1, rate_per_s=None, num_requests=2, duration_s=None, seed=-1)
    for number in range(1, rounds + 1):
        order = list(servers) if number % 2 else list(servers)[::-1]
        for name in order:
            if name in failed:
                continue
            console.print(f"round {number}: {escape(name)}")
            told = {**options, "model": models.get(name)}
            try:
                if number == 1:
                    load(servers[name], warm_up, show_progress=False, **told)
                this_round = replace(workload, seed=workload.seed + number)
                report = load(servers[name], this_round, **told)
            except ServerNotUsable as error:
                failed[name] = str(error)
                continue
            row = row_of(name, number, report)
            rows.append(row)
            if row["served"] == 0:
                failed[name] = f"served nothing: {report.reasons}"
            elif row["served"] < row["requests"]:
                missing = row["requests"] - row["served"]
                remarks.setdefault(name, []).append(
                    f"round {number}: {missing} of {row['requests']} not served: {report.reasons}"
                )
            remarks.setdefault(name, []).extend(f"round {number}: {n}" for n in notes(report))
    rows.sort(key=lambda row: (list(servers).index(row["server"]), row["round"]))
    return rows, failed, remarks


def main(
    server: Annotated[list[str], typer.Option(help="NAME=URL; one for each server.")],
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL, if not the server's first one.")
    ] = None,
    users: Annotated[int | None, typer.Option(help="Closed loop; 8 if nothing is said.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop, Poisson, requests/s.")] = None,
    requests: Annotated[int, typer.Option(help="Of each server in each round.")] = 64,
    prompt_tokens: Annotated[str, typer.Option(help="128, or 64:512 for uniform.")] = "64:256",
    output_tokens: Annotated[str, typer.Option(help="64, or 16:128 for uniform.")] = "16:128",
    shared_prefix: Annotated[float, typer.Option(help="Share that prompts have in common.")] = 0.0,
    vocab_size: Annotated[int | None, typer.Option(help="Send token ids below it.")] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    slo_ttft: Annotated[float, typer.Option(help="Objective for TTFT, seconds.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for TPOT, seconds.")] = 0.2,
    timeout: Annotated[float, typer.Option(help="Of each request, seconds.")] = 600.0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for replies of the length given.")] = True,
    usage: Annotated[bool, typer.Option(help="Ask the servers to count tokens.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="All servers this often.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and arrivals.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
) -> None:
    """Run the same load against each server in turn and print their figures side by side."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        servers = parse_pairs("--server", server)
        models = parse_pairs("--model", model or [])
        if unknown := models.keys() - servers.keys():
            raise ValueError(f"--model names {', '.join(unknown)}, which no --server is called")
        workload = Workload(
            users=8 if users is None and rate is None else users,
            rate_per_s=rate,
            num_requests=requests,
            prompt_tokens=parse_lengths("--prompt-tokens", prompt_tokens),
            output_tokens=parse_lengths("--output-tokens", output_tokens),
            shared_prefix=shared_prefix,
            vocab_size=vocab_size,
            seed=seed,
        )
        options: dict[str, Any] = {
            "api": api, "slo": SLO(slo_ttft, slo_tpot), "timeout_s": timeout,
            "ignore_eos": ignore_eos, "include_usage": usage,
        }  # fmt: skip
        rows, failed, remarks = run_rounds(servers, rounds, workload, options, models, console)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(1) from None
    if rows:
        console.print(comparison(rows))
    for name, texts in remarks.items():
        for text in texts:
            console.print(f"[yellow]{escape(name)}[/], {escape(text)}")
    for name, why in failed.items():
        console.print(f"[red]{escape(name)} failed:[/] {escape(why)}")
    measurement = measured_here("compare_servers", rows)
    console.print(f"{rounds} rounds of {requests} requests, load generator on {measurement.origin}")
    if output is not None:
        written = {**asdict(measurement), "workload": workload.describe(), "failed": failed}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {output}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
