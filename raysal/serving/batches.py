"""Images that wait for the network, and who goes through it together."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches(Generic[Item, Result]):
    """A queue whose batches are made up when there is a place for them, so that what waits goes together.

    Serve's own batching closes a batch first and lets it wait then: under load most of its batches hold one image.

    Args:
        run: Answers a batch, in its order. Several may run at once.
        fits: Whether some may go together; one alone always may.
        at_once: Batches that run at once.
    """

    def __init__(self, run: Callable[[list[Item]], Awaitable[Sequence[Result]]], fits: Callable[[list[Item]], bool], at_once: int) -> None:
        self._run, self._fits, self._free = run, fits, at_once
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, item: Item) -> Result:
        """The result of one item. Where its caller is cancelled while it waits, it is dropped."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._start()
        return await future

    def _start(self) -> None:
        while self._free and (batch := self._next()):
            self._free -= 1
            task = asyncio.ensure_future(self._answered(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        batch: list[tuple[Item, asyncio.Future[Result]]] = []
        while self._waiting:
            item, future = self._waiting[0]
            if not future.done():
                if batch and not self._fits([*(other for other, _ in batch), item]):
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch

    async def _answered(self, batch: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._run([item for item, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._free += 1
            self._start()
