"""The `course` command: `course --help` lists what it can do."""

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
    """Write the student notebooks from the solutions."""
    from course_lib.classroom.release import release as write_labs

    for path in write_labs(solutions, labs):
        console.print(f"wrote {path}")


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
