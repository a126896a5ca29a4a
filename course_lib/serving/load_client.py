"""A load generator for any server that speaks OpenAI's API: vLLM, SGLang, llama.cpp, or ours.

    from course_lib.serving.load_client import Workload, load
    report = load("http://127.0.0.1:8000", Workload(users=8, num_requests=64))
    print(report.latency["ttft"], report.goodput())

`course load` is the same as a command. Every request streams, so that the times of tokens are seen
as a caller sees them, and every one that fails is in the report with its reason.
"""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from tqdm.auto import tqdm

from course_lib.serving.http_client import HttpClient, Response
from course_lib.serving.load_report import SLO, LoadReport, RequestRecord
from course_lib.serving.workload import PlannedRequest, TrafficClass, Workload
from course_lib.validation import known_name, number

__all__ = [
    "SLO",
    "LoadReport",
    "RequestRecord",
    "ServerNotUsable",
    "TrafficClass",
    "Workload",
    "load",
    "run_load",
]

Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

#: A user of a closed loop whose request failed waits so long, unless the server says how long.
PAUSE_AFTER_FAILURE_S = 0.1

#: It does not stay away longer than this, as OpenAI's own client.
MAX_RETRY_AFTER_S = 60.0

#: Statuses by which a server says that it has no room now.
REFUSALS = (429, 503)


class ServerNotUsable(ConnectionError):
    """The server cannot be reached or asked; the message is one sentence for the user."""


async def run_load(
    url: str,
    workload: Workload,
    *,
    model: str | None = None,
    api: Api = "completions",
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    slo: SLO | None = None,
    timeout_s: float = 600.0,
    ignore_eos: bool = True,
    include_usage: bool = True,
    on_progress: Callable[[RequestRecord], None] | None = None,
) -> LoadReport:
    """Send a workload to a server and report what came back, and when.

    Args:
        url: of the server, with or without `/v1`.
        workload: what to send, and when.
        model: name to ask for; the first of the server's list if not given.
        api: "completions" sends prompts, "chat" sends them as the message of a user.
        api_key: sent as `Authorization: Bearer`.
        headers: sent with each request.
        slo: for the goodput; MLPerf's if not given.
        timeout_s: for each request, from sending it to its last event.
        ignore_eos: ask for replies of exactly the length of the workload. vLLM, SGLang, llama.cpp
            and ours know it; for a server that refuses the field, switch it off.
        include_usage: ask the server to count tokens; for a server that refuses
            `stream_options`, switch it off, and chunks are counted.
        on_progress: called with each request that has ended.

    Raises:
        ServerNotUsable: the server cannot be reached, or has no model to ask.
        ValueError: an argument is out of range.
    """
    known_name("api", api, PATHS)
    number("timeout_s", timeout_s, above=0)
    if api == "chat" and workload.vocab_size is not None:
        raise ValueError('vocab_size asks for prompts of token ids; api="chat" takes only text')
    base = url.rstrip("/").removesuffix("/v1")
    sent_headers = _checked_headers(headers or {}, api_key)
    client = HttpClient(base)
    try:
        name = await _choose_model(client, base, model, sent_headers)
        body: dict[str, Any] = {"model": name, "temperature": 0, "stream": True}
        if include_usage:
            body["stream_options"] = {"include_usage": True}
        if ignore_eos:
            body["ignore_eos"] = True
        run = _Run(client, api, body, sent_headers, timeout_s, on_progress)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        cpu_s = time.thread_time()
        if workload.users is None:
            await run.open_loop(workload)
        else:
            await run.closed_loop(workload)
    finally:
        await client.close()
    records = sorted(run.records, key=lambda record: record.index)
    first_s = min((record.start_s for record in records), default=0.0)
    return LoadReport(
        url=base,
        model=name,
        api=api,
        workload=workload.describe(),
        slo=slo or SLO(),
        started_at=started_at,
        duration_s=max((record.end_s for record in records), default=0.0) - first_s,
        client_cpu_s=time.thread_time() - cpu_s,
        records=records,
    )


def load(
    url: str,
    workload: Workload,
    *,
    show_progress: bool = True,
    on_progress: Callable[[RequestRecord], None] | None = None,
    **options: Any,
) -> LoadReport:
    """`run_load` for callers that do not await, with a progress bar; works in notebooks, too.

    Args:
        url: of the server.
        workload: what to send, and when.
        show_progress: show the bar.
        on_progress: called with each request that has ended.
        options: the others of `run_load`.

    Raises:
        ServerNotUsable: the server cannot be reached, or has no model to ask.
        ValueError: an argument is out of range.
    """
    counts: dict[str, int] = {}
    with tqdm(
        total=workload.expected_requests,
        desc="load",
        unit="request",
        delay=0.1,  # nothing is shown of a run that cannot start
        disable=not show_progress,
    ) as bar:

        def advance(record: RequestRecord) -> None:
            bar.update()
            if not record.ok:
                counts[record.outcome] = counts.get(record.outcome, 0) + 1
                bar.set_postfix(counts, refresh=False)
            if on_progress is not None:
                on_progress(record)

        return _run_to_end(lambda: run_load(url, workload, on_progress=advance, **options))


def _run_to_end(start: Callable[[], Awaitable[LoadReport]]) -> LoadReport:
    """Run a coroutine; in a thread where a loop runs already, as in a notebook."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
    found: list[LoadReport | BaseException] = []

    async def main() -> LoadReport:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await start()

    def run() -> None:
        try:
            found.append(asyncio.run(main()))
        except BaseException as error:
            found.append(error)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    thread = threading.Thread(target=run, name="load", daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:  # the cell was stopped, and so must the load be
        for loop, task in running:
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class _Run:
    """The requests of one run: sends each and keeps its record."""

    def __init__(
        self,
        client: HttpClient,
        api: Api,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
        timeout_s: float,
        on_progress: Callable[[RequestRecord], None] | None,
    ) -> None:
        self.records: list[RequestRecord] = []
        self._client, self._api = client, api
        self._body, self._headers = body, headers
        self._timeout_s, self._on_progress = timeout_s, on_progress
        self._start = time.perf_counter()

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._start

    async def open_loop(self, workload: Workload) -> None:
        """Send each request when its time has come, whatever became of the others."""
        async with asyncio.TaskGroup() as tasks:
            for plan in workload.requests():
                await asyncio.sleep(max(0.0, (plan.arrival_s or 0.0) - self.now_s()))
                tasks.create_task(self.send(plan))

    async def closed_loop(self, workload: Workload) -> None:
        """Let each user send its next request when the last one has ended."""
        plans = workload.requests()
        end_s = workload.duration_s or float("inf")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(workload.users or 0):
                tasks.create_task(self._user(plans, end_s))

    async def _user(self, plans: Iterator[PlannedRequest], end_s: float) -> None:
        while self.now_s() < end_s:
            plan = next(plans, None)
            if plan is None:
                return
            record = await self.send(plan)
            if not record.ok:
                wanted_s = record.retry_after_s
                pause_s = PAUSE_AFTER_FAILURE_S if wanted_s is None else wanted_s
                pause_s = min(pause_s, MAX_RETRY_AFTER_S, max(0.0, end_s - self.now_s()))
                await asyncio.sleep(pause_s)

    async def send(self, plan: PlannedRequest) -> RequestRecord:
        """Send one request, read its reply to the end and keep the record."""
        body, headers = self._message(plan)
        record = RequestRecord(
            plan.index,
            plan.traffic_class.name,
            plan.prompt_tokens,
            plan.output_tokens,
            plan.traffic_class.tenant,
            plan.traffic_class.priority,
            plan.arrival_s,
            start_s=self.now_s(),
        )
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.request(
                    "POST", PATHS[self._api], headers=headers, body=body
                ) as response,
            ):
                record.status = response.status
                if response.status == 200:
                    await _Stream(record, self.now_s).read(response)
                else:
                    await _read_failure(record, response)
        except TimeoutError as error:
            _fail(record, "timeout", "timeout", str(error) or f"not done in {self._timeout_s:g} s")
        except OSError as error:
            outcome = "connection_error" if record.status is None else "cut"
            _fail(record, outcome, type(error).__name__, str(error))
        record.end_s = record.end_s or self.now_s()
        self.records.append(record)
        if self._on_progress is not None:
            self._on_progress(record)
        return record

    def _message(self, plan: PlannedRequest) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a request."""
        body = {**self._body, "max_tokens": plan.output_tokens}
        if self._api == "chat":
            body["messages"] = [{"role": "user", "content": plan.prompt}]
        else:
            body["prompt"] = plan.prompt
        headers = {"content-type": "application/json", **self._headers}
        if plan.traffic_class.priority is not None:
            body["priority"] = plan.traffic_class.priority
        if plan.traffic_class.tenant is not None:
            headers["X-Tenant"] = plan.traffic_class.tenant
        return json.dumps(body).encode(), headers


class _Stream:
    """Reads the events of one reply into its record."""

    def __init__(self, record: RequestRecord, now_s: Callable[[], float]) -> None:
        self._record, self._now_s = record, now_s
        self._ended = False

    async def read(self, response: Response) -> None:
        """Read to the end of the body, and name what was missing."""
        record = self._record
        rest = b""
        try:
            async for block in response.blocks():
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        self._event(line[5:].strip())
            if rest.startswith(b"data:"):
                self._event(rest[5:].strip())
        except ConnectionError:
            if not self._ended:
                raise
        finally:
            if not record.counted_by_server:
                record.output_tokens = len(record.chunk_times_s)
        if not record.ok:
            return
        if not self._ended and record.finish_reason is None:
            _fail(record, "cut", "no_final_event", "neither [DONE] nor a finish_reason came")
        elif not record.chunk_times_s:
            _fail(record, "empty", "no_text", "no chunk of the reply had text")

    def _event(self, data: bytes) -> None:
        record = self._record
        if data == b"[DONE]":
            self._ended = True
            record.end_s = self._now_s()
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                reason, message = _said(event)
                _fail(record, "stream_error", reason, message)
                return
            for choice in event.get("choices") or ():
                if _has_text(choice):
                    record.chunk_times_s.append(self._now_s())
                if choice.get("finish_reason"):
                    record.finish_reason = choice["finish_reason"]
            if usage := event.get("usage"):
                record.output_tokens = int(usage["completion_tokens"])
                record.prompt_tokens = usage.get("prompt_tokens")
                record.counted_by_server = True
        except (ValueError, TypeError, KeyError, AttributeError):
            text = data[:80].decode("utf-8", "replace")
            _fail(record, "stream_error", "not_an_event", f"{text!r} is no event of this API")


def _has_text(choice: Mapping[str, Any]) -> bool:
    """Whether a chunk of either API carries something that the model wrote."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    if not delta:
        return False
    # Servers name the thoughts of a reasoning model differently.
    keys = ("content", "reasoning_content", "reasoning", "tool_calls")
    return any(delta.get(key) for key in keys)


async def _read_failure(record: RequestRecord, response: Response) -> None:
    """Keep what a server said that answered with something else than a stream."""
    record.retry_after_s = _retry_after_s(response.headers.get("retry-after"))
    body = await response.read()
    try:
        reason, message = _said(json.loads(body))
    except ValueError:
        reason, message = None, body[:200].decode("utf-8", "replace").strip()
    outcome = "refused" if response.status in REFUSALS else "http_error"
    _fail(record, outcome, reason or f"status {response.status}", message)


def _said(reply: Any) -> tuple[str | None, str]:
    """Name and sentence of an error, in the shapes in which servers give them."""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    if not isinstance(error, dict):
        return None, str(error)
    message = error.get("message") or error.get("detail") or error
    for key in ("code", "type"):
        if isinstance(error.get(key), str):
            return error[key], str(message)
    return None, str(message)


def _fail(record: RequestRecord, outcome: str, reason: str | None, message: str) -> None:
    record.outcome, record.reason, record.message = outcome, reason or outcome, message


def _retry_after_s(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which is a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds < float("inf") else None


def _checked_headers(headers: Mapping[str, str], api_key: str | None) -> dict[str, str]:
    checked = dict(headers)
    if api_key is not None:
        checked["Authorization"] = f"Bearer {api_key}"
    for name, value in checked.items():
        if not (f"{name}{value}".isprintable() and f"{name}{value}".isascii() and name):
            raise ValueError(f"header {name!r} must be of printable ASCII characters")
    return checked


async def _choose_model(
    client: HttpClient, url: str, model: str | None, headers: Mapping[str, str]
) -> str:
    """The model to ask for; finds out whether the server can be reached before anything is sent."""
    try:
        async with (
            asyncio.timeout(30),
            client.request("GET", "/v1/models", headers=headers) as response,
        ):
            body = await response.read()
    except TimeoutError:
        raise ServerNotUsable(f"{url} did not answer within 30 s; is the server ready?") from None
    except OSError as error:
        raise ServerNotUsable(
            f"cannot reach a server at {url} ({error}); is it running, and is the port right?"
        ) from None
    if model is not None:
        return model
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise ServerNotUsable(
            f"{url}/v1/models answered {response.status} and names no model; give model, "
            "and api_key if the server asks for one"
        ) from None
