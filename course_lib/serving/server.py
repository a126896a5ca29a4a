"""`course serve`: a replica behind uvicorn, from its start to its last answer.

SIGTERM and Ctrl-C drain: new requests are refused, running ones finish as far as the drain policy
lets them, and the process ends with 0. A second signal ends it at once.
"""

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from course_lib.engine.llm import LLM
from course_lib.engine.startup import log_phase, log_to_stderr, process_age_s
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.api import Replica, create_app
from course_lib.serving.lifecycle import DrainPolicy, ReplicaState

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Uvicorn that drains the replica before it stops.

    Args:
        replica: what it serves.
        host: address to bind to.
        port: 0 takes a free one.
        warm_up_prompts: run before the replica is ready.
    """

    def __init__(
        self, replica: Replica, host: str, port: int, warm_up_prompts: Sequence[Any] = ()
    ) -> None:
        app = create_app(replica, warm_up_prompts)
        super().__init__(
            uvicorn.Config(
                app,
                host,
                port,
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_keep_alive=30,
                # For what the drain did not wait for: bodies half sent, answers not read.
                timeout_graceful_shutdown=math.ceil(replica.drain_policy.shutdown_margin_s),
            )
        )
        self.replica = replica
        self.announce = False  # whether to print the address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Remember the loop: a signal arrives outside of it."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.announce and self.started:
            print(f"{self.replica.llm.llm_engine}", flush=True)
            print(
                f"serving {self.replica.name} on {self.url} (Ctrl-C drains and stops)", flush=True
            )

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends the process."""
        if self._draining is not None:
            os._exit(128 + sig if sig != signal.SIGTERM else 0)
        if self._loop is None:  # not yet begun
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin to leave; call it on the loop."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self.replica.lifecycle.drain()
        except Exception as error:  # a policy with a mistake must not keep the process
            logger.error("the drain failed with %s: %s", type(error).__name__, error)
        finally:
            self.should_exit = True


class BackgroundServer:
    """A server in a thread of this process, for notebooks.

        with BackgroundServer(Replica(llm, "merchant-chat")) as server:
            print(server.url)

    or `start()` in one cell and `stop()` in another. A replica can be served once.

    Args:
        replica: what it serves.
        port: 0 takes a free one.
        warm_up_prompts: run before `start` returns.
    """

    def __init__(
        self, replica: Replica, port: int = 0, warm_up_prompts: Sequence[Any] = ()
    ) -> None:
        self.replica = replica
        self._server = Server(replica, "127.0.0.1", port, warm_up_prompts)
        self._thread = threading.Thread(target=self._server.run, name="server", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._server.url

    def start(self) -> "BackgroundServer":
        """Return when the replica is ready.

        Raises:
            OSError: the address cannot be used; the log says why.
        """
        self._thread.start()
        while not self._server.started or self.replica.lifecycle.state is ReplicaState.STARTING:
            if not self._thread.is_alive():
                raise OSError("the server did not start")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Let the requests that run finish, and end the thread."""
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> "BackgroundServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve_model(
    model: Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    max_queue: int,
    max_queue_age_s: float,
    drain_s: float,
    warm_up: Sequence[str],
    **engine_args: Any,
) -> None:
    """Load a model and serve it until the process is told to stop.

    The log says how long each phase of the start took; see `course_lib.engine.startup`.

    Args:
        model: checkpoint directory; its last part is the model's name in the API.
        host: address to bind to.
        port: of it.
        api_key: clients must show it, if there is one.
        max_queue: requests that may wait.
        max_queue_age_s: how long the oldest may have waited before new ones are refused.
        drain_s: from SIGTERM to the end, in seconds.
        warm_up: prompts whose beginnings the prefix cache shall hold.
        engine_args: of `LLM`.

    Raises:
        ValueError: an option or the checkpoint cannot work.
        OSError: the address cannot be used.
    """
    log_to_stderr()
    drain_policy = DrainPolicy(drain_s, min(1.0, drain_s))
    with listen(host, port) as listener:  # before the model, which takes long to load
        log_phase("imports", process_age_s())
        llm = LLM(model, **engine_args)
        replica = Replica(
            llm,
            model.resolve().name,
            AdmissionPolicy(max_num_queued_reqs=max_queue, max_queue_age_s=max_queue_age_s),
            drain_policy,
            api_key,
        )
        server = Server(replica, host, port, warm_up_prompts(llm, warm_up))
        server.announce = True
        server.run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        OSError: the address cannot be used; the message says which and why.
    """
    listener = None
    try:
        # Named TCP, as asyncio only then lets small writes go out at once.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None


def warm_up_prompts(llm: LLM, texts: Sequence[str]) -> list[list[int]]:
    """The given ones and a greeting, which has the chat template's own text.

    Raises:
        ValueError: one is empty or longer than the model's context.
    """
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(text) for text in ("Hello", *texts)]
    if tokenizer.chat_template is not None:
        greeting = [{"role": "user", "content": "Hello"}]
        prompts.append(llm.chat_prompt(greeting)["prompt_token_ids"])
    longest = llm.llm_engine.scheduler.max_request_tokens - 1
    for prompt in prompts:
        if not 0 < len(prompt) <= longest:
            raise ValueError(
                f"a warm-up prompt has {len(prompt)} tokens; it must have 1 to {longest}"
            )
    return prompts
