"""The report has words for whatever asked: strategies of the configuration, and first sets as `choose` names them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest

from raysal.archive.tables import read_table
from raysal.config import LoopConfig, Strategy
from raysal.datasets.base import Dataset, Item
from raysal.report.asked import WORDS
from raysal.rounds.choose import random_start, typical_start


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_has_words(strategy: str) -> None:
    assert WORDS.get(strategy)


def first_sets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The name of each kind of first set, as it stands in a queue."""
    monkeypatch.setattr("raysal.rounds.choose._readable", lambda *_: True)
    item = Item("a", "/a.jpg")
    table = pa.table({"id": ["a"], "uri": ["/a.jpg"], "status": ["ok"], "embedding": pa.array([[1.0, 0.0]], pa.list_(pa.float32(), 2))})
    by_lot = random_start(Dataset("one", None, {}), [item], 1, 0)  # type: ignore[arg-type]
    return {"random": by_lot[0]["strategy"], "typical": typical_start(lambda: table, 1, 0)[0]["strategy"]}


def test_every_first_set_has_words(monkeypatch: pytest.MonkeyPatch) -> None:
    named = first_sets(monkeypatch)
    assert set(named) == set(get_args(LoopConfig.model_fields["cold_start"].annotation))
    assert all(WORDS.get(strategy) for strategy in named.values())


def test_nothing_is_explained_that_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(WORDS) == {*get_args(Strategy), *first_sets(monkeypatch).values()}


def test_the_fabricated_run_names_its_first_set_as_a_real_one(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = set(read_table(str(partial / "rounds/000/chosen.parquet"))["strategy"].to_pylist())
    assert written == {first_sets(monkeypatch)["random"]}
