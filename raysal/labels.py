"""Label sets: which classes exist, what value each has in mask files, which colour it is drawn in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np

from raysal.errors import DataError

IGNORE = 255
"""Class id of pixels that carry no label: not labelled, no data, abstained. The same everywhere in raysal."""

INVALID = 254
"""Marks, in a look-up table only, a file value that the label set does not know."""


@dataclass(frozen=True)
class LabelSet:
    """An ordered set of classes; class ids are 0..n-1 in this order.

    Args:
        name: Short name, stored in checkpoints and tables.
        classes: Class names; their order gives the class ids.
        colors: One RGB colour (0..255) a class.
        values: The value of each class in mask files (often the class id; S5Mars: id + 1).
        null_values: Values in mask files that mean "no label"; 255 always does.
    """

    name: str
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    values: tuple[int, ...] = ()
    null_values: tuple[int, ...] = field(default=(IGNORE,))

    def __post_init__(self) -> None:
        n = len(self.classes)
        if not self.values:
            object.__setattr__(self, "values", tuple(range(n)))
        if not 2 <= n < INVALID:
            raise DataError(f"label set {self.name!r} has {n} classes; give 2 to {INVALID - 1}")
        if len(set(self.classes)) != n:
            raise DataError(f"label set {self.name!r} names a class twice: {', '.join(self.classes)}")
        if len(self.colors) != n or len(self.values) != n:
            raise DataError(
                f"label set {self.name!r} has {n} classes, {len(self.colors)} colours and {len(self.values)} mask values; "
                "give one of each per class"
            )
        everything = (*self.values, *self.null_values)
        if len(set(self.values)) != n or set(self.values) & set(self.null_values):
            raise DataError(f"label set {self.name!r}: a mask value stands for two things: {everything}")
        bytes_ = (*everything, *(c for rgb in self.colors for c in rgb))
        if any(not 0 <= v <= 255 for v in bytes_) or any(len(rgb) != 3 for rgb in self.colors):
            raise DataError(f"label set {self.name!r}: mask values and RGB colours must be integers from 0 to 255")

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    def lut(self) -> np.ndarray:
        """Look-up table from file values to class ids.

        Returns:
            uint8 [256]: class id, `IGNORE` for null values, `INVALID` for values that the set does not know.
        """
        table = np.full(256, INVALID, dtype=np.uint8)
        table[list(self.null_values)] = IGNORE
        table[IGNORE] = IGNORE if IGNORE not in self.values else table[IGNORE]
        table[list(self.values)] = np.arange(self.n_classes, dtype=np.uint8)
        return table

    def file_values(self) -> np.ndarray:
        """Look-up table from class ids back to file values: uint8 [256]; `IGNORE` becomes the first null value."""
        table = np.full(256, self.null_values[0] if self.null_values else IGNORE, dtype=np.uint8)
        table[: self.n_classes] = self.values
        return table

    def palette(self) -> np.ndarray:
        """Colours by class id: uint8 [256, 3]; ids without a class (ignored pixels) are black."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: self.n_classes] = self.colors
        return table

    def colorize(self, mask_HW: np.ndarray) -> np.ndarray:
        """Draws class ids uint8 [H, W] in the set's colours: uint8 [H, W, 3]."""
        return self.palette()[mask_HW]

    def to_dict(self) -> dict[str, object]:
        """The JSON form that `from_dict` reads."""
        return {
            "name": self.name,
            "null_values": list(self.null_values),
            "classes": [
                {"id": i, "name": n, "rgb": list(c), "value": v}
                for i, (n, c, v) in enumerate(zip(self.classes, self.colors, self.values, strict=True))
            ],
        }

    @classmethod
    def from_dict(cls, raw: dict, name: str = "custom") -> LabelSet:
        """Reads ``{"classes": [{"id", "name", "rgb", "value"?}, ...], "null_values"?: [...], "name"?: ...}``.

        Raises:
            DataError: A field is missing or of the wrong type.
        """
        try:
            rows = sorted(raw["classes"], key=lambda r: int(r["id"]))
            if [int(r["id"]) for r in rows] != list(range(len(rows))):
                raise DataError(f"label set {name!r}: class ids must be 0..{len(rows) - 1}, got {[r['id'] for r in rows]}")
            return cls(
                name=str(raw.get("name", name)),
                classes=tuple(str(r["name"]) for r in rows),
                colors=tuple((int(r["rgb"][0]), int(r["rgb"][1]), int(r["rgb"][2])) for r in rows),
                values=tuple(int(r.get("value", r["id"])) for r in rows),
                null_values=tuple(int(v) for v in raw.get("null_values", [raw.get("ignore_index", IGNORE)])),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"label set {name!r} can't be read ({type(error).__name__}: {error}); expected "
                '{"classes": [{"id": 0, "name": "soil", "rgb": [128, 0, 0]}, ...]}'
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "custom") -> LabelSet:
        """Reads the JSON text of `from_dict`'s form. Raises DataError where it is no JSON."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(f"label set {name!r} is not JSON: {error}") from error
        return cls.from_dict(raw, name)


S5MARS = LabelSet(
    name="s5mars",
    classes=("sky", "ridge", "soil", "sand", "bedrock", "rock", "rover", "trace", "hole"),
    colors=(
        (107, 142, 35), (128, 64, 128), (220, 20, 60), (152, 251, 152), (119, 11, 32),
        (20, 60, 60), (15, 51, 252), (22, 220, 60), (152, 21, 12),
    ),
    values=(1, 2, 3, 4, 5, 6, 7, 8, 9),
    null_values=(0, IGNORE),
)  # fmt: skip
AI4MARS = LabelSet(
    name="ai4mars",
    classes=("soil", "bedrock", "sand", "big rock"),
    colors=((0, 0, 255), (0, 255, 0), (255, 0, 255), (255, 255, 0)),
)
MARSSCAPES = LabelSet(
    name="marsscapes",
    classes=("soil", "bedrock", "gravel", "sand", "rock", "steep_slope", "sky", "ridge"),
    colors=(
        (0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 0, 255),
        (255, 255, 0), (0, 255, 255), (34, 56, 19), (128, 128, 128),
    ),
)  # fmt: skip
LABEL_SETS = {s.name: s for s in (S5MARS, AI4MARS, MARSSCAPES)}
