"""Many replicas for real: the serving app on Ray Serve, on one machine or on a cluster.

    serve.run(application(FleetConfig(model, max_replicas=4), make_autoscaler))

A request comes through Ray's proxy to `Front`, which is the `Gateway`, and from there to an
`Engine`, which is the application of `course serve` in an actor. Ray Serve keeps as many engines up
as `ServePolicy` says.
"""

import asyncio
import base64
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from prometheus_client import Counter, Histogram
from ray import cloudpickle, serve
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from course_lib.engine.llm import LLM
from course_lib.fleet.control_loop import Clock, LoopDecision, SafeAutoscaler
from course_lib.fleet.gateway import Answer, Call, Gateway, Head, ReplicaLost
from course_lib.fleet.ray_policy import RECEIVED, TTFT, ReplicaReport, ServePolicy
from course_lib.fleet.ray_router import PrefixRequestRouter
from course_lib.model.tokenizer import Tokenizer
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.api import Replica, create_app
from course_lib.serving.errors import ApiError
from course_lib.serving.guard import Guard
from course_lib.serving.lifecycle import DrainPolicy, ReplicaState
from course_lib.serving.metrics import TTFT_EDGES
from course_lib.serving.server import warm_up_prompts
from course_lib.validation import number, whole_number

APP = "course"
BOARD = "course-decisions"

#: Where Ray's proxy is too. The other machines may be taken away, as spot machines are.
ON_HEAD: dict[str, Any] = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}

MakeAutoscaler = Callable[[Clock], SafeAutoscaler]


@dataclass(frozen=True)
class FleetConfig:
    """What a fleet runs on.

    Args:
        model: checkpoint directory; on a cluster each node needs it there.
        min_replicas: never fewer.
        max_replicas: never more.
        host: address to bind to.
        port: of it.
        api_key: clients must show it, if there is one.
        address: of a Ray cluster; without it, one begins here and ends with the fleet.
        interval_s: from one decision to the next.
        max_num_seqs: requests that run at once on a replica.
        max_queue: requests that may wait at the gateway; others are refused.
        drain_s: a replica that leaves has so long to finish.

    Raises:
        ValueError: a number is out of its range.
    """

    model: Path
    min_replicas: int = 1
    max_replicas: int = 4
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    address: str | None = None
    interval_s: float = 5.0
    max_num_seqs: int = 16
    max_queue: int = 1024
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        whole_number("min_replicas", self.min_replicas)
        whole_number("max_replicas", self.max_replicas, at_least=self.min_replicas)
        whole_number("max_num_seqs", self.max_num_seqs)
        whole_number("max_queue", self.max_queue)
        number("interval_s", self.interval_s, above=0)
        number("drain_s", self.drain_s, above=0)


class Engine:
    """One replica: the application of `course serve`, in an actor in place of a port."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, model: str, max_num_seqs: int, drain_s: float
    ) -> None:
        llm = await asyncio.to_thread(LLM, model, max_num_seqs=max_num_seqs)
        self.replica = Replica(
            llm, Path(model).resolve().name, AdmissionPolicy(), DrainPolicy(drain_s, drain_s / 10)
        )
        registry = self.replica.metrics.registry
        self._ttft = Histogram(
            TTFT, "From the gateway to the first event.", buckets=TTFT_EDGES, registry=registry
        )
        self._received = Counter(RECEIVED, "Requests for completions.", registry=registry)
        self._report = ReplicaReport(registry)
        self.app = create_app(self.replica, warm_up_prompts(llm, ()))
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        while self.replica.lifecycle.state is ReplicaState.STARTING:
            self.check_health()
            await asyncio.sleep(0.02)

    async def respond(self, call: Call) -> AsyncGenerator[Head | bytes]:
        """The application's answer: its head, then its body as it comes."""
        if call.path.endswith("/completions"):
            self._received.inc()
        scope = {
            "type": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "scheme": "http",
            "method": call.method, "path": call.path, "raw_path": call.path.encode(),
            "query_string": call.query, "root_path": "", "headers": call.headers,
            "client": None, "server": None,
        }  # fmt: skip
        received = [{"type": "http.request", "body": call.body, "more_body": False}]
        sent: asyncio.Queue[Any] = asyncio.Queue()

        async def receive() -> Any:
            if not received:  # a client that leaves ends this generator, and with it the task
                await asyncio.get_running_loop().create_future()
            return received.pop()

        async def send(message: Any) -> None:
            sent.put_nowait(message)

        task = asyncio.create_task(self.app(scope, receive, send))
        task.add_done_callback(lambda _: sent.put_nowait({"type": "end"}))
        try:
            start = await sent.get()
            if start["type"] == "end":
                raise RuntimeError("the application gave no answer")
            head = Head(start["status"], [(bytes(n), bytes(v)) for n, v in start["headers"]])
            yield head
            first = head.is_stream
            more = True
            while more:
                message = await sent.get()
                if message["type"] == "end":
                    raise RuntimeError("the application did not end its answer")
                more = message.get("more_body", False)
                if block := message.get("body"):
                    if first:
                        self._ttft.observe(time.time() - call.arrived_s)
                        first = False
                    yield block
        finally:
            task.cancel()

    async def drain(self) -> None:
        """Leave the rotation by the replica's own policy."""
        await self.replica.lifecycle.drain()

    async def metrics(self) -> tuple[str, bytes]:
        """Its name in the fleet, and what `/metrics` says."""
        return serve.get_replica_context().replica_id.unique_id, self.replica.metrics.text()

    def check_health(self) -> None:
        """Ray starts another replica if this raises."""
        if not self.replica.engine.is_alive:
            raise RuntimeError("the engine has stopped")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `ServePolicy`."""
        return self._report.read()

    def record_routing_stats(self) -> dict[str, float]:
        """For the router."""
        return {"kv_cache_usage": self.replica.engine.load().kv_cache_usage}

    def record_replica_metadata(self) -> dict[str, int]:
        """For the router, once."""
        engine = self.replica.llm.llm_engine
        pool = engine.block_pool
        return {
            "num_blocks": pool.num_blocks,
            "block_size": pool.block_size,
            "max_num_seqs": engine.scheduler.max_num_seqs,
        }


@serve.ingress()
class Front:
    """The gateway in an actor, behind Ray's proxy."""

    def __init__(self, engines: DeploymentHandle, model: str, api_key: str | None) -> None:
        self.engines = engines
        self.respond = engines.options(method_name="respond", stream=True)
        self.tokenizer = Tokenizer(model)
        self.api_key = api_key

    def __serve_build_asgi_app__(self) -> Guard:
        return Guard(Gateway(self._dispatch, self.tokenizer, self._scrape), self.api_key)

    async def _scrape(self) -> dict[str, bytes]:
        try:
            return dict(await self.engines.broadcast("metrics").results_async(timeout_s=10))
        except DeploymentUnavailableError:
            return {}

    async def _dispatch(self, call: Call) -> Answer:
        answer: Any = self.respond.remote(call)
        try:
            async for item in answer:
                yield item
        except (RayActorError, WorkerCrashedError):
            raise ReplicaLost from None
        except RayTaskError as error:
            if isinstance(error.cause, RayActorError):
                raise ReplicaLost from None
            raise
        except BackPressureError:
            raise ApiError(
                503,
                "no replica has room, and as many requests wait as may; try again later",
                kind="overloaded_error",
                code="max_queue",
                headers={"Retry-After": "1"},
            ) from None
        except DeploymentUnavailableError:
            raise ApiError(
                503, "no replica can be started", kind="server_error", code="no_replica"
            ) from None
        finally:
            answer.cancel()  # the client may have left; it does nothing to an answer that is whole


class Policy(ServePolicy):
    """`ServePolicy` as Ray makes it, out of what JSON can hold, and telling the board."""

    def __init__(self, make_autoscaler: str, interval_s: float) -> None:
        make = cloudpickle.loads(base64.b64decode(make_autoscaler))
        super().__init__(make, interval_s, ray.get_actor(BOARD, namespace=APP).add.remote)


class Board:
    """Where the policy, which runs inside Ray's controller, leaves its decisions."""

    def __init__(self) -> None:
        self._steps: deque[LoopDecision] = deque(maxlen=1000)

    def add(self, step: LoopDecision) -> None:
        """The policy has decided."""
        self._steps.append(step)

    def steps(self, last: int) -> list[LoopDecision]:
        """The latest ones, oldest first."""
        return list(self._steps)[-last:]


def application(config: FleetConfig, make_autoscaler: MakeAutoscaler) -> serve.Application:
    """The engines behind the front, for `serve.run`."""
    settings = {
        "make_autoscaler": base64.b64encode(cloudpickle.dumps(make_autoscaler)).decode(),
        "interval_s": config.interval_s,
    }
    period_s = config.interval_s / 4
    # A few more than run, so that a seat that becomes free is taken at once.
    room = config.max_num_seqs + max(1, config.max_num_seqs // 4)
    routing: dict[str, Any] = {
        "request_router_class": PrefixRequestRouter,
        "request_router_kwargs": {
            "room": room,
            "balance_abs_threshold": config.max_num_seqs // 2,
        },
        "request_routing_stats_period_s": period_s,
        "initial_backoff_s": 0.01,
        "max_backoff_s": 0.05,
    }
    engines = serve.deployment(
        ray_actor_options={"num_gpus": 1} if ray.cluster_resources().get("GPU") else {},
        max_ongoing_requests=room + 4,  # to drain and to be scraped is a request, too
        max_queued_requests=config.max_queue,
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            upscale_delay_s=0,
            downscale_delay_s=0,
            metrics_interval_s=period_s,
            look_back_period_s=2 * period_s,
            aggregation_function="max",  # whole requests, also where it is a queue that ends
            policy=AutoscalingPolicy(policy_function=Policy, policy_kwargs=settings),
        ),
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=1,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.drain_s + 5,
    )(Engine).bind(str(config.model), config.max_num_seqs, config.drain_s)
    front = serve.deployment(
        max_ongoing_requests=100_000,  # here they wait for a replica
        ray_actor_options=ON_HEAD,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.drain_s + 5,
    )(Front)
    return front.bind(engines, str(config.model), config.api_key)
