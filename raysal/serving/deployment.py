"""The endpoint on Ray Serve. Config files name `raysal.serving.deployment:build` and give `Settings` as its args."""

# No "from __future__ import annotations" here: Serve reads the type of build's parameter.
import os
from typing import Any

from ray import serve
from ray.serve import Application

from raysal.serving.app import make_app
from raysal.serving.intake import check_roots
from raysal.serving.meters import ServeMeters
from raysal.serving.problems import Problem
from raysal.serving.service import BATCH_PIXELS, Done, Service, Work, batch_pixels
from raysal.serving.settings import Settings
from raysal.serving.tokens import Tokens

NAME = "Endpoint"
PLACES = 4
"""Requests that Serve lets through for each that a replica answers, so that the replica itself can turn away the rest at once."""

GPU_WAIT_S = 0.005
"""How long a GPU's batch waits for more images."""


@serve.deployment(name=NAME, max_queued_requests=256, health_check_period_s=10, graceful_shutdown_timeout_s=90)
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
        service = self.service

        async def forward(works: list[Work]) -> list[Done | Problem]:
            return await service.forward(works)

        # CPUs run an image a thread, so a batch is one image there and several batches run at once.
        self.service.batched = serve.batch(
            max_batch_size=BATCH_PIXELS if made.use_gpu else 1,
            batch_wait_timeout_s=GPU_WAIT_S if made.use_gpu else 0.0,
            max_concurrent_batches=2 if made.use_gpu else service.threads,
            batch_size_fn=batch_pixels if made.use_gpu else None,
        )(forward)

    def __serve_build_asgi_app__(self) -> object:
        return make_app(self.service, self.tokens, proxied=behind_haproxy(), echoed=True)

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
        max_ongoing_requests=PLACES * settings.limits.in_flight,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1} if settings.use_gpu else {"num_cpus": max(1, settings.threads)},
    ).bind(settings.model_dump())
