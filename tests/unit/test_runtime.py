"""One image has one mask, at its own size, whatever is in its batch and however many threads there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raysal.config import ModelConfig
from raysal.labels import AI4MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor, mc_dropout, resize, scale_images, to_batch

# Some CPU kernels for this encoder depend on batch size, others on threads: without care its last bits would follow both.
MODEL = ModelConfig(encoder="resnet18")


def info(scale: float = 1.0, predict: str = "mean") -> ModelInfo:
    return ModelInfo(AI4MARS, MODEL, scale, 64, predict)


def pictures(n: int = 4, height: int = 67, width: int = 45) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model() -> TwoBranch:
    return TwoBranch(MODEL, 4, seed=1).eval()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_flipped_prediction_is_the_mean_with_the_mirror_images(model: TwoBranch) -> None:
    plain, flips = info(), info()
    flips = replace(flips, model=flips.model.model_copy(update={"flip": True}))
    image = pictures(1, 64, 48)[0]
    p = Predictor(model, plain).predict([image]).probabilities
    mirrored = Predictor(model, plain).predict([np.ascontiguousarray(image[:, ::-1])]).probabilities[..., ::-1]
    both = Predictor(model, flips).predict([image])
    np.testing.assert_allclose(both.probabilities, (p + mirrored) / 2, atol=1e-5)
    assert not np.allclose(p, mirrored, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5, 1.7])
def test_masks_have_the_images_own_size_and_probabilities_sum_to_1(model: TwoBranch, scale: float) -> None:
    prediction = Predictor(model, info(scale)).predict(pictures(2))
    assert prediction.masks.shape == prediction.confidence.shape == (2, 67, 45)
    assert prediction.probabilities.shape == (2, 4, 67, 45)
    assert (prediction.masks.dtype, prediction.confidence.dtype, prediction.probabilities.dtype) == (np.uint8, np.float32, np.float32)
    np.testing.assert_allclose(prediction.probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(prediction.masks, prediction.probabilities.argmax(1))
    np.testing.assert_array_equal(prediction.confidence, prediction.probabilities.max(1))


def test_probabilities_are_the_mean_of_both_branches_upsampled_logits(model: TwoBranch) -> None:
    x = torch.from_numpy(np.stack(pictures())).permute(0, 3, 1, 2).float()
    small = F.interpolate(x, size=(34, 23), mode="bilinear", antialias=True)
    with torch.no_grad():
        first, second = (F.interpolate(z, size=(67, 45), mode="bilinear", antialias=True).softmax(1) for z in model(small))
    mean = Predictor(model, info(0.5)).predict(pictures()).probabilities
    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-5)
    alone = Predictor(model, info(0.5, "branch1")).predict(pictures()).probabilities
    np.testing.assert_allclose(alone, first, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_image_gets_the_same_bytes_in_any_batch_on_any_number_of_threads(model: TwoBranch, scale: float) -> None:
    images, seen = pictures(), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        predictor = Predictor(model, info(scale))
        for batch in (1, 2, 4):
            parts = [predictor.predict(images[i : i + batch]) for i in range(0, 4, batch)]
            scores = [predictor.logits_and_features(images[i : i + batch], "decoder") for i in range(0, 4, batch)]
            seen.append(
                [np.concatenate([getattr(p, name) for p in parts]).tobytes() for name in ("masks", "confidence", "probabilities")]
                + [torch.cat(z).numpy().tobytes() for z in zip(*scores, strict=True)]
            )
        assert torch.get_num_threads() == n_threads  # the caller keeps its own threads
    assert all(s == seen[0] for s in seen)


def test_logits_are_the_models_at_the_scaled_size(model: TwoBranch) -> None:
    predictor = Predictor(model, info(0.5))
    z1, z2 = predictor.logits(pictures())
    assert z1.shape == (4, 4, 34, 23) and z1.dtype == torch.float32
    with torch.no_grad():
        expected = model(scale_images(to_batch(pictures()), 0.5))
    torch.testing.assert_close(torch.stack([z1, z2]), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert predictor.logits(pictures(), "decoder")[0].shape == (4, 4, 9, 6)


def test_features_come_with_the_logits(model: TwoBranch) -> None:
    predictor = Predictor(model, info())
    z1, z2, features = predictor.logits_and_features(pictures(), "decoder")
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert torch.equal(torch.stack([z1, z2]), torch.stack(predictor.logits(pictures(), "decoder")))
    assert features.shape == (4, 512)


def test_prediction_leaves_no_gradients_and_no_training_mode(model: TwoBranch) -> None:
    predictor = Predictor(model.train(), info())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z1, _ = predictor.logits(pictures(1))
    assert not model.training and not z1.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_predictor_is_loaded_from_a_checkpoint(tmp_path: Path, model: TwoBranch) -> None:
    digest = save(str(tmp_path), model, info(0.5))
    predictor = Predictor.load(str(tmp_path))
    assert predictor.digest == digest and predictor.info == info(0.5)
    expected = Predictor(model, info(0.5))
    assert expected.digest == ""
    assert predictor.predict(pictures(2)).probabilities.tobytes() == expected.predict(pictures(2)).probabilities.tobytes()


@pytest.mark.parametrize(
    "images",
    [
        [],
        [np.zeros((4, 4), np.uint8)],
        [np.zeros((4, 4, 4), np.uint8)],
        [np.zeros((4, 4, 3), np.float32)],
        [np.zeros((0, 4, 3), np.uint8)],
        [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)],
    ],
)
def test_images_of_several_sizes_or_other_types_are_refused(model: TwoBranch, images: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="of one size"):
        Predictor(model, info()).predict(images)


def test_images_that_are_views_or_read_only_are_taken(model: TwoBranch) -> None:
    image = pictures(1)[0]
    flipped = image[:, ::-1]
    frozen = np.ascontiguousarray(flipped)
    frozen.setflags(write=False)
    predictor = Predictor(model, info())
    assert predictor.predict([flipped]).masks.tobytes() == predictor.predict([frozen]).masks.tobytes()


@pytest.mark.parametrize(("scale", "size"), [(0.5, (34, 23)), (0.01, (1, 1)), (2.0, (134, 90)), (1.0, (67, 45))])
def test_scaled_sides_are_rounded_half_up_and_never_0(scale: float, size: tuple[int, int]) -> None:
    assert scale_images(to_batch(pictures(1)), scale).shape == (1, 3, *size)


def test_scaling_keeps_brightness_and_does_not_alias() -> None:
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 200.0
    assert (scale_images(stripes, 0.25) - 100).abs()[..., 2:-2].max() < 5
    x = torch.rand(1, 3, 8, 8)
    assert resize(x, (8, 8)) is x


def test_mc_dropout_draws_while_batch_norm_stays_still(model: TwoBranch) -> None:
    statistics = [b.clone() for b in model.buffers()]
    x = to_batch(pictures(2))
    with torch.no_grad():
        fixed = model.eval()(x)[0]
        with mc_dropout(model):
            first, second = model(x)[0], model(x)[0]
            assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        assert torch.equal(model(x)[0], fixed)
    assert not torch.equal(first, second) and not torch.equal(first, fixed)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))


def test_mc_logits_follow_the_seed_and_leave_the_callers_random_numbers_alone(model: TwoBranch) -> None:
    image, predictor = pictures(1, 32, 32)[0], Predictor(model, info())
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first, again, other = (list(predictor.mc_logits(image, seed, 3, "decoder")) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(2), expected)
    assert len(first) == 3
    for (z1, z2), (a1, a2), (b1, _) in zip(first, again, other, strict=True):
        assert torch.equal(z1, a1) and torch.equal(z2, a2)
        assert not torch.equal(z1, b1)
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize("drop_in_encoder", [False, True])
def test_mc_logits_are_those_of_the_whole_network_under_dropout(drop_in_encoder: bool) -> None:
    model = TwoBranch(MODEL, 4, seed=1).eval()
    if drop_in_encoder:
        for branch in model.branches:
            branch.encoder.layer4.append(nn.Dropout2d(0.5))
        model.eval()
    encoded: list[int] = []
    model.branches[0].encoder.register_forward_hook(lambda *_: encoded.append(1))
    predictor, image = Predictor(model, info()), pictures(1, 40, 32)[0]
    found = list(predictor.mc_logits(image, 9, 3))
    assert len(encoded) == (3 if drop_in_encoder else 1)
    torch.set_num_threads(1)
    for t, (z1, z2) in enumerate(found):
        with torch.no_grad(), mc_dropout(model), torch.random.fork_rng():
            torch.manual_seed((9 + t * 0x9E3779B97F4A7C15) % 2**63)
            w1, w2 = model(to_batch([image]))
        assert torch.equal(z1, w1) and torch.equal(z2, w2)
