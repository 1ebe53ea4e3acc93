"""Which images go through the network together."""

from __future__ import annotations

import asyncio

import pytest

from raysal.serving.batches import Batches


class Network:
    """Answers with what it was given; a batch takes as long as the gate is closed."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.gate = asyncio.Event()

    async def run(self, items: list[int]) -> list[int]:
        self.seen.append(items)
        await self.gate.wait()
        return [10 * item for item in items]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_waits_while_others_are_at_work_goes_together() -> None:
    async def run() -> None:
        network = Network()
        batches = Batches(network.run, lambda items: sum(items) <= 100, 2)
        asked = [asyncio.ensure_future(batches.answer(n)) for n in range(1, 33)]
        await settle()
        assert network.seen == [[1], [2]]  # nothing waits where there is a place
        network.gate.set()
        assert await asyncio.gather(*asked) == [10 * n for n in range(1, 33)]
        assert network.seen[2] == [*range(3, 14)]  # as many as fit: 88, and the next is 14
        assert [n for batch in network.seen for n in batch] == [*range(1, 33)]  # nobody is passed over
        assert all(sum(batch) <= 100 for batch in network.seen)

    asyncio.run(run())


def test_one_that_fits_with_nothing_goes_alone() -> None:
    async def run() -> None:
        network = Network()
        network.gate.set()
        batches = Batches(network.run, lambda items: sum(items) <= 100, 1)
        assert await asyncio.gather(*(batches.answer(n) for n in (1, 500, 2, 3))) == [10, 5000, 20, 30]
        assert network.seen == [[1], [500], [2, 3]]

    asyncio.run(run())


def test_one_whose_client_has_gone_is_dropped_and_holds_up_nobody() -> None:
    async def run() -> None:
        network = Network()
        batches = Batches(network.run, lambda items: len(items) == 1, 1)
        first, gone, last = (asyncio.ensure_future(batches.answer(n)) for n in (1, 2, 3))
        await settle()
        gone.cancel()
        await settle()
        first.cancel()  # at work: its place comes back when the network is done with it
        network.gate.set()
        assert await last == 30
        assert network.seen == [[1], [3]]

    asyncio.run(run())


def test_a_batch_that_fails_fails_alone() -> None:
    async def run() -> None:
        async def fails(items: list[int]) -> list[int]:
            if 1 in items:
                raise RuntimeError("out of memory")
            return items

        batches = Batches(fails, lambda _: True, 1)
        bad, good = asyncio.ensure_future(batches.answer(1)), asyncio.ensure_future(batches.answer(2))
        assert await good == 2
        with pytest.raises(RuntimeError, match="memory"):
            await bad

    asyncio.run(run())
