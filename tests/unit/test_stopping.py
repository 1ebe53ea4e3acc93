"""When the loop stops: each rule by itself, on values written down here."""

from __future__ import annotations

import pytest

from raysal.errors import ConfigError
from raysal.rounds.ledger import Ledger
from raysal.rounds.loop import Watcher, _Loop
from tests.helpers import tiny


def loop(tmp_path, **rules) -> _Loop:  # type: ignore[no-untyped-def]
    return _Loop(tiny(tmp_path, loop=rules), Ledger(str(tmp_path)), Watcher())


@pytest.mark.parametrize(
    ("rules", "values", "stops"),
    [
        ({}, [0.5, 0.4, 0.3, 0.3], None),
        ({"target_miou": 0.5}, [0.3, 0.49], None),
        ({"target_miou": 0.5}, [0.3, 0.5], "target"),
        ({"no_gain_rounds": 2, "min_gain": 0.01}, [0.30, 0.305], None),  # too few rounds to tell
        ({"no_gain_rounds": 2, "min_gain": 0.01}, [0.30, 0.305, 0.309], "no gain"),
        ({"no_gain_rounds": 2, "min_gain": 0.01}, [0.30, 0.305, 0.311], None),
        ({"no_gain_rounds": 2, "min_gain": 0.01}, [0.30, 0.32, 0.31, 0.31], "no gain"),
        ({"no_gain_rounds": 1}, [0.30, 0.25], "no gain"),
        ({"target_miou": 0.1, "no_gain_rounds": 1}, [None, None], None),  # nothing is measured without a val split
    ],
)
def test_the_metric_rules(tmp_path, rules: dict, values: list, stops: str | None) -> None:  # type: ignore[no-untyped-def]
    assert loop(tmp_path, **rules)._stop([{"miou": v} for v in values]) == stops


def test_the_uncertainty_rule_has_its_column_whatever_the_strategy(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rule = loop(tmp_path, uncertainty_below=0.1)
    assert [rule._confident({"pool_uncertainty": v}) for v in (0.2, 0.1, 0.05, None)] == [False, False, True, False]
    cfg = tiny(tmp_path, loop={"uncertainty_below": 0.1}, score={"scores": ["entropy"]}, query={"strategy": "entropy"})
    assert "uncertainty" in _Loop(cfg, Ledger(str(tmp_path)), Watcher()).cfg.score.scores


def test_an_encoder_is_frozen_in_the_first_trainings_and_never_in_the_last(tmp_path) -> None:  # type: ignore[no-untyped-def]
    cfg = tiny(tmp_path, loop={"rounds": 2, "frozen_rounds": 2})
    assert [cfg.at_round(r).optim.freeze_encoder for r in range(3)] == [True, True, False]
    with pytest.raises(ConfigError, match="frozen_rounds is 3"):
        tiny(tmp_path, loop={"rounds": 2, "frozen_rounds": 3})
