"""Images and masks: what decodes, to which pixels, and that nothing but ImageError ever comes of bad bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from raysal.errors import ImageError
from raysal.images.decode import decode, decode_image, image_size
from raysal.images.masks import decode_mask, encode_mask
from raysal.images.parts import check_parts

LIMIT = 10_000
RGB = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
MASK = np.random.default_rng(1).integers(0, 10, (24, 31), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """A PNG from its parts, for headers that pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_lossless_rgb_comes_back_to_the_bit(kind: str) -> None:
    image_HWC = decode_image(encoded(RGB, kind), LIMIT, "a")
    assert image_HWC.dtype == np.uint8 and image_HWC.flags.c_contiguous and image_HWC.flags.writeable
    np.testing.assert_array_equal(image_HWC, RGB)


def test_jpeg_comes_back_close() -> None:
    smooth_HWC = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    decoded_HWC = decode_image(encoded(smooth_HWC, "JPEG", quality=95), LIMIT, "a")
    assert np.abs(decoded_HWC.astype(int) - smooth_HWC).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_grey_becomes_three_equal_channels(kind: str) -> None:
    data = encoded(RGB[:, :, 0], kind)
    decoded_HWC = decode_image(data, LIMIT, "a")
    assert decoded_HWC.shape == (24, 31, 3)
    np.testing.assert_array_equal(decoded_HWC, np.repeat(np.asarray(Image.open(io.BytesIO(data)))[:, :, None], 3, axis=2))


def test_one_bit_png_is_black_and_white() -> None:
    bits_HW = RGB[:, :, 0] > 128
    np.testing.assert_array_equal(decode_image(encoded(bits_HW), LIMIT, "a")[:, :, 1], bits_HW * np.uint8(255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_stretched_between_its_percentiles(kind: str) -> None:
    wide_HW = np.arange(1000, 3500, dtype=np.uint16).reshape(50, 50)  # 12-bit counts in a 16-bit file
    found_HW = decode_image(encoded(wide_HW, kind), LIMIT, "a")[:, :, 2]
    low, high = np.percentile(wide_HW, (0.5, 99.5))
    np.testing.assert_allclose(found_HW, ((wide_HW - low) / (high - low) * 255).clip(0, 255).astype(int), atol=1)
    assert found_HW.min() == 0 and found_HW.max() == 255


def test_12_bit_colour_in_16_bit_samples_is_refused_and_16_bit_colour_is_not() -> None:
    wide_HWC = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(">u2")

    def file(values_HWC: np.ndarray) -> bytes:
        return png(8, 8, 16, 2, b"".join(b"\0" + row.tobytes() for row in values_HWC))

    with pytest.raises(ImageError, match="colour of 12 bits in samples of 16") as refused:
        decode_image(file(wide_HWC), LIMIT, "a")
    assert refused.value.status == "decode"
    np.testing.assert_array_equal(decode_image(file((wide_HWC * 16).astype(">u2")), LIMIT, "a"), wide_HWC // 16)
    assert decode_image(encoded(RGB // 32), LIMIT, "a").max() < 16, "dark pictures of 8 bits are as they are"


def test_alpha_is_dropped_and_not_blended() -> None:
    rgba_HWC = np.dstack([RGB, np.zeros_like(MASK)])
    np.testing.assert_array_equal(decode_image(encoded(rgba_HWC), LIMIT, "a"), RGB)
    grey = Image.merge("LA", [Image.fromarray(RGB[:, :, 0]), Image.fromarray(np.zeros_like(MASK))])
    np.testing.assert_array_equal(decode_image(encoded(grey), LIMIT, "a")[:, :, 0], RGB[:, :, 0])


def test_palette_becomes_its_colours() -> None:
    image = Image.fromarray(MASK).convert("P")
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    np.testing.assert_array_equal(decode_image(encoded(image), LIMIT, "a"), image.convert("RGB"))


def test_cmyk_jpeg_becomes_rgb() -> None:
    blue = Image.new("RGB", (16, 16), (20, 40, 200)).convert("CMYK")
    assert np.abs(decode_image(encoded(blue, "JPEG", quality=95), LIMIT, "a")[8, 8].astype(int) - (20, 40, 200)).max() <= 6


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    assert decode_image(encoded(RGB, "JPEG", exif=exif), LIMIT, "a").shape == (24, 31, 3)


def test_the_first_of_several_frames_is_taken() -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    np.testing.assert_array_equal(decode_image(encoded(first, "TIFF", save_all=True, append_images=[second]), LIMIT, "a"), RGB)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_real_and_long_samples_are_stretched_and_one_value_is_grey(dtype: type) -> None:
    ramp_HW = np.linspace(-4000, 9000, 64).reshape(8, 8).astype(dtype)
    found_HW = decode_image(encoded(ramp_HW, "TIFF"), LIMIT, "a.tif")[:, :, 0]
    assert found_HW.ravel()[0] == 0 and found_HW.ravel()[-1] == 255 and (np.diff(found_HW.ravel().astype(int)) >= 0).all()
    assert (decode_image(encoded(np.ones((4, 4), dtype), "TIFF"), LIMIT, "a.tif") == 127).all()


# ---------------------------------------------------------------- limits and damage


def test_too_many_pixels_are_refused_before_decoding() -> None:
    huge = png(9_000, 9_000, 8, 2, b"")  # no pixel data at all: whoever decodes first says "decode"
    with pytest.raises(ImageError, match=r"bomb\.png: 9000 x 9000 .*data\.max_pixels") as caught:
        decode_image(huge, LIMIT, "bomb.png")
    assert caught.value.status == "limit"


def test_the_limit_itself_is_allowed() -> None:
    assert decode_image(encoded(RGB), 24 * 31, "a").shape == RGB.shape
    with pytest.raises(ImageError):
        decode_image(encoded(RGB), 24 * 31 - 1, "a")


@pytest.mark.parametrize("decode", [decode_image, decode_mask])
def test_a_bomb_is_seen_in_its_header(decode: Callable) -> None:
    with pytest.raises(ImageError, match=r"bomb\.png") as caught:
        decode(png(60_000, 60_000, 8, 0, b""), 64 * 2**20, "bomb.png")
    assert caught.value.status == "limit"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", r"not a JPEG, PNG or TIFF image \(it starts with b'<!DOCTYPE html><'"),
        (b"GIF89a" + bytes(60), "not a JPEG, PNG or TIFF"),
        (bytes(500), "not a JPEG, PNG or TIFF"),
        (png(0, 5, 8, 0, b""), "convert it|damaged"),
    ],
)
def test_what_is_no_image_says_what_was_seen(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=rf"^a\.jpg: .*{words}") as caught:
        decode_image(data, LIMIT, "a.jpg")
    assert caught.value.status == "decode"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@given(share=st.floats(0, 0.99))
def test_a_truncated_file_is_never_an_image(kind: str, share: float) -> None:
    data = encoded(RGB, kind)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: int(share * len(data))], LIMIT, "cut")
    assert caught.value.status == "decode" and str(caught.value).startswith("cut: ")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*"]))
def test_random_bytes_raise_nothing_but_image_errors(tail: bytes, head: bytes) -> None:
    for read in (decode_image, decode_mask):
        with pytest.raises(ImageError):
            read(head + tail, LIMIT, "noise")


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_png_is_never_another_mask(data: st.DataObject) -> None:
    """Every flipped bit is either noticed or harmless: labels never change in silence."""
    damaged = bytearray(encode_mask(MASK))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        values_HW = decode_mask(bytes(damaged), LIMIT, "a")
    except ImageError:
        return
    np.testing.assert_array_equal(values_HW, MASK)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_size_needs_only_the_header(kind: str) -> None:
    data = encoded(RGB, kind)
    if kind != "TIFF":  # pillow writes a TIFF's directory after its pixels
        data = data[:-100]
    assert image_size(io.BytesIO(data), LIMIT, "a") == (24, 31)
    with pytest.raises(ImageError) as caught:
        image_size(io.BytesIO(data), 100, "a")
    assert caught.value.status == "limit"


# ---------------------------------------------------------------- masks


@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_masks_survive_encoding_to_the_bit(mask_HW: np.ndarray) -> None:
    data = encode_mask(mask_HW)
    decoded_HW = decode_mask(data, LIMIT, "a")
    np.testing.assert_array_equal(decoded_HW, mask_HW)
    assert decoded_HW.dtype == np.uint8 and decoded_HW.flags.writeable
    assert data == encode_mask(np.asfortranarray(mask_HW))


@pytest.mark.parametrize("bad", [np.zeros((3, 3), np.int64), np.zeros((3, 3, 1), np.uint8), np.zeros((0, 3), np.uint8)])
def test_encoding_refuses_what_is_no_mask(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W\]"):
        encode_mask(bad)


def test_palette_masks_give_indices_not_colours() -> None:
    image = Image.fromarray(MASK).convert("P")
    image.putpalette([v for i in range(256) for v in (255 - i, i // 2, 90)])
    np.testing.assert_array_equal(decode_mask(encoded(image), LIMIT, "a"), MASK)
    np.testing.assert_array_equal(decode_mask(encoded(image, bits=4), LIMIT, "a"), MASK)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_small_grey_depths_keep_the_stored_numbers(bits: int) -> None:
    """PNG optimisers pack class values so; pillow would stretch them to 0..255."""
    top = 2**bits - 1
    values_W = np.arange(8, dtype=np.uint8) % (top + 1)
    packed = np.packbits(np.unpackbits(values_W[:, None], axis=1)[:, -bits:].reshape(-1)).tobytes()
    np.testing.assert_array_equal(decode_mask(png(8, 1, bits, 0, b"\0" + packed), LIMIT, "a"), values_W[None])


@pytest.mark.parametrize("channels", [3, 4])
def test_rgb_masks_with_equal_channels_are_one_channel(channels: int) -> None:
    stacked_HWC = np.repeat(MASK[:, :, None], channels, axis=2)
    np.testing.assert_array_equal(decode_mask(encoded(stacked_HWC), LIMIT, "a"), MASK)


def test_16_bit_masks_work_where_values_fit() -> None:
    np.testing.assert_array_equal(decode_mask(encoded(MASK.astype(np.uint16)), LIMIT, "a"), MASK)
    with pytest.raises(ImageError, match=r"values from 0 to \d+; class values must be 0 to 255"):
        decode_mask(encoded(MASK.astype(np.uint16) * 100), LIMIT, "a")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(RGB), "in colours.*one-channel PNG"),
        (encoded(MASK, "JPEG"), "JPEG mask has blurred values"),
        (encoded(MASK.astype(np.float32), "TIFF"), "one-channel 8-bit PNG"),
        (png(1, 1, 16, 2, bytes(7)), "16-bit RGB mask"),
        (b"", "empty"),
        (b"<html></html>", "not a PNG or TIFF"),
    ],
)
def test_masks_that_lost_their_values_are_refused_with_the_fix(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=rf"m\.png: .*{words}") as caught:
        decode_mask(data, LIMIT, "m.png")
    assert caught.value.status == "decode"


def test_masks_keep_the_pixel_limit() -> None:
    with pytest.raises(ImageError) as caught:
        decode_mask(encoded(MASK), 100, "m.png")
    assert caught.value.status == "limit"


# ---------------------------------------------------------------- real files


@pytest.mark.data
def test_real_navcam_and_mastcam_files_decode(shared: Path) -> None:
    navcam = next(iter(sorted((shared / "data/ai4mars_sample/msl/images/edr").iterdir())))
    image_HWC = decode_image(navcam.read_bytes(), 2**20, str(navcam))
    assert image_HWC.shape == (1024, 1024, 3) and (image_HWC[..., 0] == image_HWC[..., 2]).all()
    tile = next(iter(sorted((shared / "data/mars/images").iterdir())))
    assert decode_image(tile.read_bytes(), 2**16, str(tile)).shape == (256, 256, 3)


def test_a_large_image_is_accepted_where_the_limit_allows_it() -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    assert image_size(io.BytesIO(file.getvalue()), 4 * 10**8, "mosaic.png") == (20_000, 20_000)
    with pytest.raises(ImageError, match="20000 x 20000 is more than 1000 pixels"):
        image_size(io.BytesIO(file.getvalue()), 1000, "mosaic.png")


def test_dark_ground_of_a_16_bit_picture_is_measured_and_only_zeros_at_the_edge_are_no_data() -> None:
    ground = np.linspace(100, 300, 64 * 64).astype(np.uint16).reshape(64, 64)
    ground[10, 10] = 60_000  # stretched, most of the ground comes near black
    assert decode(encoded(ground), 10**6, "a").valid_HW.all()
    ground[:, :20] = 0
    found = decode(encoded(ground), 10**6, "a")
    assert not found.valid_HW[:, :20].any() and found.valid_HW[:, 20:].all()
    assert not found.image_HWC[:, :20].any()


def test_holes_of_pictures_are_no_data() -> None:
    real = np.linspace(0.1, 0.9, 64 * 64).astype(np.float32).reshape(64, 64)
    real[20, 20], real[30, 30] = np.nan, -3.4e38
    found = decode(encoded(real, "TIFF"), 10**6, "a")
    assert (~found.valid_HW).sum() == 2 and not found.valid_HW[20, 20] and not found.valid_HW[30, 30]
    assert 100 < found.image_HWC[32, 32, 0] < 160
    palette = Image.fromarray(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8) % 4 + 1, "P")
    palette.putpalette([40, 50, 60] * 256)
    assert np.array_equal(decode(encoded(palette, transparency=3), 10**6, "a").valid_HW, np.asarray(palette) != 3)


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    picture = encoded(RGB, "JPEG", progressive=True)
    assert 2 <= picture.count(b"\xff\xda") <= 20 and decode_image(picture, LIMIT, "a").shape == RGB.shape
    with pytest.raises(ImageError, match="60 scans") as refused:
        decode_image(picture[:-2] + b"\xff\xda" * (60 - picture.count(b"\xff\xda")), LIMIT, "a")
    assert refused.value.status == "limit"


def tiff(order: str = "<", **tags: object) -> bytes:
    """A grey TIFF of 8 x 8 pixels from its directory, for what pillow does not write; values that are lists are stored behind it."""
    entries = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, **{int(tag[1:]): value for tag, value in tags.items()}}
    behind, start = b"", 8 + 2 + 12 * len(entries) + 4
    body = b""
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, list) else [value]
        body += struct.pack(order + "HHL", tag, 4, len(values))
        body += struct.pack(order + "L", values[0] if len(values) == 1 else start + len(behind))
        behind += struct.pack(f"{order}{len(values)}L", *values) if len(values) > 1 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(entries))
    return head + body + struct.pack(order + "L", 0) + behind + bytes(64)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tile_counts_whole_however_little_of_it_lies_in_the_image(order: str) -> None:
    for side in (32_768, 128):
        with pytest.raises(ImageError, match=f"tiles of {side} x {side} are more than {LIMIT} pixels") as refused:
            decode_image(tiff(order, t322=side, t323=side, t324=200, t325=64), LIMIT, "a")
        assert refused.value.status == "limit"


def many(kind: str, n: int) -> bytes:
    """A picture of n parts that hold nothing."""
    if kind == "PNG":
        data = encoded(RGB)
        return data[:33] + (struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))) * n + data[33:]
    if kind == "TIFF":
        return tiff(t273=[8] * n, t278=8)
    data = encoded(RGB, "JPEG")
    return data[:2] + {"JPEG": b"\xff\xfe\0\2", "padded JPEG": b"\xff"}[kind] * n + data[2:]


@pytest.mark.parametrize(("kind", "words"), [("PNG", "chunks"), ("JPEG", "segments"), ("padded JPEG", "segments"), ("TIFF", "strips")])
def test_a_picture_of_very_many_parts_is_refused_before_they_are_read(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_image(many(kind, 500), LIMIT, "a").shape[2] == 3
    data = many(kind, 300_000)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("read by pillow"))
    with pytest.raises(ImageError, match=words) as refused:
        decode_image(data, LIMIT, "a")
    assert refused.value.status == "limit"
    if kind == "PNG":
        with pytest.raises(ImageError, match=words):
            decode_mask(data, LIMIT, "a")


def test_parts_are_counted_in_big_tiffs_too_and_nothing_is_said_of_damaged_ones() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "TIFF", big_tiff=True)
    check_parts(file.getvalue(), "a")
    with pytest.raises(ImageError, match="strips"):
        check_parts(file.getvalue().replace(struct.pack("<HHQ", 273, 4, 1), struct.pack("<HHQ", 273, 4, 2**40)), "a")
    for data in (b"", b"II", b"MM\0*", b"II*\0" + bytes(4), b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0"):
        check_parts(data, "a")
