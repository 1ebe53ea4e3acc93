"""The scores keep the identities of the method, stay finite, and rank alike at both resolutions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from raysal.config import ScoreConfig
from raysal.datasets.synthetic import scene
from raysal.errors import ConfigError
from raysal.model.runtime import Predictor
from raysal.query import scores
from raysal.query.pooling import Measured, TileScores, aggregate
from raysal.query.scores import Bald, Branches, class_fractions, entropy, log_probabilities, maps, score_images

ALL = tuple(scores.MAPS)
CLASSES = 9
calm = settings(deadline=None, max_examples=50)  # a busy machine is no failure


def logits(seed: int, scale: float, shape: tuple[int, ...] = (2, CLASSES, 5, 4)) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def valid(shape: tuple[int, int, int]) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


pairs = st.builds(
    lambda seed, s1, s2, classes: (logits(seed, s1, (2, classes, 3, 4)), logits(seed + 1, s2, (2, classes, 3, 4))),
    st.integers(0, 2**31),
    st.floats(0.01, 80),
    st.floats(0.01, 80),
    st.integers(2, 20),
)


@calm
@given(pairs)
def test_jsd_is_the_mutual_information_of_a_two_member_ensemble(pair: tuple[Tensor, Tensor]) -> None:
    ensemble = Bald()
    for z in pair:
        ensemble.add(z)
    torch.testing.assert_close(Branches(*pair).JSD, ensemble.map(), atol=2e-6, rtol=0)


@calm
@given(pairs)
def test_jsd_is_the_mean_divergence_of_the_branches_from_their_mean(pair: tuple[Tensor, Tensor]) -> None:
    p1, p2 = (z.double().softmax(1) for z in pair)
    pm = (p1 + p2) / 2
    two_kl = (torch.special.xlogy(p1, p1 / pm) + torch.special.xlogy(p2, p2 / pm)).nan_to_num().sum(1) / 2
    torch.testing.assert_close(Branches(*pair).JSD.double(), two_kl, atol=2e-6, rtol=0)


@calm
@given(pairs)
def test_entropy_of_the_mean_is_mean_entropy_plus_jsd(pair: tuple[Tensor, Tensor]) -> None:
    b = Branches(*pair)
    mean_H = sum(torch.special.entr(z.double().softmax(1)).sum(1) for z in pair) / 2
    torch.testing.assert_close(b.Hm.double(), mean_H + b.JSD, atol=3e-6, rtol=0)


@calm
@given(pairs, st.floats(0, 1))
def test_every_map_lies_between_0_and_1(pair: tuple[Tensor, Tensor], alpha: float) -> None:
    for name, a in maps(*pair, ALL, alpha).items():
        assert a.shape == (2, 3, 4), name
        assert a.dtype == torch.float32
        assert bool(((a >= 0) & (a <= 1)).all()), name


@calm
@given(st.integers(0, 2**31), st.floats(0.01, 80))
def test_identical_branches_have_no_uncertainty(seed: int, scale: float) -> None:
    z = logits(seed, scale)
    found = maps(z, z.clone(), ("uncertainty", "disagreement", "ueq_gated"))
    assert float(found["uncertainty"].max()) < 2e-6
    assert float(found["disagreement"].max()) == 0
    assert float(found["ueq_gated"].max()) == 0


@pytest.mark.parametrize("level", [-1e4, 0.0, 7.5, 1e4])
def test_uniform_logits_have_entropy_1(level: float) -> None:
    z = torch.full((1, CLASSES, 3, 3), level)
    found = maps(z, z, ("entropy", "margin", "least_confidence"))
    torch.testing.assert_close(found["entropy"], torch.ones(1, 3, 3))
    torch.testing.assert_close(found["margin"], torch.ones(1, 3, 3))
    torch.testing.assert_close(found["least_confidence"], torch.full((1, 3, 3), 1 - 1 / CLASSES))


def test_certain_branches_that_contradict_each_other_have_uncertainty_1() -> None:
    z1, z2 = torch.zeros(1, CLASSES, 2, 2), torch.zeros(1, CLASSES, 2, 2)
    z1[:, 0], z2[:, 1] = 1e3, 1e3
    found = maps(z1, z2, ALL)
    torch.testing.assert_close(found["uncertainty"], torch.ones(1, 2, 2))
    torch.testing.assert_close(found["disagreement"], torch.ones(1, 2, 2))
    torch.testing.assert_close(found["entropy"], torch.full((1, 2, 2), math.log(2) / math.log(CLASSES)))
    torch.testing.assert_close(found["ueq_gated"], found["entropy"])


@calm
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2 * 5 * 4, max_size=2 * 5 * 4))
def test_extreme_logits_stay_finite(values: list[float]) -> None:
    z1, z2 = torch.tensor(values, dtype=torch.float32).reshape(2, 1, 5, 2, 2)
    bald = Bald()
    bald.add(z1)
    bald.add(z2)
    for a in (*maps(z1, z2, ALL).values(), bald.map()):
        assert bool(torch.isfinite(a).all())
        assert bool((a >= 0).all())


def test_half_precision_logits_are_scored_in_float32() -> None:
    z1, z2 = logits(0, 3).bfloat16(), logits(1, 3).bfloat16()
    half, full = maps(z1, z2, ALL), maps(z1.float(), z2.float(), ALL)
    for name in ALL:
        torch.testing.assert_close(half[name], full[name], atol=0, rtol=0)


@calm
@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.1, 40))
def test_streaming_bald_equals_the_formula_over_all_passes(seed: int, passes: int, scale: float) -> None:
    z_TBCHW = logits(seed, scale, (passes, 2, CLASSES, 3, 2))
    bald = Bald()
    for z in z_TBCHW:
        bald.add(z)
    p = z_TBCHW.double().softmax(2)
    expected = torch.special.entr(p.mean(0)).sum(1) - torch.special.entr(p).sum(2).mean(0)
    torch.testing.assert_close(bald.map().double(), expected, atol=2e-6, rtol=0)
    assert float(bald.map().max()) <= math.log(min(passes, CLASSES)) + 1e-6


def test_bald_of_two_heads_is_that_of_their_mean_prediction() -> None:
    two, one = Bald(), Bald()
    for t in range(4):
        z1, z2 = logits(2 * t, 3), logits(2 * t + 1, 3)
        two.add(z1, z2)
        one.add(((z1.softmax(1) + z2.softmax(1)) / 2).log())
    torch.testing.assert_close(two.map(), one.map(), atol=1e-5, rtol=0)


def test_bald_of_equal_passes_is_0_and_without_a_pass_an_error() -> None:
    bald = Bald()
    with pytest.raises(ValueError, match="at least one pass"):
        bald.map()
    for _ in range(5):
        bald.add(logits(0, 2))
    assert float(bald.map().max()) < 1e-6


@pytest.mark.parametrize("how", ["mean", "sum", "top_q"])
def test_pixels_that_are_not_valid_change_nothing(how: str) -> None:
    a, v = torch.rand(3, 6, 7), torch.rand(3, 6, 7) > 0.4
    poisoned = a.masked_fill(~v, 1e6)
    torch.testing.assert_close(aggregate(a, v, how), aggregate(poisoned, v, how))


def test_aggregates_are_what_their_names_say() -> None:
    a, v = torch.rand(4, 10, 10), torch.rand(4, 10, 10) > 0.3
    for i in range(4):
        kept = np.sort(a[i][v[i]].double().numpy())[::-1]
        k = max(1, math.ceil(0.1 * len(kept)))
        expected = {"mean": kept.mean(), "sum": kept.sum(), "top_q": kept[:k].mean()}
        for how, value in expected.items():
            assert float(aggregate(a, v, how, 0.1)[i]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("how", ["mean", "sum", "top_q"])
def test_an_image_without_valid_pixels_scores_0(how: str) -> None:
    found = aggregate(torch.ones(2, 3, 3), torch.tensor([True, False])[:, None, None].expand(2, 3, 3), how)
    assert float(found[1]) == 0
    assert float(found[0]) > 0


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'entropy'"):
        maps(logits(0, 1), logits(1, 1), ("entropi",))
    with pytest.raises(ConfigError, match="uncertainty, entropy"):
        scores.check_names(("ueq",))
    with pytest.raises(ConfigError, match="unknown strategy"):
        scores.needed_columns("ueqq")
    with pytest.raises(ConfigError, match="top_q"):
        aggregate(torch.ones(1, 2, 2), valid((1, 2, 2)), "median")


def test_columns_hold_what_the_strategy_needs_once() -> None:
    cfg = ScoreConfig(scores=("margin", "entropy"))
    assert scores.score_columns(cfg, "ueq") == ("margin", "entropy", "uncertainty")
    assert scores.score_columns(cfg, "random") == ("margin", "entropy")
    assert scores.score_columns(cfg, "bald") == ("margin", "entropy", "bald")


def test_score_images_gives_one_number_an_image_and_score() -> None:
    z1, z2 = logits(0, 2, (3, CLASSES, 6, 8)), logits(1, 2, (3, CLASSES, 6, 8))
    found = score_images(z1, z2, valid((3, 24, 32)), ScoreConfig(scores=ALL))
    assert set(found) == {*ALL, "class_fractions"}
    for name in ALL:
        np.testing.assert_allclose(found[name], maps(z1, z2, (name,))[name].double().mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["class_fractions"].sum(1), 1)
    np.testing.assert_array_equal(found["class_fractions"], class_fractions(z1, z2, valid((3, 24, 32))))


def test_scores_do_not_depend_on_the_rest_of_the_batch() -> None:
    z1, z2 = logits(0, 4, (5, CLASSES, 6, 6)), logits(1, 4, (5, CLASSES, 6, 6))
    cfg = ScoreConfig(scores=ALL, aggregate="top_q")
    whole = score_images(z1, z2, valid((5, 6, 6)), cfg)
    for i in range(5):
        alone = score_images(z1[i : i + 1], z2[i : i + 1], valid((1, 6, 6)), cfg)
        for name in ALL:
            assert alone[name][0] == pytest.approx(whole[name][i], abs=1e-6)


def test_the_excluded_part_of_an_image_does_not_count_at_decoder_resolution() -> None:
    z1, z2 = logits(0, 2, (1, CLASSES, 8, 8)), logits(1, 2, (1, CLASSES, 8, 8))
    v = valid((1, 32, 32))
    v[:, :, 16:] = False
    found = score_images(z1, z2, v, ScoreConfig(scores=("entropy",)))
    expected = score_images(z1[..., :4], z2[..., :4], valid((1, 32, 16)), ScoreConfig(scores=("entropy",)))
    np.testing.assert_allclose(found["entropy"], expected["entropy"])
    np.testing.assert_allclose(found["class_fractions"], expected["class_fractions"])


def test_a_temperature_divides_the_logits_of_scores_and_changes_no_mask() -> None:
    z1, z2 = logits(0, 4, (3, CLASSES, 6, 8)), logits(1, 4, (3, CLASSES, 6, 8))
    plain = score_images(z1, z2, valid((3, 24, 32)), ScoreConfig(scores=ALL))
    found = score_images(z1, z2, valid((3, 24, 32)), ScoreConfig(scores=ALL, temperature=4.0))
    cooler = score_images(z1 / 4, z2 / 4, valid((3, 24, 32)), ScoreConfig(scores=ALL))
    for name in ALL:
        np.testing.assert_array_equal(found[name], cooler[name])
    assert (found["entropy"] > plain["entropy"]).all()
    np.testing.assert_array_equal(found["class_fractions"], plain["class_fractions"])


def test_the_class_bonus_draws_images_of_rare_classes_forward() -> None:
    z = torch.zeros(2, 3, 4, 4)
    z[0, 0], z[1, 2] = 2.0, 2.0  # equally unsure: the first of a common class, the second of a rare one
    plain = score_images(z, z, valid((2, 4, 4)), ScoreConfig(scores=("entropy",)))["entropy"]
    omega = scores.rarity_bonus(np.array([99, 99, 0]))
    drawn = score_images(z, z, valid((2, 4, 4)), ScoreConfig(scores=("entropy",)), omega)["entropy"]
    assert plain[0] == pytest.approx(plain[1])
    assert drawn[1] > 2 * drawn[0]
    p = log_probabilities(z).exp()[:, :, 0, 0].numpy()
    np.testing.assert_allclose(drawn, plain * (p @ omega), rtol=1e-5)


def test_bald_is_aggregated_like_the_others_and_asked_for_only_with_its_map() -> None:
    z = logits(0, 1)
    cfg = ScoreConfig(scores=("bald",))
    with pytest.raises(ValueError, match="bald"):
        score_images(z, z, valid((2, 5, 4)), cfg)
    a = torch.rand(2, 5, 4)
    np.testing.assert_allclose(score_images(z, z, valid((2, 5, 4)), cfg, bald_Bhw=a)["bald"], a.mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("mean", ("entropy", "uncertainty", "least_confidence", "margin", "ueq_pixel", "ueq_gated")),
        ("top_q", ("entropy", "uncertainty", "least_confidence", "ueq_pixel", "ueq_gated")),  # margin's top is finer than a cell
    ],
)
def test_decoder_resolution_ranks_images_as_full_resolution_does(how: str, names: tuple[str, ...]) -> None:
    """Smooth random fields stand for logits; a network itself follows below."""
    generator = torch.Generator().manual_seed(0)
    n, cfg = 120, ScoreConfig(scores=names, aggregate=how)  # type: ignore[arg-type]
    sharpness = torch.linspace(0.5, 4, n)[torch.randperm(n, generator=generator)].view(n, 1, 1, 1)
    low = [functional.interpolate(torch.randn(n, CLASSES, 8, 8, generator=generator), size=24, mode="bicubic") * sharpness for _ in "12"]
    full = [functional.interpolate(z, scale_factor=4, mode="bilinear") for z in low]
    at_decoder, at_full = (score_images(*z, valid((n, 96, 96)), cfg) for z in (low, full))
    for name in names:
        assert spearmanr(at_decoder[name], at_full[name]).statistic >= 0.99, name


@pytest.mark.slow
def test_a_trained_network_ranks_scenes_alike_at_both_resolutions(trained: Path) -> None:
    px, names = 96, ("entropy", "uncertainty", "least_confidence", "margin")
    predictor = Predictor.load(str(trained))
    scenes = [scene(0, i, px)[0] for i in range(64)]
    cfg = ScoreConfig(scores=names)
    at_decoder, at_full = (score_images(*predictor.logits(scenes, r), valid((64, px, px)), cfg) for r in ("decoder", "full"))  # type: ignore[arg-type]
    for name in names:
        assert spearmanr(at_decoder[name], at_full[name]).statistic >= 0.99, name


def test_entropy_takes_0_log_0_as_0() -> None:
    logp = torch.tensor([0.0, -math.inf]).view(1, 2, 1, 1)
    assert float(entropy(logp)) == 0


@given(st.integers(0, 10**6), st.sampled_from(["mean", "sum", "top_q"]), st.integers(1, 30))
@calm
def test_an_image_measured_tile_by_tile_has_the_scores_of_all_its_pixels_at_once(seed: int, how: str, tiles: int) -> None:
    draw = np.random.default_rng(seed)
    a, w = torch.from_numpy(draw.random((tiles, 50))), torch.from_numpy(draw.choice([0.0, 0.3, 1.0], (tiles, 50))).float()
    cfg, named = ScoreConfig(scores=("entropy",), aggregate=how, top_q=0.05), torch.ones(1, 2).double()  # type: ignore[arg-type]
    parts = TileScores(cfg, tiles)
    for k in range(tiles):
        parts.add(Measured({"entropy": a[k : k + 1]}, w[k : k + 1], named))
    expected = aggregate(a.reshape(1, -1), w.reshape(1, -1), how, 0.05)
    assert parts.scores()["entropy"] == pytest.approx(expected.numpy(), rel=1e-9)
    if how == "top_q":
        held = sum(len(values) for values, _ in parts._top["entropy"])
        assert held <= 3 * max(1, math.ceil(0.05 * tiles * 50)) + 50
