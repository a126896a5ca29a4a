"""What `course load` reads from its options, and the report as it shows it in a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from course_lib.serving.load_report import LATENCIES, OUTCOMES, LoadReport, Percentiles
from course_lib.serving.workload import TrafficClass
from course_lib.traces.lengths import Lengths

#: From here on the notes warn that the load generator's own speed is in the figures.
BUSY_CLIENT_SHARE, LATE_CLIENT_S = 0.8, 0.1


def parse_lengths(option: str, text: str) -> Lengths:
    """A length in tokens from "128", or the limits of a uniform distribution from "64:512".

    Raises:
        ValueError: the text is neither; the message names the option.
    """
    try:
        numbers = tuple(int(part) for part in text.split(":"))
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise ValueError(f"{option} must be like 128 or 64:512, got {text!r}")


def parse_classes(texts: Sequence[str]) -> tuple[TrafficClass, ...]:
    """Traffic classes from "name,share=0.8,tenant=acme,priority=1"; one for all if there are none.

    Raises:
        ValueError: a text is of another form, or a share is no number.
    """
    return tuple(map(_parse_class, texts)) or (TrafficClass(),)


def _parse_class(text: str) -> TrafficClass:
    name, *options = text.split(",")
    fields = dict(option.partition("=")[::2] for option in options)
    if not name or not set(fields) <= {"share", "tenant", "priority"} or "" in fields.values():
        raise ValueError(
            f"--class must be like paid,share=0.2,tenant=acme,priority=1, got {text!r}"
        )
    try:
        share = float(fields.get("share", "1"))
        priority = int(fields["priority"]) if "priority" in fields else None
    except ValueError:
        raise ValueError(f"share and priority of --class {text!r} must be numbers") from None
    return TrafficClass(name, share, fields.get("tenant"), priority)


def parse_headers(texts: Sequence[str]) -> dict[str, str]:
    """Headers from "Name: value".

    Raises:
        ValueError: a text has no colon.
    """
    for text in texts:
        if ":" not in text:
            raise ValueError(f'--header must be like "X-Name: value", got {text!r}')
    pairs = (text.split(":", 1) for text in texts)
    return {name.strip(): value.strip() for name, value in pairs}


def as_tables(report: LoadReport) -> RenderableType:
    """The report for a terminal of 80 columns or more."""
    blocks: list[RenderableType] = [_headline(report), _latencies(report), _rates(report)]
    if len(report.class_names) > 1:
        blocks.append(_classes(report))
    if report.outcomes.keys() != {"ok"}:
        blocks.append(_failures(report))
    blocks += [f"[yellow]Note:[/] {escape(note)}" for note in notes(report)]
    return Group(*(part for block in blocks for part in (block, "")))


def notes(report: LoadReport) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = []
    served = report.served
    if served and not report.counted_by_server:
        found.append(
            "the server did not count tokens, so chunks were counted; a chunk may hold several"
        )
    if report.other_length:
        found.append(
            f"{report.other_length} of {len(served)} replies were not as long as asked for"
        )
    counted = [r for r in served if r.prompt_tokens is not None]
    asked = sum(r.asked_prompt_tokens for r in counted)
    prompt_tokens = sum(r.prompt_tokens or 0 for r in counted)
    if report.api == "completions" and asked and not 0.8 <= prompt_tokens / asked <= 1.25:
        found.append(
            f"the server counted {prompt_tokens / asked:.2f} tokens for each word of the prompts; "
            "--vocab-size sends token ids, so that lengths are exact"
        )
    if report.client_cpu_share > BUSY_CLIENT_SHARE:
        found.append(
            f"the load generator itself used {report.client_cpu_share:.0%} of a core, so it may "
            "have delayed what it measured"
        )
    lag_s = report.send_lag_p99_s
    if lag_s is not None and lag_s > LATE_CLIENT_S:
        found.append(f"requests were sent up to {lag_s:.2f} s (p99) later than planned")
    said = {record.message or "" for record in report.records if record.outcome == "http_error"}
    for field, option in (("ignore_eos", "--no-ignore-eos"), ("stream_options", "--no-usage")):
        if any(field in message for message in said):
            found.append(f"the server does not take {field}; {option} leaves it out")
    return found


def _headline(report: LoadReport) -> str:
    count = len(report.records)
    return (
        f"[bold]{escape(report.model)}[/] at {escape(report.url)}, {report.api}\n"
        f"{count} request{'s' * (count != 1)} in {report.duration_s:.1f} s, {_arrivals(report)}"
    )


def _arrivals(report: LoadReport) -> str:
    workload = report.workload
    if workload["users"] is not None:
        return f"closed loop of {workload['users']} users"
    if workload["rate_per_s"] is not None:
        return f"open loop, Poisson arrivals at {workload['rate_per_s']:g}/s"
    return f"open loop, arrivals of {workload['trace']['name']}"


def _latencies(report: LoadReport) -> Table:
    table = _table("Latency (ms)", "", "p50", "p95", "p99", "mean", "values")
    for name in LATENCIES:
        table.add_row(_LABELS[name], *_milliseconds(report.latency[name]))
    return table


_LABELS = {
    "ttft": "TTFT, to the first token",
    "tpot": "TPOT, each token after it",
    "itl": "ITL, between two chunks",
    "e2e": "end to end",
}


def _milliseconds(found: Percentiles | None) -> list[str]:
    if found is None:
        return ["--"] * 4 + ["0"]
    times = (found.p50, found.p95, found.p99, found.mean)
    return [*(f"{1000 * time_s:,.1f}" for time_s in times), str(found.count)]


def _rates(report: LoadReport) -> Table:
    goodput, slo = report.goodput(), report.slo
    table = _table("Rates", "", "", "", show_header=False)
    table.add_row("requests/s", f"{report.requests_per_s:.2f}", "served to the end")
    table.add_row("output tokens/s", f"{report.output_tokens_per_s:,.1f}", "")
    table.add_row(
        "goodput, requests/s",
        f"{goodput.rate_per_s:.2f}",
        f"{goodput.share:.1%} had TTFT up to {slo.ttft_s:g} s and TPOT up to {slo.tpot_s:g} s",
    )
    return table


def _classes(report: LoadReport) -> Table:
    table = _table("Classes", "", "sent", "served", "TTFT p50", "TTFT p95", "TTFT p99", "goodput")
    for name in report.class_names:
        part = report.of_class(name)
        ttft = _milliseconds(part.latency["ttft"])[:3]
        served, share = len(part.served), part.goodput().share
        table.add_row(escape(name), str(len(part.records)), str(served), *ttft, f"{share:.1%}")
    return table


def _failures(report: LoadReport) -> Table:
    """How requests ended, with the first message of each kind."""
    table = _table("How requests ended", "", "", "", show_header=False)
    for outcome, count in report.outcomes.items():
        table.add_row(outcome.replace("_", " "), str(count), OUTCOMES[outcome])
        for reason, number in report.reasons.items():
            kind, _, name = reason.partition(": ")
            if kind == outcome:
                said = next(
                    r.message for r in report.records if r.outcome == kind and r.reason == name
                )
                table.add_row("", "", f"[dim]{number} {escape(f'{name}: {said}')}[/]")
    return table


def _table(title: str, *columns: str, show_header: bool = True) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False,
        show_header=show_header,
    )  # fmt: skip
    for index, column in enumerate(columns):
        is_text = index == 0 or (not show_header and index == 2)
        table.add_column(column, justify="left" if is_text else "right")
    return table
