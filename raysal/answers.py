"""What a model says of images: masks and scores, the same for archives and for the endpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raysal.config import ScoreConfig
from raysal.errors import InputError
from raysal.images.tiles import Grid
from raysal.labels import IGNORE
from raysal.model.checkpoint import ModelInfo
from raysal.model.metrics import ClassReliability
from raysal.model.runtime import Piece, Predictor, batches, resize
from raysal.query.pooling import TileScores
from raysal.query.scores import Bald, maps, measure, score_images

PROJECTION_SEED = 20_260_101
"""Of the embeddings' projection; a constant, so that embeddings of different runs compare."""


class Seen(Protocol):
    """An image that is asked about."""

    @property
    def id(self) -> str:
        """Draws of dropout follow it."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def image_HWC(self) -> np.ndarray:
        """uint8 RGB."""

    @property
    def valid_HW(self) -> np.ndarray:
        """bool; pixels known to be valid without labels."""


@dataclass(frozen=True)
class Mask:
    """A mask, and how sure it is.

    Attributes:
        mask_HW: uint8 class ids; 255 where a pixel is not valid, or less sure than was asked.
        confidence: Mean over the pixels that keep a class; None where none does.
        abstained: Share of the image that is 255.
        class_fractions: float32 [C], of the pixels that keep a class.
    """

    mask_HW: np.ndarray
    confidence: float | None
    abstained: float
    class_fractions: np.ndarray


class Masks:
    """Masks of images by a model.

    Args:
        predictor: The model.
        precision: Pixels abstain unless their class, at their confidence, was right that often on val; None keeps all.
        name: What errors call the checkpoint.

    Raises:
        InputError: A precision is asked of a model that was never measured on val.
    """

    def __init__(self, predictor: Predictor, precision: float | None, name: str) -> None:
        self.predictor = predictor
        self.reliability = None if precision is None else reliability(predictor.info, name)
        self.thresholds = [] if precision is None or self.reliability is None else self.reliability.thresholds(precision)

    def of(self, images: Sequence[Seen], go_on: Callable[[], object] = lambda: None) -> list[Mask]:
        """Masks of several images of one size.

        Args:
            images: The images.
            go_on: Called between the tiles of large images; what it raises ends the work.

        Raises:
            ValueError: The network's output is not finite.
        """
        found = self.predictor.pieces([image.image_HWC for image in images])
        return [self._one(image, pieces, go_on) for image, pieces in zip(images, found, strict=True)]

    def _one(self, image: Seen, pieces: Iterable[Piece], go_on: Callable[[], object]) -> Mask:
        mask_HW = np.full(image.valid_HW.shape, IGNORE, np.uint8)
        counts_C, confidence = np.zeros(self.predictor.info.label_set.n_classes, np.int64), 0.0
        for piece in pieces:
            go_on()
            if not np.isfinite(piece.confidence).all():
                raise not_finite(image.name)
            kept = image.valid_HW[piece.rows, piece.cols]
            if self.reliability is not None:
                kept = kept & self.reliability.reaches(piece.mask, piece.confidence, self.thresholds)
            mask_HW[piece.rows, piece.cols][kept] = piece.mask[kept]
            counts_C += np.bincount(piece.mask[kept], minlength=len(counts_C))
            confidence += float(piece.confidence[kept].sum(dtype=np.float64))
        pixels = int(counts_C.sum())
        return Mask(
            mask_HW,
            confidence=confidence / pixels if pixels else None,
            abstained=1 - pixels / mask_HW.size,
            class_fractions=(counts_C / max(1, pixels)).astype(np.float32),
        )


def pixel_map(predictor: Predictor, image: Seen, name: str, go_on: Callable[[], object] = lambda: None) -> np.ndarray:
    """One of `raysal.query.scores.MAPS` at the image's own size.

    Args:
        predictor: The model.
        image: Of any size; large ones are blended from tiles as their masks are.
        name: Of the map, for example ``uncertainty``.
        go_on: As in `Masks.of`.

    Returns:
        float32 [H, W] in [0, 1]; 0 where not valid.

    Raises:
        ConfigError: There is no such map.
        ValueError: The network's output is not finite.
    """

    def of(images: Sequence[np.ndarray]) -> Tensor:
        go_on()
        a_Bhw = maps(*predictor.logits(images, "full"), (name,))[name]
        return resize(a_Bhw[:, None], images[0].shape[:2]).clamp(0, 1).cpu()

    size_HW = image.valid_HW.shape
    grid, map_HW = predictor.grid(size_HW), np.zeros(size_HW, np.float32)
    if grid is None:
        map_HW[:] = of([image.image_HWC])[0, 0]
    else:
        tiles = (a.numpy() for group in batches(grid.tiles(), predictor.at_once) for a in of([tile.of(image.image_HWC) for tile in group]))
        for rows, cols, a_1hw in grid.blend(tiles):
            map_HW[rows, cols] = a_1hw[0]
    if not np.isfinite(map_HW).all():
        raise not_finite(image.name)
    return np.where(image.valid_HW, map_HW, np.float32(0))


class Scores:
    """Scores of images by a model, what it names, and an embedding.

    Args:
        predictor: The model.
        cfg: Which scores, and how.
        seed: Of dropout's draws.
        class_bonus: omega_C by class id; None without.
    """

    def __init__(self, predictor: Predictor, cfg: ScoreConfig, seed: int = 0, class_bonus: Sequence[float] | None = None) -> None:
        self.predictor, self.cfg, self.seed, self.class_bonus = predictor, cfg, seed, class_bonus

    def of(self, images: Sequence[Seen], go_on: Callable[[], object] = lambda: None) -> list[dict[str, Any]]:
        """For each of several images of one size: a float a score, ``class_fractions`` float32 [C], and ``embedding`` where it is wanted.

        Arguments and errors as in `Masks.of`.
        """
        cfg, grid = self.cfg, self.predictor.grid(images[0].valid_HW.shape)
        if grid is None:
            rgb, valid_BHW = [image.image_HWC for image in images], torch.from_numpy(np.stack([image.valid_HW for image in images]))
            z1, z2, features = self.predictor.logits_and_features(rgb, cfg.resolution)
            bald = self._bald([image.id for image in images], rgb) if "bald" in cfg.scores else None
            found = score_images(z1, z2, valid_BHW.to(z1.device), cfg, self.class_bonus, bald)
        else:
            parts = [self._in_tiles(image, grid, go_on) for image in images]
            found = {name: np.concatenate([scores[name] for scores, _ in parts]) for name in parts[0][0]}
            features = torch.cat([features_1D for _, features_1D in parts])
        fractions = found.pop("class_fractions").astype(np.float32)
        embeddings = embed(features, cfg.embedding_dim)
        rows: list[dict[str, Any]] = []
        for i, image in enumerate(images):
            row: dict[str, Any] = {name: float(score[i]) for name, score in found.items()}
            if not np.isfinite(list(row.values())).all() or not np.isfinite(embeddings[i]).all():
                raise not_finite(image.name)
            row["class_fractions"] = fractions[i]
            if cfg.embedding_dim:
                row["embedding"] = embeddings[i]
            rows.append(row)
        return rows

    def _in_tiles(self, image: Seen, grid: Grid, go_on: Callable[[], object]) -> tuple[dict[str, np.ndarray], Tensor]:
        """Scores of one image, and its embedding [1, D]: the mean of its tiles', by what of each is valid and theirs."""
        cfg = self.cfg
        scores, total_D = TileScores(cfg, len(grid.rows) * len(grid.cols)), torch.zeros((), dtype=torch.float64)
        for tiles in batches(enumerate(grid.tiles()), self.predictor.at_once):
            go_on()
            images = [tile.of(image.image_HWC) for _, tile in tiles]
            z1, z2, features_BD = self.predictor.logits_and_features(images, cfg.resolution)
            valid_BHW = torch.from_numpy(np.stack([tile.of(image.valid_HW) for _, tile in tiles])).to(z1.device)
            share_BHW = torch.from_numpy(np.stack([tile.weight_HW for _, tile in tiles])).to(z1.device)
            bald = self._bald([f"{image.id}/{k}" for k, _ in tiles], images) if "bald" in cfg.scores else None
            measured = measure(z1, z2, valid_BHW, cfg, self.class_bonus, bald, share_BHW)
            scores.add(measured)
            for features_D, counts in zip(features_BD.double().cpu(), measured.weight_Bn.sum(1).double().cpu(), strict=True):
                total_D = total_D + features_D * counts
        return scores.scores(), functional.normalize(total_D[None].float(), dim=1)

    def _bald(self, names: Sequence[str], images: Sequence[np.ndarray]) -> Tensor:
        """The map of `Bald`; draws follow (seed, image id, pass), so that no shard, order or batch changes them."""
        maps = []
        for name, image_HWC in zip(names, images, strict=True):
            bald, seed = Bald(), dropout_seed(self.seed, name)
            for z1, z2 in self.predictor.mc_logits(image_HWC, seed, self.cfg.bald_passes, self.cfg.resolution):
                bald.add(z1 / self.cfg.temperature, z2 / self.cfg.temperature)
            maps.append(bald.map())
        return torch.cat(maps)


def reliability(info: ModelInfo, name: str) -> ClassReliability:
    """How often each class's pixels were right on val, by confidence. Raises InputError where the checkpoint does not say."""
    counts = (info.parents.get("metrics") or {}).get("reliability")
    if counts is None:
        raise InputError(f"{name}: was never measured on val, so no precision can be promised; train with a val split, or leave it out")
    return ClassReliability.of(counts)


def not_finite(name: str) -> ValueError:
    """What is raised where a network answers with NaN or infinity."""
    return ValueError(f"the network's output for {name} is not finite; was the training stable?")


def dropout_seed(seed: int, image_id: str) -> int:
    """A 63-bit seed from (seed, id)."""
    digest = hashlib.blake2b(f"dropout:{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def embed(features_BD: Tensor, dim: int) -> np.ndarray:
    """Embeddings of a fixed length from encoder features of any.

    More features than `dim` are projected by a fixed Gaussian matrix, which keeps cosine distances up to
    about 1/sqrt(dim) (Johnson and Lindenstrauss, 1984); fewer are padded with zeros, which keeps them exactly.

    Args:
        features_BD: float [B, D].
        dim: Length wanted; 0 gives [B, 0].

    Returns:
        float16 [B, dim], L2-normalised.
    """
    f_BD = features_BD.float().cpu().numpy()
    own = f_BD.shape[1]
    if own > dim:
        # RandomState: its stream is frozen for ever, that of newer generators may change with numpy.
        matrix_DE = np.random.RandomState(PROJECTION_SEED).standard_normal((own, dim)).astype(np.float32)
        f_BD = np.stack([f_D @ matrix_DE for f_D in f_BD])  # row by row: the last bits of a product of matrices follow the batch
    else:
        f_BD = np.pad(f_BD, ((0, 0), (0, dim - own)))
    return (f_BD / np.maximum(np.linalg.norm(f_BD, axis=1, keepdims=True), 1e-12)).astype(np.float16)
