"""The work behind the pages: images in, masks and numbers out; swaps of the model. Knows nothing of HTTP or Ray."""

import asyncio
import gc
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from raysal.answers import Mask, pixel_map
from raysal.errors import RaysalError
from raysal.model.checkpoint import digest_at
from raysal.serving.intake import Picture, Upload, look, read
from raysal.serving.meters import Meters
from raysal.serving.models import Model, check_successor, following, load
from raysal.serving.problems import Problem
from raysal.serving.settings import ModelSpec, Settings

log = logging.getLogger("ray.serve")

MAPS = ("uncertainty", "entropy")
FAILURES = 20
"""Images in a row that the network fails on, after which the replica counts as broken."""

BATCH_PIXELS = 8 * 2**20
"""Pixels that go through a GPU together; on CPUs each image goes alone, which is faster there."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Work:
    """One image on its way through the network.

    Attributes:
        picture: The image; None once nobody waits for it any more, as queues keep works for longer.
        wants: Among ``mask``, ``scores`` and the names of `MAPS`.
        pixels: Of the image.
        stop: Set when nobody waits for it any more.
        since: When it began to wait, seconds of a clock.
    """

    picture: Picture | None
    wants: frozenset[str]
    pixels: int
    stop: threading.Event = field(default_factory=threading.Event)
    since: float = field(default_factory=time.perf_counter)

    def end(self) -> None:
        self.stop.set()
        self.picture = None

    def go_on(self) -> None:
        if self.stop.is_set():
            raise Stopped


@dataclass(frozen=True)
class Done:
    """What came of an image.

    Attributes:
        model: That answered.
        id, name: Of the image; see `Picture`.
        size_HW: Of the image.
        mask: Where it was wanted.
        scores: By name, where they were wanted, and ``class_fractions``.
        map_HW: float32, where one was wanted.
    """

    model: Model
    id: str
    name: str
    size_HW: tuple[int, int]
    mask: Mask | None = None
    scores: dict[str, Any] | None = None
    map_HW: np.ndarray | None = None


@dataclass(frozen=True)
class Answer:
    """What is told of an image, without its pixels.

    Attributes:
        digest: Of the model that answered.
        name: Of the image.
        body: What the encoder made.
    """

    digest: str
    name: str
    body: Any


class Service:
    """One replica's model and its queue.

    Args:
        settings: The application's.
        meters: Count what happened.

    Attributes:
        model: In use; None until the first one is loaded.
        refusal: Why the newest model that was asked for is not in use; None where it is.
        batched: Sends one `Work` to `forward`, perhaps with others; set by who has a queue.
    """

    def __init__(self, settings: Settings, meters: Meters) -> None:
        self.settings, self.meters = settings, meters
        self.threads = settings.threads or max(1, int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1)
        self.model: Model | None = None
        self.refusal: str | None = None
        self.batched: Callable[[Work], Awaitable[Done | Problem]] = self._alone
        self._forward = ThreadPoolExecutor(self.threads, "forward", torch.set_num_threads, (self.threads,))
        self._files = ThreadPoolExecutor(max(2, self.threads), "files")
        self._held = Share(settings.limits.held_pixels)
        self._swap = asyncio.Lock()
        self._asked: ModelSpec | None = None
        self._failures = 0

    @property
    def broken(self) -> bool:
        """Whether only a new process can help."""
        return self._failures >= FAILURES

    async def use(self, spec: ModelSpec | Mapping[str, Any]) -> None:
        """Takes a model into use, once it has shown that it can; the old one answers until then, and stays where the new one is refused.

        Asked for the model in use, it does nothing: Ray Serve asks again, for reasons of its own.

        Raises:
            Exception: Whatever is wrong with the model, where there is no other.
        """
        async with self._swap:
            # A thread of its own: the model in use goes on answering on the others.
            with ThreadPoolExecutor(1, "load", torch.set_num_threads, (self.threads,)) as loader:
                run = partial(asyncio.get_running_loop().run_in_executor, loader)
                try:
                    spec = ModelSpec.model_validate(spec)
                    if not await run(self._in_use_already, spec):
                        await self._swapped(spec, run)
                        await run(gc.collect)  # the replaced one is in cycles: hundreds of megabytes would wait
                    self.refusal = None
                except Exception as error:  # also no memory, and what libraries raise over a model that makes no sense
                    if self.model is None:
                        raise
                    self.refusal = str(error) if isinstance(error, RaysalError) else f"{type(error).__name__}: {error}"
                    self.meters.refused("model")
                    log.error("a new model is refused, the old one stays: %s", self.refusal, exc_info=not isinstance(error, RaysalError))

    async def _swapped(self, spec: ModelSpec, run: Callable[..., Awaitable[Any]]) -> None:
        if self.model is None and (before := spec.previous or self.settings.first) != spec:
            try:
                self._take(await run(load, before, self.settings), "the one before")
            except Exception as error:
                log.warning("the model before can't be loaded, so the new one is held against nothing: %s", error)
        new, said = await run(load, spec, self.settings), "the first"
        if self.model is not None and self.model.digest != new.digest:
            said = await run(check_successor, new, self.model, self.settings.gate)
            new = replace(new, spec=following(new, self.model))
        self._take(new, said)
        self._asked = spec

    def _in_use_already(self, spec: ModelSpec) -> bool:
        if self.model is None or spec != self._asked:
            return False
        return spec.digest is not None or self.model.digest == digest_at(spec.checkpoint)  # files may have been replaced

    def _take(self, model: Model, said: str) -> None:
        self.model = model
        self.meters.model(model.digest, label_set=model.predictor.info.label_set.name, runtime=model.runtime)
        log.info("model %s in use: %s", model.digest[:12], said)

    async def answer(self, upload: Upload, wants: frozenset[str], encode: Callable[[Done], Any]) -> Answer:
        """What the model says of one image.

        Args:
            upload: The image.
            wants: See `Work`.
            encode: Makes of it what is told; called off the event loop, while the image's pixels still count as held.

        Raises:
            Problem: The image can't be used, or the model is not there yet.
        """
        self.in_use()
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._files, look, upload, self.settings.limits.max_pixels)
        async with self._held.of(pixels):
            started = time.perf_counter()
            picture = await loop.run_in_executor(self._files, read, upload, self.settings.limits, self.settings.black_border)
            self.meters.stage("read", time.perf_counter() - started)
            work = Work(picture, wants, picture.pixels)
            del picture
            try:
                done = await self.batched(work)
            finally:
                work.end()
            if isinstance(done, Problem):
                raise done
            return Answer(done.model.digest, done.name, await self.encoded(partial(encode, done)))

    async def encoded(self, encode: Callable[[], Any]) -> Any:
        """Runs an encoder off the event loop."""
        started = time.perf_counter()
        found = await asyncio.get_running_loop().run_in_executor(self._files, encode)
        self.meters.stage("encode", time.perf_counter() - started)
        return found

    async def forward(self, works: Sequence[Work]) -> list[Done | Problem]:
        """Several images through the network, off the event loop; one answer each, in order."""
        started = time.perf_counter()
        for work in works:
            self.meters.stage("wait", started - work.since)
        found = await asyncio.get_running_loop().run_in_executor(self._forward, self._run, works)
        self.meters.batch(len(works))
        self.meters.stage("forward", time.perf_counter() - started)
        return found

    def _run(self, works: Sequence[Work]) -> list[Done | Problem]:
        model = self.in_use()
        found: dict[int, Done | Problem] = {}
        alike: dict[Any, list[tuple[int, Work, Picture]]] = defaultdict(list)
        for k, work in enumerate(works):
            if (picture := work.picture) is None:
                found[k] = nobody_waits()
            else:
                alike[picture.valid_HW.shape, work.wants].append((k, work, picture))
        for (_, wants), those in alike.items():
            places, given, pictures = zip(*those, strict=True)
            found.update(zip(places, self._of_one_size(given, pictures, wants, model), strict=True))
        return [found[k] for k in range(len(works))]

    def _of_one_size(self, works: Sequence[Work], pictures: Sequence[Picture], wants: frozenset[str], model: Model) -> list[Done | Problem]:
        """Where images fail together, they run one by one, so that one costs only itself."""
        try:
            found: list[Done | Problem] = [*self._done(works, pictures, wants, model)]
            self._failures = 0
            return found
        except Stopped:
            return [nobody_waits() for _ in works]
        except Exception as error:
            if len(works) > 1:
                pairs = zip(works, pictures, strict=True)
                return [done for work, picture in pairs for done in self._of_one_size([work], [picture], wants, model)]
            self._failures += FAILURES if "CUDA error" in str(error) else 1  # an accelerator does not recover from its errors
            log.exception("the network failed")
            title = f"the network can't answer this image ({type(error).__name__}); send another size, and tell the operator"
            return [Problem(500, title, "model")]

    def _done(self, works: Sequence[Work], pictures: Sequence[Picture], wants: frozenset[str], model: Model) -> list[Done]:
        def go_on() -> None:
            if all(work.stop.is_set() for work in works):
                raise Stopped

        go_on()
        masks = model.masks.of(pictures, go_on) if "mask" in wants else [None] * len(works)
        scores = model.scores.of(pictures, go_on) if "scores" in wants else [None] * len(works)
        map_ = next(iter(wants & {*MAPS}), None)
        maps = [pixel_map(model.predictor, p, map_, go_on) if map_ else None for p in pictures]
        return [
            Done(model, p.id, p.name, (p.valid_HW.shape[0], p.valid_HW.shape[1]), mask, columns, map_HW)
            for p, mask, columns, map_HW in zip(pictures, masks, scores, maps, strict=True)
        ]

    async def _alone(self, work: Work) -> Done | Problem:
        return (await self.forward([work]))[0]

    def in_use(self) -> Model:
        """The model. Raises Problem (503) until there is one."""
        if self.model is None:
            raise Problem(503, "the model is still being loaded; come back after Retry-After seconds", "loading", self.retry_after)
        return self.model

    @property
    def retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self.settings.limits.retry_after_s)}


class Share:
    """An amount of something that those who come first get first.

    Args:
        total: What there is.
    """

    def __init__(self, total: int) -> None:
        self.total, self._free = total, total
        self._turn = asyncio.Lock()
        self._back = asyncio.Condition()

    @asynccontextmanager
    async def of(self, amount: int) -> Any:
        """Holds an amount, once it is there; more than there is counts as all."""
        amount = min(amount, self.total)
        async with self._turn, self._back:
            await self._back.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            async with self._back:
                self._free += amount
                self._back.notify_all()


def nobody_waits() -> Problem:
    """What becomes of work that was given up."""
    return Problem(408, "nobody waits for this answer any more", "deadline")


def batch_pixels(works: Sequence[Work]) -> int:
    """The size of a batch; one image of any size is a batch."""
    pixels = sum(work.pixels for work in works)
    return min(pixels, BATCH_PIXELS) if len(works) == 1 else pixels
