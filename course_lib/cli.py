"""The `course` command: `course --help` lists what it can do."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from course_lib.data import DATA_DIR, DEFAULT_MODEL

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A course in which you build an LLM serving engine, and the engine itself.",
)
fleet = typer.Typer(no_args_is_help=True, help="Many replicas, on Ray Serve.")
app.add_typer(fleet, name="fleet")
console = Console(highlight=False)


@app.callback()
def main() -> None:
    """Keep `course COMMAND` the form of a call."""


@app.command()
def doctor() -> None:
    """Show what there is to run on and what to install for more."""
    from course_lib.doctor import examine

    table = Table("", "part", "found", "what to do", box=None, pad_edge=False)
    findings = examine()
    for finding in findings:
        mark = {True: "[green]ok[/]", False: "[red]!![/]", None: "[yellow]--[/]"}[finding.ok]
        table.add_row(mark, finding.name, escape(finding.value), escape(finding.hint))
    console.print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="Without it, a conversation.")] = None,
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System prompt instead of its own.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Ask the engine; the reply streams as it is generated."""
    from course_lib.chat import ChatSession

    try:
        with console.status(f"loading {model.name}"):
            session = ChatSession(model, system, max_tokens=max_tokens, temperature=temperature)
        console.print(f"[dim]{session.llm.llm_engine}[/]", soft_wrap=True)
        while True:
            text = console.input("[bold]you:[/] ") if message is None else message
            for piece in session.ask(text):
                console.print(piece, end="", markup=False, soft_wrap=True)
            console.print(f"\n[dim]{session.summary()}[/]", soft_wrap=True)
            if message is not None:
                break
    except (EOFError, KeyboardInterrupt):
        console.print()
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to bind to; 0.0.0.0 is everybody.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 2048,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = 256,
    max_queue_age: Annotated[float, typer.Option(min=0.1, help="Seconds, for the oldest.")] = 30.0,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds to finish in after SIGTERM.")] = 30,
    api_key: Annotated[
        str | None, typer.Option(envvar="COURSE_API_KEY", help="Clients must show it.")
    ] = None,
    warm_up: Annotated[
        list[str] | None, typer.Option(help="A prompt to run first; may be given several times.")
    ] = None,
) -> None:
    """Serve the model by OpenAI's API, until SIGTERM or Ctrl-C."""
    try:
        from course_lib.serving.server import serve_model
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is missing[/]: pip install -e '.\\[serve]'")
        raise typer.Exit(1) from None
    try:
        serve_model(
            model,
            host=host,
            port=port,
            api_key=api_key,
            max_queue=max_queue,
            max_queue_age_s=max_queue_age,
            drain_s=drain,
            warm_up=warm_up or [],
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    except (ValueError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None


@fleet.command()
def up(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    min_replicas: Annotated[int, typer.Option("--min", min=1, help="Never fewer replicas.")] = 1,
    max_replicas: Annotated[int, typer.Option("--max", min=1, help="Never more replicas.")] = 4,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; without it, this machine alone.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to; 0.0.0.0 is everybody.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests that run at once on a replica.")
    ] = 16,
    target: Annotated[
        float, typer.Option(min=0.1, help="Requests for each replica, running or waiting.")
    ] = 8,
    window: Annotated[
        float, typer.Option(min=0, help="Seconds of less need before it gets smaller.")
    ] = 60,
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between decisions.")] = 2,
    drain: Annotated[
        float, typer.Option(min=1, help="Seconds that a replica which leaves has to finish.")
    ] = 30,
    api_key: Annotated[
        str | None, typer.Option(envvar="COURSE_API_KEY", help="Clients must show it.")
    ] = None,
) -> None:
    """Serve the model with as many replicas as the load needs, until SIGTERM or Ctrl-C."""
    try:
        with console.status("loading Ray"):
            from course_lib.fleet.ray_serve import FleetConfig
            from course_lib.fleet_up import fleet_up
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is missing[/]: pip install -e '.\\[fleet]'")
        raise typer.Exit(1) from None
    from course_lib.classroom.parts import part

    try:
        config = FleetConfig(
            model.resolve(), min_replicas, max_replicas, host, port, api_key, address, interval,
            max_num_seqs, drain_s=drain,
        )  # fmt: skip
        fleet_up(config, part("autoscaler"), console, target_per_replica=target, window_s=window)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def parts() -> None:
    """Show which parts of the engine are your own."""
    from course_lib.classroom.parts import PARTS, is_own, parts_dir

    table = Table("part", "built in", "the engine runs on", box=None, pad_edge=False)
    for part in PARTS:
        own = f"[green]your own[/], {parts_dir().name}/{part.name}.py"
        table.add_row(part.name, part.built_in, own if is_own(part.name) else "the course's own")
    console.print(table)


@app.command()
def release(
    solutions: Annotated[Path, typer.Option(help="Complete notebooks.")] = DATA_DIR.parent
    / "solutions",
    labs: Annotated[Path, typer.Option(help="Where student notebooks go.")] = DATA_DIR.parent
    / "labs",
) -> None:
    """Write the student notebooks from the solutions, and the set-up cell of both."""
    from course_lib.classroom.release import release as write_labs
    from course_lib.classroom.release import write_setup_cells

    for path in [*write_setup_cells(solutions), *write_labs(solutions, labs)]:
        console.print(f"wrote {path}")


@app.command()
def grade(
    submitted: Annotated[Path, typer.Argument(help="{student}/{assignment}/{notebook}.ipynb")],
    out: Annotated[Path, typer.Option(help="Where marks and pages go.")],
    solutions: Annotated[Path, typer.Option(help="Complete notebooks.")] = DATA_DIR.parent
    / "solutions",
    workers: Annotated[int | None, typer.Option(min=1, help="At a time; default: cores.")] = None,
    cell_time: Annotated[float, typer.Option(min=1, help="Seconds, for each cell.")] = 120.0,
    memory: Annotated[int, typer.Option(min=512, help="MB, for each answer.")] = 4096,
) -> None:
    """Grade a folder of submissions. What has not changed since last time is kept."""
    try:
        from course_lib.classroom.grading.isolate import Limits
        from course_lib.classroom.grading.run import grade as grade_all
    except ModuleNotFoundError as error:
        console.print(f"[red]{error.name} is missing[/]: pip install -e '.\\[grading]'")
        raise typer.Exit(1) from None
    try:
        limits = Limits(cell_s=cell_time, memory_mb=memory)
        done = grade_all(submitted, out, solutions, limits=limits, workers=workers)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    table = Table("student", "points", "status", box=None, pad_edge=False)
    for row in done.rows:
        table.add_row(escape(row.student), f"{row.points:g} of {row.out_of:g}", row.status)
    console.print(table)
    if done.unknown:
        console.print(f"no such notebook in {solutions}: {escape(', '.join(done.unknown))}")
    console.print(f"{done.num_graded} graded now; isolation: {done.isolation}")
    console.print(f"[bold]{out / 'overview.html'}[/]", soft_wrap=True)


@app.command()
def size(
    model: Annotated[str, typer.Argument(help="Name in the catalogue, or path of a config.json.")],
    gpu: Annotated[str, typer.Option(help="Name in the catalogue.")] = "H100_80GB",
    context: Annotated[int, typer.Option(help="Tokens of a request, prompt and reply.")] = 8192,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 4,
    weights: Annotated[str | None, typer.Option(help="bf16, fp8, int8, int4, fp32.")] = None,
    kv: Annotated[str, typer.Option(help="Precision of the KV cache: bf16 or fp8.")] = "bf16",
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what fits, how many GPUs it takes, how fast it can be and what it costs."""
    from course_lib.size import as_json, as_tables
    from course_lib.sizing.report import size_report

    try:
        report = size_report(model, gpu, context, concurrency, weights=weights, kv=kv)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    if json:
        typer.echo(as_json(report))
    else:
        console.print(as_tables(report))


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    users: Annotated[int, typer.Option(min=1, help="The largest batch to expect.")] = 32,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="2048 or half the model's length if not given.")
    ] = None,
    computing_time: Annotated[
        bool,
        typer.Option(
            "--computing-time", help="Where others use the CPU: count what the thread computes."
        ),
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="Write it to data/measurements.")] = False,
) -> None:
    """Time the engine's steps here, for the fleet simulator."""
    from course_lib.engine.config import EngineConfig
    from course_lib.engine.engine import LLMEngine
    from course_lib.fleet import calibration as fleet

    clock = fleet.ComputingClock() if computing_time else time.monotonic

    try:
        with console.status(f"loading {model.name}"):
            engine = LLMEngine(EngineConfig(model), clock=clock)
        console.print(f"[dim]{engine}[/]", soft_wrap=True)
        found = fleet.calibrate(
            engine, max_users=users, max_prompt_tokens=max_prompt_tokens, show_progress=True
        )
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    costs = Table("a step takes", "microseconds", box=None, pad_edge=False)
    for name, seconds in asdict(found.step_time).items():
        costs.add_row(name.removesuffix("_s").replace("_", " "), f"{1e6 * seconds:.4g}")
    errors = Table(
        "kind", "steps", "measured ms", "predicted ms", "median error", "p95 error",
        box=None, pad_edge=False,
    )  # fmt: skip
    for row in found.errors:
        errors.add_row(
            row.kind, str(row.steps), f"{row.measured_ms:.2f}", f"{row.predicted_ms:.2f}",
            f"{row.median_error:.1%}", f"{row.p95_error:.1%}",
        )  # fmt: skip
    console.print(costs, "", errors)
    if save:
        console.print(f"wrote {fleet.save_calibration(found)}")


@app.command()
def manifests(
    spec: Annotated[Path, typer.Argument(help="What to run, as YAML.")] = DATA_DIR
    / "kubernetes"
    / "merchant-chat.yaml",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("k8s"),
) -> None:
    """Write Kubernetes manifests: server, autoscaling, machines, alerts and dashboard."""
    from course_lib.fleet.manifest_spec import read_spec
    from course_lib.fleet.manifests import write_manifests

    try:
        paths = write_manifests(read_spec(spec), out)
    except (ValueError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(
        "[dim]For a cluster with KEDA, Karpenter, the Prometheus operator and Grafana:[/] "
        f"kubectl apply -f {out}",
        soft_wrap=True,
    )


@app.command()
def load(
    url: Annotated[
        str, typer.Option(help="Of any server with OpenAI's API.")
    ] = "http://127.0.0.1:8000",
    users: Annotated[
        int | None, typer.Option(help="Closed loop: so many send when free. 8 if nothing is said.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: Poisson arrivals, requests/s.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals and lengths: Azure, BurstGPT, Mooncake.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Stop after so many. 64 if nothing ends it.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Send nothing after it, seconds.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="128, or 64:512 for uniform.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="64, or 16:128 for uniform.")] = "64",
    shared_prefix: Annotated[
        float, typer.Option(help="Share of each prompt that all have in common, 0 to 1.")
    ] = 0.0,
    vocab_size: Annotated[
        int | None, typer.Option(help="Send random token ids below it instead of words.")
    ] = None,
    trace_speed: Annotated[float, typer.Option(help="2 lets a trace come twice as fast.")] = 1.0,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Cut longer prompts of a trace.")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Cut longer replies of a trace.")
    ] = None,
    traffic_class: Annotated[
        list[str] | None,
        typer.Option("--class", help="paid,share=0.2,tenant=acme,priority=1; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    model: Annotated[str | None, typer.Option(help="The server's first one if not given.")] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    api_key: Annotated[
        str | None, typer.Option(envvar="COURSE_API_KEY", help="Sent as a bearer token.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help='"Name: value"; may be repeated.')
    ] = None,
    slo_ttft: Annotated[float, typer.Option(help="Objective for TTFT, seconds.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(help="Objective for TPOT, seconds.")] = 0.2,
    timeout: Annotated[float, typer.Option(help="Give a request up after it, seconds.")] = 600.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for replies of exactly the length given.")
    ] = True,
    usage: Annotated[bool, typer.Option(help="Ask the server to count tokens.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the whole report as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over time as an image.")] = None,
) -> None:
    """Send load to a server and report TTFT, TPOT, ITL, end-to-end times and goodput."""
    from course_lib.load import as_tables, parse_classes, parse_headers, parse_lengths
    from course_lib.serving import load_client
    from course_lib.traces.readers import read_trace

    if users is None and rate is None and trace is None:
        users = 8
    replays = trace is not None and users is None and rate is None
    if requests is None and duration is None and not replays:
        requests = 64
    try:
        workload = load_client.Workload(
            users=users,
            rate_per_s=rate,
            trace=None
            if trace is None
            else read_trace(
                trace,
                speed=trace_speed,
                max_prompt_tokens=max_prompt_tokens,
                max_output_tokens=max_output_tokens,
            ),
            num_requests=requests,
            duration_s=duration,
            prompt_tokens=parse_lengths("--prompt-tokens", prompt_tokens),
            output_tokens=parse_lengths("--output-tokens", output_tokens),
            shared_prefix=shared_prefix,
            vocab_size=vocab_size,
            classes=parse_classes(traffic_class or []),
            seed=seed,
        )
        report = load_client.load(
            url,
            workload,
            model=model,
            api=api,
            api_key=api_key,
            headers=parse_headers(header or []),
            slo=load_client.SLO(slo_ttft, slo_tpot),
            timeout_s=timeout,
            ignore_eos=ignore_eos,
            include_usage=usage,
        )
        console.print(as_tables(report))
        if output is not None:
            console.print(f"wrote {report.save(output)}")
        if plot is not None:
            from course_lib.classroom.plots import plot_latency_over_time

            plot.parent.mkdir(parents=True, exist_ok=True)
            plot_latency_over_time(report).savefig(plot)
            console.print(f"wrote {plot}")
    except (ValueError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(1) from None
    if not report.served:
        raise typer.Exit(1)
