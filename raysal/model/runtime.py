"""How a forward pass is run: the one way from images to logits and masks, for training metrics, scoring, labeling and serving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysal.images.tiles import Grid
from raysal.model import engines
from raysal.model.checkpoint import ModelInfo, load
from raysal.model.network import Encoded, Resolution, TwoBranch, dropouts, place

In = TypeVar("In")
Out = TypeVar("Out")

PIXELS_AT_ONCE = 8 * 2**20
"""That go through an accelerator together, at most; one image or tile goes whatever it counts."""


@dataclass(frozen=True)
class Prediction:
    """What a model says about images of one size.

    Attributes:
        masks: uint8 [B, H, W] class ids at the images' own size.
        confidence: float32 [B, H, W] probability of that class.
        probabilities: float32 [B, C, H, W]; sums to 1 over classes.
    """

    masks: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Piece:
    """What a model says about a part of one image; all pieces of an image cover it once.

    Attributes:
        rows, cols: The part.
        mask: uint8 [h, w] class ids.
        confidence: float32 [h, w] probability of that class.
        probabilities: float32 [C, h, w].
    """

    rows: slice
    cols: slice
    mask: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray


class Predictor:
    """Runs a model, so that one image has one mask to the byte, whatever else is in its batch and whoever asks.

    Convolution libraries on CPUs choose their kernels, and so the last bits of a sum, by batch size and number of threads.
    There, every image goes through the network alone on one thread, and as many images at once as the process has threads;
    from 256 px on this is also faster than batches. Accelerators compute whole batches; their last bits may follow the
    batch size.

    Images that count more than `model.whole_pixels` (see `pixels`) go through the network in tiles whose probabilities are blended
    (`raysal.images.tiles`).

    Args:
        model: Put in eval mode and on the device.
        info: Its description.
        device: Where it runs.
        digest: Of the checkpoint it came from; empty for a model that has none yet.
        runtime: What computes the network (`raysal.model.engines`).
        recent_bytes: On CPUs, how much of what the network said of the last images is remembered; see `raysal.model.engines.Recent`.

    Raises:
        CheckpointError: The runtime can't run this network, or gives other masks than eager float32.

    Attributes:
        model, info, device, digest: As given.
    """

    def __init__(
        self,
        model: TwoBranch,
        info: ModelInfo,
        device: torch.device | str = "cpu",
        digest: str = "",
        runtime: engines.Runtime = engines.EAGER,
        recent_bytes: int = 0,
    ) -> None:
        self.info, self.device, self.digest = info, torch.device(device), digest
        self.model = place(model, info.model, self.device).eval()
        self._threads = _OneThreadEach() if self.device.type == "cpu" else None
        engine = engines.build(self.model, runtime, self.device, self._answers)
        self._engine = engines.Recent(engine, recent_bytes) if recent_bytes and self._threads is not None else engine

    @classmethod
    def load(
        cls, uri: str, device: torch.device | str = "cpu", runtime: engines.Runtime = engines.EAGER, recent_bytes: int = 0
    ) -> Predictor:
        """From a checkpoint folder. Raises CheckpointError where it can't be used."""
        loaded = load(uri, device)
        return cls(loaded.model, loaded.info, device, loaded.digest, runtime, recent_bytes)

    def logits(self, images: Sequence[np.ndarray], resolution: Resolution = "full") -> tuple[Tensor, Tensor]:
        """Logits of both branches, float32 [B, C, h, w] on the device, at the network's input size or decoder resolution.

        Args:
            images: uint8 [H, W, 3] RGB arrays of one size.
            resolution: ``full`` is the size after `input_scale`; ``decoder`` is before the last upsampling (DeepLab: a quarter).

        Raises:
            ValueError: No images, of several sizes, or not uint8 RGB.
        """
        z1, z2, _ = self.logits_and_features(images, resolution)
        return z1, z2

    def logits_and_features(self, images: Sequence[np.ndarray], resolution: Resolution = "full") -> tuple[Tensor, Tensor, Tensor]:
        """`logits`, and the images' embeddings float32 [B, D] (see `TwoBranch.answers`) from the same pass."""
        z1, z2, features = self._each(lambda x: self._run(self._scaled(x), (0, 1), resolution), images)
        return z1, z2, features

    def mc_logits(self, image: np.ndarray, seed: int, passes: int, resolution: Resolution = "full") -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of one image under `passes` draws of dropout, one pair [1, C, h, w] a pass: what BALD sums up.

        One image at a time, so that its draws depend on its own seed and the pass alone, and one image's features are in memory.

        Args:
            image: uint8 [H, W, 3] RGB.
            seed: Any integer of up to 63 bits.
            passes: How many draws.
            resolution: As in `logits`.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        branches: Any = self.model.branches
        x_BCHW = to_batch([image]).to(self.device)

        def encode(_: object) -> Encoded:
            return self.model.encode(self._scaled(x_BCHW))

        def decode(encoded: Encoded | None) -> tuple[Tensor, ...]:
            return self.model.decode(encoded or encode(None), resolution)

        # Where nothing is dropped in the encoders, as with most of them, every pass would encode the same once more.
        encoded = None if any(dropouts(branch.encoder) for branch in branches) else self._map(encode, [None])[0]
        for t in range(passes):
            with mc_dropout(self.model), torch.random.fork_rng(devices):
                torch.manual_seed((seed + t * 0x9E3779B97F4A7C15) % 2**63)
                z1, z2 = self._map(decode, [encoded])[0]
            yield z1, z2

    def predict(self, images: Sequence[np.ndarray]) -> Prediction:
        """Masks at the images' own size, from the mean of both branches' softmax (or branch 1's, as `info.predict` says).

        Each image goes through the network whole, whatever its size; see `pieces`.

        Args:
            images: uint8 [H, W, 3] RGB arrays of one size.

        Raises:
            ValueError: No images, of several sizes, or not uint8 RGB.
        """
        probabilities, confidence, masks = (t.cpu().numpy() for t in self._each(self._predict, images))
        return Prediction(masks, confidence, probabilities)

    def grid(self, size_HW: tuple[int, int]) -> Grid | None:
        """The tiles of images of a size; None where they go through the network whole."""
        model = self.info.model
        return None if self.pixels(size_HW) <= model.whole_pixels else Grid.over(size_HW, model.tile_px, model.overlap_px)

    def pixels(self, size_HW: tuple[int, int]) -> int:
        """How many pixels an image of a size counts: its own, or those that the network sees where these are more.

        A line of pixels is padded to a strip; an `input_scale` above 1 enlarges.
        """
        height, width = (max(self.model.smallest_px, round(side * self.info.input_scale)) for side in size_HW)
        return max(size_HW[0] * size_HW[1], height * width)

    def pieces(self, images: Sequence[np.ndarray]) -> Iterator[Iterator[Piece]]:
        """What the model says about each of several images of one size, whole or tile by tile, in the order of the images.

        Of an image in tiles, memory holds a few tiles and one overlap as wide as the image.

        Raises:
            ValueError: As in `predict`.
        """
        to_batch(images[:1])  # refuses what is no image
        size_HW = (images[0].shape[0], images[0].shape[1])
        if (grid := self.grid(size_HW)) is not None:
            return (self._blended(image, grid) for image in images)
        found, rows, cols = self.predict(images), slice(size_HW[0]), slice(size_HW[1])
        return (iter([Piece(rows, cols, m, c, p)]) for m, c, p in zip(found.masks, found.confidence, found.probabilities, strict=True))

    def masks(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 [H, W] class ids of several images of one size, whatever that is."""
        found = []
        for image_HWC, pieces in zip(images, self.pieces(images), strict=True):
            mask_HW = np.empty(image_HWC.shape[:2], np.uint8)
            for piece in pieces:
                mask_HW[piece.rows, piece.cols] = piece.mask
            found.append(mask_HW)
        return found

    def _blended(self, image_HWC: np.ndarray, grid: Grid) -> Iterator[Piece]:
        def values() -> Iterator[np.ndarray]:
            for tiles in batches(grid.tiles(), self.at_once):
                yield from self.predict([tile.of(image_HWC) for tile in tiles]).probabilities

        for rows, cols, p_Chw in grid.blend(values()):
            confidence_hw = p_Chw.max(axis=0)
            yield Piece(rows, cols, p_Chw.argmax(axis=0).astype(np.uint8), confidence_hw, p_Chw)

    @property
    def at_once(self) -> int:
        """Tiles that go through the network together."""
        return torch.get_num_threads() if self._threads is not None else max(1, PIXELS_AT_ONCE // self.info.model.tile_px**2)

    @property
    def _answers(self) -> tuple[int, ...]:
        """The branches that a mask comes from."""
        return (0, 1) if self.info.predict == "mean" else (0,)

    def _run(self, x_BCHW: Tensor, branches: tuple[int, ...], resolution: Resolution = "full") -> tuple[Tensor, ...]:
        """Logits of some branches and the embeddings, of images that are scaled already."""
        return self.model.answers(x_BCHW, branches, resolution, self._engine)

    def _predict(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BCHW, size_HW = self._scaled(images_BCHW), images_BCHW.shape[-2:]
        logits = list(self._voters(x_BCHW))
        if self.info.model.flip:
            logits += [z.flip(-1) for z in self._voters(x_BCHW.flip(-1))]
        p_BCHW = torch.stack([resize(z, size_HW).softmax(dim=1) for z in logits]).mean(dim=0)
        confidence_BHW, masks_BHW = p_BCHW.max(dim=1)
        return p_BCHW, confidence_BHW, masks_BHW.to(torch.uint8)

    def _voters(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits of the branches that a prediction is the mean of."""
        return self._run(x_BCHW, self._answers)[:-1]

    def _scaled(self, images_BCHW: Tensor) -> Tensor:
        return scale_images(images_BCHW, self.info.input_scale)

    def _each(self, run: Callable[[Tensor], tuple[Tensor, ...]], images: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
        """Runs on a batch [B, 3, H, W] of uint8 images without gradients, as the class promises."""
        batch_BCHW = to_batch(images).to(self.device)
        together = max(1, PIXELS_AT_ONCE // self.pixels(images[0].shape[:2])) if self._threads is None else 1
        parts = self._map(run, batch_BCHW.split(together))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]

    def _map(self, run: Callable[[In], Out], inputs: Sequence[In]) -> list[Out]:
        """Calls a function on several inputs, without gradients; on CPUs at once, each call on one thread."""
        if self._threads is not None:
            return self._threads.map(run, inputs)
        with torch.no_grad():
            return [run(x) for x in inputs]


class _OneThreadEach:
    """Calls a function on several inputs at once, each call on one torch thread and without gradients."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def map(self, run: Callable[[In], Out], inputs: Sequence[In]) -> list[Out]:
        if self._pool is None:
            # The setting holds for the thread that makes it; the caller keeps its own.
            self._pool = ThreadPoolExecutor(torch.get_num_threads(), "predict", torch.set_num_threads, (1,))
        return list(self._pool.map(torch.no_grad()(run), inputs))


def batches(items: Iterable[In], size: int) -> Iterator[list[In]]:
    """Items in groups of so many, the last perhaps smaller."""
    given = iter(items)
    while group := list(islice(given, size)):
        yield group


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """Stacks uint8 [H, W, 3] arrays of one size to a tensor uint8 [B, 3, H, W].

    Raises:
        ValueError: No images, of several sizes, or not uint8 RGB.
    """
    seen = {(image.shape, str(image.dtype)) for image in images}
    if len(seen) != 1 or any(len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != "uint8" for shape, dtype in seen):
        raise ValueError(f"expected uint8 images [height, width, 3] of one size, got {sorted(seen) or 'none'}; group images by size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def scale_images(images_BCHW: Tensor, scale: float) -> Tensor:
    """Images resized for the network: float32 0..255, sides times scale rounded half up and at least 1 px, antialiased."""
    size_HW = tuple(max(1, math.floor(n * scale + 0.5)) for n in images_BCHW.shape[-2:])
    return resize(images_BCHW.float(), size_HW)


def resize(x_BCHW: Tensor, size_HW: Sequence[int]) -> Tensor:
    """Bilinear to a size in pixels, antialiased where it shrinks; the same tensor where nothing changes."""
    if x_BCHW.shape[-2:] == tuple(size_HW):
        return x_BCHW
    return F.interpolate(x_BCHW, size=list(size_HW), mode="bilinear", antialias=True)


@contextmanager
def mc_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout draws inside, for BALD; all else, batch norm above all, stays in eval mode."""
    modules = [m for m in dropouts(model) if not m.training]
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()
