"""The endpoint on Ray Serve. Config files name `raysal.serving.deployment:build` and give `Settings` as its args."""

# No "from __future__ import annotations" here: Serve reads the type of build's parameter.
import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from raysal.serving.app import make_app
from raysal.serving.batches import Batches
from raysal.serving.intake import check_roots
from raysal.serving.meters import ServeMeters
from raysal.serving.service import BATCH_PIXELS, Service, batch_pixels
from raysal.serving.settings import Settings
from raysal.serving.tokens import Tokens

NAME = "Endpoint"
ADMITTED = 1024
"""Requests that Serve lets through to a replica at once: so many that the replica itself turns away what is too much, which takes it
milliseconds. Config files for several nodes say less: there Serve must know when a replica is full, to try another node's."""

WAITING = RequestRouterConfig.model_validate({"initial_backoff_s": 0.005, "max_backoff_s": 0.02})
"""How soon Serve looks again for a place for requests that wait. By its own numbers (half a second, two requests for each replica) places
stay empty once some wait: a replica was seen to answer a third of what it can."""

GPU_BATCHES = 2
"""Batches of a GPU at once: one is prepared or read back while the other is computed."""


@serve.deployment(
    name=NAME, max_queued_requests=256, request_router_config=WAITING, health_check_period_s=10, graceful_shutdown_timeout_s=90
)
@serve.ingress()
class Endpoint:
    """One replica: the HTTP interface, the queue and the model together, so that pixels pass through no other process.

    Args:
        settings: `Settings` as plain values.
    """

    def __init__(self, settings: dict) -> None:
        made = Settings.model_validate(settings)
        check_roots(made.roots)
        self.service = Service(made, ServeMeters())
        self.tokens = Tokens(made.tokens_file)
        forward = self.service.forward
        if made.use_gpu:
            self.service.batched = Batches(forward, lambda works: batch_pixels(works) <= BATCH_PIXELS, GPU_BATCHES).answer
        else:  # CPUs run an image a thread, so a batch is one image there and several batches run at once
            self.service.batched = Batches(forward, lambda works: len(works) == 1, self.service.threads).answer

    def __serve_build_asgi_app__(self) -> object:
        return make_app(self.service, self.tokens, behind_haproxy(), echoed=True, replica=serve.get_replica_context().replica_tag)

    async def reconfigure(self, user_config: dict) -> None:
        """A hot swap.

        A model that is refused raises nothing once another answers: Serve would stop this replica and start one with the new model alone.
        """
        await self.service.use(user_config)

    async def check_health(self) -> None:
        """Serve replaces a replica where this fails. Called every ten seconds."""
        self.service.meters.beat()
        if self.service.broken:
            raise RuntimeError("the network fails on every image; the replica is replaced")


def behind_haproxy() -> bool:
    """Whether Serve puts HAProxy before the replicas, which is quicker than its own proxy but listens on every address."""
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def build(args: Settings) -> Application:
    """The application.

    Args:
        args: `Settings`, or the same as plain values.
    """
    settings = Settings.model_validate(args)
    endpoint: Any = Endpoint
    return endpoint.options(
        user_config=settings.first.model_dump(),
        max_ongoing_requests=max(ADMITTED, 2 * settings.limits.in_flight),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=settings.limits.retry_after_s),
        ray_actor_options={"num_cpus": 1, "num_gpus": 1} if settings.use_gpu else {"num_cpus": max(1, settings.threads)},
    ).bind(settings.model_dump())
