"""A fleet on Ray Serve, from its start to its end, and what it looks like in between.

with RayFleet(FleetConfig(model, max_replicas=4), make_autoscaler) as fleet:
    print(fleet.url, fleet.view())
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from course_lib.fleet.control_loop import LoopDecision
from course_lib.fleet.ray_serve import APP, BOARD, Board, FleetConfig, MakeAutoscaler, application
from course_lib.serving.server import listen

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
        node: its address.
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
            OSError: the address cannot be used.
            ConnectionError: there is no Ray cluster at its address.
            RuntimeError: the replicas did not start.
        """
        config = self.config
        with listen(config.host, config.port) as free:  # before Ray, which takes long to start
            port = free.getsockname()[1]
        self.url = f"http://{config.host}:{port}"
        try:
            self.say("starting Ray" if config.address is None else "connecting to Ray")
            self._connect()
            board: Any = ray.remote(num_cpus=0)(Board)
            self.board = board.options(name=BOARD, namespace=APP).remote()
            ray.get(self.board.steps.remote(0))
            self.say("starting Ray Serve")
            serve.start(http_options={"host": config.host, "port": port}, logging_config=_QUIET)
            self.say(f"starting {config.min_replicas} of {config.max_replicas} replicas")
            serve.run(application(config, self.make_autoscaler), name=APP, logging_config=_QUIET)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

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
                r.get("node_ip"),
                values.get(r["replica_id"], {}),
            )
            for r in found
        ]
        return FleetView(replicas, last)

    def decisions(self) -> list[LoopDecision]:
        """The last thousand."""
        return ray.get(self.board.steps.remote(1000))

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        if self.config.address is not None:
            ray.init(self.config.address, log_to_driver=False, logging_level=logging.ERROR)
            return
        # A CPU is what Ray counts replicas by: one each, and one more for each that still drains.
        ray.init(
            "local",
            num_cpus=2 * self.config.max_replicas + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )

    def _leave(self) -> None:
        if not ray.is_initialized():
            return
        try:
            serve.delete(APP)  # returns when all have drained
        finally:
            ray.shutdown()  # ends what `ray.init` has begun
