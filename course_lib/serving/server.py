"""`course serve`: a replica behind uvicorn, from its start to its last answer.

SIGTERM and Ctrl-C drain: new requests are refused, running ones finish as far as the drain policy
lets them, and the process ends with 0. A second signal ends it at once.
"""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from course_lib.engine.llm import LLM
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.api import Replica, create_app
from course_lib.serving.lifecycle import DrainPolicy


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
            uvicorn.Config(app, host, port, log_level="warning", timeout_keep_alive=30)
        )
        self.replica = replica
        self.announce = False  # whether to print the address
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
        return f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends the process."""
        if self._draining is not None:
            os._exit(128 + sig if sig != signal.SIGTERM else 0)
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin to leave; call it on the loop."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self.replica.lifecycle.drain()
        self.should_exit = True


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
    llm = LLM(model, **engine_args)
    replica = Replica(
        llm,
        model.name,
        AdmissionPolicy(max_num_queued_reqs=max_queue, max_queue_age_s=max_queue_age_s),
        DrainPolicy(drain_s, min(1.0, drain_s)),
        api_key,
    )
    greeting = llm.chat_prompt([{"role": "user", "content": "Hello"}])
    server = Server(replica, host, port, [greeting, *warm_up])
    server.announce = True
    server.run()
