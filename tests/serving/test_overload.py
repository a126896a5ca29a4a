"""Ten times more load than capacity: everybody gets an answer, those who get in are served well.

20 seconds, or 60 with `--soak`. The times are compared with those of the same server just before.
"""

import asyncio
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from course_lib.serving.load_client import LoadReport, Workload, run_load
from course_lib.serving.scrape import scrape
from tests.serving.servers import ServeProcess, assert_shows_no_internals, idle, wait_until

MAX_NUM_SEQS = 8


@pytest.fixture(scope="module")
def server() -> Iterator[ServeProcess]:
    with ServeProcess(
        "--max-num-seqs", str(MAX_NUM_SEQS), "--max-queue", "16", "--max-queue-age", "10"
    ) as server:
        yield server


def run(server: ServeProcess, **workload: object) -> LoadReport:
    """Chatty requests of one size, streamed."""
    planned = Workload(
        prompt_tokens=32, output_tokens=100, vocab_size=2048, **workload  # type: ignore[arg-type]
    )  # fmt: skip
    return asyncio.run(run_load(server.url, planned, timeout_s=60))


def fill_kv_cache(server: ServeProcess) -> None:
    """Its pages take memory when they are first written, and that is no leak."""
    # 36,000 different tokens; the cache has 32,768, room for every request at its longest.
    planned = Workload(
        users=MAX_NUM_SEQS, num_requests=40, prompt_tokens=900, output_tokens=1, vocab_size=2048
    )
    assert asyncio.run(run_load(server.url, planned, timeout_s=120)).outcomes == {"ok": 40}


def p99_ms(report: LoadReport) -> float:
    """Of the times between tokens of all requests that were served."""
    times_s = [itl_s for record in report.served for itl_s in record.itl_s]
    return float(np.percentile(times_s, 99)) * 1000


def memory_mib(server: ServeProcess) -> float:
    """Resident memory of the server's process; 0 where the system does not tell."""
    path = Path(f"/proc/{server.process.pid}/status")
    if not path.exists():
        return 0.0
    line = next(line for line in path.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_ten_times_too_much(
    server: ServeProcess, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 60 if pytestconfig.getoption("--soak") else 20
    found = []
    for attempt in range(2):  # other work on the machine may spoil one of the measurements
        found.append(overload(server, seconds if attempt == 0 else 10))
        if all(found[-1].values()):
            break
    with capsys.disabled():
        print()
        for line in LINES:
            print(line)
    gone = [name for name in found[0] if not any(values[name] for values in found)]
    if gone:
        warnings.warn(f"twice missed: {', '.join(gone)}; see the printed figures", stacklevel=1)
    wait_until(lambda: idle(server.url), what="the engine is idle")
    assert_shows_no_internals(server.output)


LINES: list[str] = []


def overload(server: ServeProcess, seconds: int) -> dict[str, bool]:
    """Baseline, overload, and the same as before. Returns whether the times were kept."""
    before = run(server, users=MAX_NUM_SEQS, num_requests=4 * MAX_NUM_SEQS)
    assert before.outcomes == {"ok": 4 * MAX_NUM_SEQS}
    rate_per_s = 10 * before.requests_per_s
    # The first seconds fill what is filled once: connections, caches, the queue.
    run(server, rate_per_s=rate_per_s, duration_s=seconds / 4)
    fill_kv_cache(server)
    start_mib = memory_mib(server)
    refused_before = scrape(server.url).value("vllm:admission_rejections_total")
    during = run(server, rate_per_s=rate_per_s, duration_s=seconds * 3 / 4)
    grown_mib = memory_mib(server) - start_mib
    after = run(server, users=MAX_NUM_SEQS, num_requests=4 * MAX_NUM_SEQS)

    # Every request has an answer: none is cut, none hangs, none fails otherwise.
    assert set(during.outcomes) == {"ok", "refused"}, (during.outcomes, during.reasons)
    assert set(during.statuses) <= {"200", "429", "503"}, during.statuses
    assert all(r.retry_after_s for r in during.records if not r.ok)
    assert after.outcomes == {"ok": 4 * MAX_NUM_SEQS}
    refused = scrape(server.url).value("vllm:admission_rejections_total") - refused_before
    assert refused == during.outcomes["refused"]
    assert grown_mib < 20, f"memory grew by {grown_mib:.0f} MiB in {seconds * 3 / 4:.0f} s"
    LINES.append(
        f"capacity {before.requests_per_s:.1f} requests/s; offered {len(during.records)} in "
        f"{during.duration_s:.0f} s: {during.outcomes['ok']} served "
        f"({len(during.served) / during.duration_s:.1f}/s), {during.outcomes['refused']} refused; "
        f"p99 between tokens {p99_ms(before):.0f} -> {p99_ms(during):.0f} ms; afterwards "
        f"{after.requests_per_s:.1f} requests/s; memory {grown_mib:+.1f} MiB"
    )
    return {
        "p99 within 3 times": p99_ms(during) <= 3 * p99_ms(before),
        "full speed afterwards": after.requests_per_s >= 0.7 * before.requests_per_s,
        "still serving at half its rate": len(during.served) / during.duration_s
        >= 0.5 * before.requests_per_s,
    }
