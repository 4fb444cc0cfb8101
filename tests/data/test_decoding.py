"""Every kind of image file a folder may hold, against values worked out by hand."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from eqvae_jax.data import decoding
from eqvae_jax.data.decoding import BrokenExample, decode, rgb8


def encoded(image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, **{"format": "PNG"} | options)
    return file.getvalue()


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, 128 + 60 * np.sin(x / 9)], -1).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_rgb_is_unchanged(format):
    x = noise(3, 5, 3)
    y = decode(encoded(x, format=format), "x")
    assert y.dtype == np.uint8 and np.array_equal(y, x)


def test_path(tmp_path):
    x = noise(4, 6, 3)
    (tmp_path / "a.png").write_bytes(encoded(x))
    assert np.array_equal(decode(tmp_path / "a.png", "a.png"), x)


def test_greyscale_is_repeated():
    x = noise(3, 5)
    assert np.array_equal(decode(encoded(x), "x"), np.stack([x] * 3, -1))


def test_16_bit_is_scaled_not_clipped():
    x = np.array([[0, 257, 32896, 65535, 128, 129, 300, 65535 - 129]], np.uint16)
    expected = np.rint(x / 257).astype(np.uint8)  # no value is halfway: 257 is odd
    for format in "PNG", "TIFF":
        assert np.array_equal(decode(encoded(x, format=format), "x")[..., 1], expected)


def test_palette_is_looked_up():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert decode(encoded(image), "x").tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert decode(encoded(image, transparency=1), "x").tolist() == [[[10, 20, 30], [255] * 3, [70, 80, 90]]]


def test_alpha_is_laid_over_white():
    x = noise(4, 6, 4)
    alpha = x[..., 3:] / 255
    expected = alpha * x[..., :3] + (1 - alpha) * 255
    assert np.abs(decode(encoded(x), "x") - expected).max() <= 1
    grey = Image.fromarray(x[..., :2].copy(), "LA")
    alpha = x[..., 1] / 255
    expected = alpha * x[..., 0] + (1 - alpha) * 255
    assert np.abs(decode(encoded(grey), "x")[..., 2] - expected).max() <= 1


def test_cmyk_jpeg():
    # Cyan, magenta, yellow and half black, as 16 x 16 blocks: JPEG keeps flat blocks to within a few levels.
    inks = np.zeros((16, 64, 4), np.uint8)
    for k in range(4):
        inks[:, 16 * k : 16 * k + 16, k] = 255 if k < 3 else 128
    y = decode(encoded(Image.fromarray(inks, "CMYK"), format="JPEG", quality=100), "x").astype(int)
    blocks = y[8, 8::16]
    assert np.abs(blocks - [[0, 255, 255], [255, 0, 255], [255, 255, 0], [127, 127, 127]]).max() <= 4


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation(tag):
    upright = noise(3, 5, 3)
    # How a camera stores the upright image under each tag (EXIF 2.3, 4.6.4 A): the tag names where row 0 and
    # column 0 of what is stored belong.
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.swapaxes(0, 1), 6: np.rot90(upright, 1), 7: np.rot90(upright.swapaxes(0, 1), 2),
              8: np.rot90(upright, -1)}[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    assert np.array_equal(decode(encoded(np.ascontiguousarray(stored), exif=exif), "x"), upright)


def test_damaged_exif_does_not_lose_the_image():
    x = smooth(16, 16)
    for exif in b"neither II nor MM", b"II*\0", b"II*\0\xff\xff\xff\x7f":
        for format in "JPEG", "PNG":
            assert decode(encoded(x, format=format, exif=b"Exif\0\0" + exif), "x").shape == x.shape


@pytest.mark.parametrize("options", [
    {"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "WEBP"},
    {"format": "TIFF", "compression": "tiff_lzw"}, {"format": "BMP"}], ids=str)
def test_truncated_files_are_broken_not_half_grey(options):
    data = encoded(noise(96, 80, 3), **options)
    assert decode(data, "x").shape == (96, 80, 3)
    for part in 0.02, 0.3, 0.6, 0.9:
        with pytest.raises(BrokenExample, match="^a file: "):
            decode(data[: int(part * len(data))], "a file")


def test_damaged_png_is_broken():
    data = bytearray(encoded(noise(32, 32, 3)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BrokenExample):
        decode(bytes(data), "x")


def test_announced_gigapixels_are_refused_before_they_are_decoded():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width, height):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
                + chunk(b"IEND", b""))

    with pytest.raises(BrokenExample, match="8193x8192 pixels are more"):
        decode(png(8193, 8192), "x")
    with pytest.raises(BrokenExample, match="DecompressionBomb"):
        decode(png(60000, 60000), "x")
    with pytest.raises(BrokenExample, match="65x1 is a strip"):
        decode(encoded(noise(1, 65, 3)), "x")
    assert decode(encoded(noise(1, 64, 3)), "x").shape == (1, 64, 3)


def test_other_formats_and_unknown_ranges_are_broken():
    postscript = encoded(noise(8, 8, 3), format="EPS")
    gif = encoded(noise(8, 8), format="GIF")
    for data in postscript, gif, b"", b"not an image", b"\xff\xd8\xff":
        with pytest.raises(BrokenExample):
            decode(data, "x")
    floats = encoded(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), format="TIFF")
    with pytest.raises(BrokenExample, match="32-bit"):
        decode(floats, "x")


def test_reasons_do_not_vary_between_runs():
    messages = set()
    for _ in range(2):
        with pytest.raises(BrokenExample) as caught:
            decode(b"not an image" * 9, "x")
        messages.add(str(caught.value))
    assert messages == {"x: not a readable image (UnidentifiedImageError)"}


def test_broken_example_survives_a_pipe():
    error = pickle.loads(pickle.dumps(BrokenExample("a.jpg", "truncated")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")


def test_reduced_jpeg_keeps_the_asked_side_and_the_picture():
    x = smooth(400, 640)
    data = encoded(x, format="JPEG", quality=95)
    half, full = decode(data, "x", min_side=150), decode(data, "x", min_side=201)
    assert half.shape == (200, 320, 3) and full.shape == (400, 640, 3)
    average = x.reshape(200, 2, 320, 2, 3).mean((1, 3))
    assert np.abs(half - average).mean() < 1.5
    assert decode(encoded(x), "x", min_side=10).shape == x.shape  # PNG has no such thing


def test_rgb8():
    grey, deep, clear = noise(3, 5), noise(3, 5, 1, dtype=np.uint16), noise(3, 5, 4)
    assert np.array_equal(rgb8(grey, "x"), np.stack([grey] * 3, -1))
    assert np.array_equal(rgb8(deep, "x")[..., 2], np.rint(deep[..., 0] / 257))
    assert np.array_equal(rgb8(clear, "x"), decode(encoded(clear), "x"))
    for bad in np.zeros((3, 5), np.float32), np.zeros((3, 5, 2), np.uint8), np.zeros((0, 5, 3), np.uint8):
        with pytest.raises(BrokenExample, match="is not an image"):
            rgb8(bad, "x")


def test_formats_cover_the_extensions():
    Image.init()
    assert {Image.EXTENSION[extension] for extension in decoding.EXTENSIONS} == set(decoding.FORMATS)
