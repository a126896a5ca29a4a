"""A fleet on Ray Serve, from its start to its end, and what it looks like in between.

with RayFleet(FleetConfig(model, max_replicas=4), make_autoscaler) as fleet:
    print(fleet.url, fleet.view())
"""

import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from course_lib.fleet.control_loop import LoopDecision
from course_lib.fleet.ray_serve import (
    APP,
    BOARD,
    ON_HEAD,
    Board,
    FleetConfig,
    MakeAutoscaler,
    application,
)
from course_lib.model.config import ModelConfig
from course_lib.model.tokenizer import Tokenizer
from course_lib.model.weights import check_weights
from course_lib.serving.server import listen

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Not a line for each request.
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


@dataclass(frozen=True)
class ReplicaView:
    """A replica as it is now.

    Args:
        name: unique in the fleet.
        state: Ray's: STARTING, RUNNING, STOPPING and so on.
        pid: of its process; None before there is one.
        node: Ray's name of its machine.
        values: what it reported last, by the names of `METRICS`.
    """

    name: str
    state: str
    pid: int | None
    node: str | None
    values: dict[str, float]


@dataclass(frozen=True)
class FleetView:
    """The fleet as it is now: its replicas, and the last decision with the metrics it stands on."""

    replicas: list[ReplicaView]
    last: LoopDecision | None


class RayFleet:
    """A fleet that is up inside a `with` block.

    Args:
        config: what it runs on.
        make_autoscaler: makes the one that decides; it is sent to Ray's controller.
        say: is told what is being waited for.
    """

    def __init__(
        self,
        config: FleetConfig,
        make_autoscaler: MakeAutoscaler,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.config = config
        self.make_autoscaler = make_autoscaler
        self.say = say

    def __enter__(self) -> "RayFleet":
        """Return when the first replicas are ready.

        Raises:
            ValueError: there is no checkpoint that can be served.
            OSError: the address cannot be used, or there is no Ray cluster at its own.
            RuntimeError: the replicas did not start.
        """
        config = self.config
        # Before Ray, which takes long to start.
        check_weights(ModelConfig.from_pretrained(config.model), config.model)
        Tokenizer(config.model)
        with ExitStack() as stack:
            port = self._connect()
            stack.callback(ray.shutdown)  # ends what `ray.init` has begun, here or on a cluster
            board: Any = ray.remote(**ON_HEAD)(Board)
            self.board = board.options(
                name=BOARD, namespace=APP, lifetime="detached", get_if_exists=True
            ).remote()
            stack.callback(ray.kill, self.board)
            self.say("starting Ray Serve")
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": config.host, "port": port},
                logging_config=_QUIET,
            )
            stack.callback(serve.delete, APP)  # returns when all have drained
            self.say(f"starting {config.min_replicas} of {config.max_replicas} replicas")
            try:
                serve.run(
                    application(config, self.make_autoscaler), name=APP, logging_config=_QUIET
                )
            except RuntimeError as error:
                raise RuntimeError(f"no replica has started: {_why() or error}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def view(self) -> FleetView:
        """The fleet now."""
        steps = ray.get(self.board.steps.remote(1))
        last = steps[-1] if steps else None
        values = {r.name: dict(r.values) for r in last.metrics.replicas} if last else {}
        client = serve.context._get_global_client()
        assert client is not None
        details = client.get_serve_details()
        found = details["applications"][APP]["deployments"]["Engine"]["replicas"]
        replicas = [
            ReplicaView(
                r["replica_id"],
                r["state"],
                r.get("pid"),
                r.get("node_id"),
                values.get(r["replica_id"], {}),
            )
            for r in found
        ]
        return FleetView(replicas, last)

    def decisions(self) -> list[LoopDecision]:
        """The last thousand."""
        return ray.get(self.board.steps.remote(1000))

    def _connect(self) -> int:
        """Have Ray. Returns the port to serve on."""
        config = self.config
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if config.address is not None:
            self.say(f"connecting to Ray at {config.address}")
            _check_reachable(config.address)
            ray.init(config.address, **options)
            self.url = f"http://{config.host}:{config.port}"
            return config.port
        with listen(config.host, config.port) as free:
            port = free.getsockname()[1]
        self.say("starting Ray")
        # A CPU is what Ray counts replicas by: one each, and one more for each that still drains.
        num_cpus = 2 * config.max_replicas + 1
        memory = 100 * 2**20  # for what actors send each other
        patiently(
            lambda: ray.init(
                "local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=memory,
                **options,
            )
        )  # fmt: skip
        self.url = f"http://{config.host}:{port}"
        return port


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes. Addresses that name no port, as "auto", are its own."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
    except OSError as error:
        raise OSError(
            f"no Ray cluster answers at {address} ({error}); `ray status` on its head node says "
            "its address"
        ) from None


def _why() -> str:
    """The last line of what the engines' deployment says of itself, which is the error."""
    message = serve.status().applications[APP].deployments["Engine"].message
    return message.strip().splitlines()[-1] if message else ""


def patiently(start: Callable[[], T]) -> T:
    """Start Ray, again if need be: it gives itself 30 s, which a busy machine may exceed."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:  # Ray raises a bare one
            if "timed out" not in str(error):
                raise
    return start()
