"""The image decoder: a data set and `launch.predict` see the same pixels in every form of storage."""

import io
import json
import struct
import zlib

import artifacts
import numpy as np
import pytest
from PIL import Image
from test_sources import make_set

from launch import predict
from research.config import DatasetConfig
from research.data import decoding, sources
from research.errors import UserError
from research.tasks.task import ExportedFunction

RNG = np.random.default_rng(0)
SIZE = (4, 6)  # height and width: an odd number of bits
GRAY = RNG.integers(0, 256, SIZE, np.uint8)
BITS = np.where(GRAY > 99, 255, 0).astype(np.uint8)
COLOR = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
TRANSPARENT = RNG.integers(0, 256, (*SIZE, 4), np.uint8)


def encode(pixels, kind="PNG", mode=None, **options):
    """Encodes an array or a Pillow image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.convert(mode or image.mode).save(file, kind, **options)
    return file.getvalue()


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width, height, depth, color, rows, before=b""):
    """Writes a PNG file by its specification: `rows` are the packed samples, `before` the chunks before them."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + before + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def png16(values):
    """Encodes [h, w, c] as a PNG file with 16 bits per channel."""
    height, width, channels = values.shape
    rows = [row.astype(">u2").tobytes() for row in values]
    return raw_png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def _pack(samples, bits):
    digits = ["".join(f"{sample:0{bits}b}" for sample in row) for row in samples]
    return [int(row.ljust(-len(row) // 8 * -8, "0"), 2).to_bytes(-(-len(row) // 8)) for row in digits]


def with_opaque_alpha(pixels):
    return np.concatenate([pixels, np.full((*SIZE, 1), 2**16 - 1)], -1)


WIDE = GRAY[..., None].astype(np.uint16) * 257  # the same pixels with 16 bits
GRAY_FORMS = {
    "gray": encode(GRAY),
    "gray-alpha": encode(GRAY, mode="LA"),
    "color": encode(GRAY, mode="RGB"),
    "color-alpha": encode(GRAY, mode="RGBA"),
    "palette": encode(GRAY, mode="P"),
    "gif": encode(GRAY, "GIF"),
    "bmp": encode(GRAY, "BMP"),
    "webp": encode(GRAY, "WEBP", "RGB", lossless=True),
    "16-bit-gray": png16(WIDE),
    "16-bit-gray-alpha": png16(with_opaque_alpha(WIDE)),
    "16-bit-color": png16(np.repeat(WIDE, 3, -1)),
    "16-bit-color-alpha": png16(with_opaque_alpha(np.repeat(WIDE, 3, -1))),
}
BIT_FORMS = {
    "8-bit": encode(BITS),
    "1-bit": encode(BITS, mode="1"),
    "1-bit-bmp": encode(BITS, "BMP", "1"),
    "1-bit-gif": encode(BITS, "GIF", "1"),
    "2-bit": raw_png(6, 4, 2, 0, _pack(BITS // 85, 2)),
    "4-bit": raw_png(6, 4, 4, 0, _pack(BITS // 17, 4)),
    "16-bit": png16(BITS[..., None].astype(np.uint16) * 257),
}
FORMS = [pytest.param(form, GRAY, id=name) for name, form in GRAY_FORMS.items()]
FORMS += [pytest.param(form, BITS, id=name) for name, form in BIT_FORMS.items()]


@pytest.mark.parametrize(("encoded", "pixels"), FORMS)
def test_the_same_pixels_in_any_form_are_the_same(encoded, pixels):
    for channels in (1, 3):
        found = decoding.decode(encoded, channels)
        assert (found.dtype, found.shape) == (np.uint8, (*SIZE, channels))
        np.testing.assert_array_equal(found, np.repeat(pixels[..., None], channels, -1))
    for channels in (2, 4):
        np.testing.assert_array_equal(decoding.decode(encoded, channels)[..., -1], np.full(SIZE, 255))


@pytest.mark.parametrize(("kind", "pixels"), [("PNG", COLOR), ("JPEG", COLOR), ("PNG", GRAY), ("JPEG", GRAY)])
def test_ordinary_files_are_as_pillow_decodes_them(kind, pixels):
    encoded = encode(pixels, kind)
    channels = 3 if pixels.ndim == 3 else 1
    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(image).reshape(*SIZE, channels)
    np.testing.assert_array_equal(decoding.decode(encoded, channels, SIZE), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_rounded_to_8(channels):
    values = RNG.permuted(np.tile(np.arange(2**16), (channels, 1)), axis=1).T.reshape(256, 256, channels)
    np.testing.assert_array_equal(decoding.decode(png16(values), channels), np.round(values * 255 / 65535))


def test_transparent_pixels_are_put_on_white():
    color, alpha = TRANSPARENT[..., :3].astype(int), TRANSPARENT[..., 3:] / 255
    expected = color * alpha + 255 * (1 - alpha)
    encoded = encode(TRANSPARENT)
    np.testing.assert_allclose(decoding.decode(encoded, 3).astype(int), expected, atol=1)
    np.testing.assert_allclose(decoding.decode(encoded, 1)[..., 0], expected @ [0.299, 0.587, 0.114], atol=2)
    np.testing.assert_array_equal(decoding.decode(encoded, 4), TRANSPARENT)
    one_color = encode(COLOR, transparency=tuple(COLOR[1, 2].tolist()))
    expected = COLOR.copy()
    expected[1, 2] = 255
    np.testing.assert_array_equal(decoding.decode(one_color, 3), expected)
    of_palette = encode(Image.fromarray(BITS).convert("P"), transparency=0)
    np.testing.assert_array_equal(decoding.decode(of_palette, 1), np.full((*SIZE, 1), 255))


def test_color_becomes_gray_by_luma_and_cmyk_rgb():
    luma = decoding.decode(encode(COLOR), 1)[..., 0].astype(int)
    np.testing.assert_allclose(luma, np.round(COLOR @ [0.299, 0.587, 0.114]), atol=1)
    jpeg = encode(Image.fromarray(TRANSPARENT, "CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.mode == "CMYK"
        inks = np.asarray(image).astype(float)
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    np.testing.assert_allclose(decoding.decode(jpeg, 3).astype(float), expected, atol=1)


TURNED = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = TURNED[orientation](COLOR)
    encoded = encode(COLOR, exif=exif)
    np.testing.assert_array_equal(decoding.decode(encoded, 3, expected.shape[:2]), expected)
    np.testing.assert_array_equal(decoding.decode(encode(GRAY, exif=exif), 1)[..., 0], TURNED[orientation](GRAY))
    wide = raw_png(6, 4, 16, 0, [row.tobytes() for row in WIDE.astype(">u2")], _chunk(b"eXIf", exif.tobytes()[6:]))
    np.testing.assert_array_equal(decoding.decode(wide, 1)[..., 0], TURNED[orientation](GRAY))
    if orientation > 4:
        with pytest.raises(decoding.SizeError, match="has 4x6 pixels, not 6x4"):
            decoding.decode(encoded, 3, SIZE)


def test_damaged_exif_data_is_ignored():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        np.testing.assert_array_equal(decoding.decode(encode(COLOR, exif=exif), 3), COLOR)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {})])
def test_the_first_frame_is_decoded(kind, options):
    first, second = (Image.fromarray(np.repeat(gray[..., None], 3, -1)) for gray in (BITS, 255 - BITS))
    encoded = encode(first, kind, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(encoded)) as image:
        assert (image.format, image.n_frames) == (kind, 2)
        expected = np.asarray(image.convert("L"))
    assert (np.abs(expected.astype(int) - BITS) < 100).all()
    np.testing.assert_array_equal(decoding.decode(encoded, 1)[..., 0], expected)


@pytest.mark.parametrize(
    ("encoded", "size", "message"),
    [
        (b"no image", None, r"is not an intact image \(PNG, JPEG, BMP, WEBP, GIF\): UnidentifiedImageError"),
        (encode(COLOR, "TIFF"), None, "is not an intact image"),
        (encode(COLOR)[:-40], None, "is not an intact image"),
        (raw_png(50_000, 50_000, 8, 2, [b""]), None, "has more than 89,478,485 pixels"),
        (raw_png(10_000, 10_000, 8, 2, [b""]), None, "has more than 89,478,485 pixels"),
        (raw_png(9_000, 9_000, 8, 2, [b""]), SIZE, "has 9000x9000 pixels, not 6x4"),  # it has no pixels to decode
        (raw_png(6, 4, 2, 0, _pack(BITS // 85, 2), _chunk(b"tRNS", b"\0\1")), None, "has a transparent color and 2 b"),
    ],
)
def test_what_cannot_be_decoded_is_refused(encoded, size, message):
    with pytest.raises(decoding.ImageError, match=message):
        decoding.decode(encoded, 3, size)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder of data sets, and an empty cache; TFDS decodes nothing."""
    from tensorflow_datasets.core.features import image_feature

    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(image_feature.Image, "decode_example_np", None)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def _load(folder, files, channels, dtype=np.uint8):
    """Prepares a set of these image files, loads its test split and returns the images in the order of the files."""

    def features(lib):
        image = lib.Image(shape=(None, None, channels), dtype=dtype)
        label = lib.ClassLabel(num_classes=len(files))
        return lib.FeaturesDict({"image": image, "mask": lib.Image(dtype=np.uint16), "label": label})

    examples = [{"image": file, "mask": file, "label": i} for i, file in enumerate(files)]
    make_set(folder, "drawn", features, {"train": examples[:1], "test": examples})
    test = sources.load(DatasetConfig(name="drawn", data_dir=str(folder))).test
    return test["image"][np.argsort(test["label"])]  # TFDS shuffles them


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_of_the_same_digits_in_any_form_is_the_same(data_dir, channels):
    found = _load(data_dir, BIT_FORMS.values(), channels)
    np.testing.assert_array_equal(found, np.tile(BITS[..., None], (len(BIT_FORMS), 1, 1, channels)))


def test_uint16_images_become_uint8_and_float_images_are_refused(data_dir):
    np.testing.assert_array_equal(_load(data_dir, [png16(WIDE)], 1, np.uint16)[0], GRAY[..., None])
    description = data_dir / "drawn" / "1.0.0" / "features.json"
    features = json.loads(description.read_text())
    features["featuresDict"]["features"]["image"]["image"]["dtype"] = "float32"
    description.write_text(json.dumps(features))
    with pytest.raises(UserError, match="drawn: its images are float32; only images of uint8 and uint16 are supported"):
        sources.load(DatasetConfig(name="drawn", data_dir=str(data_dir)))


def test_a_damaged_image_is_named(data_dir):
    with pytest.raises(UserError, match=r"drawn/\w+, example \d: the image is not an intact image .*; replace it"):
        _load(data_dir, [GRAY_FORMS["gray"], encode(COLOR)[:-40]], 3)


def test_another_decoder_decodes_again(data_dir, monkeypatch, capsys):
    _load(data_dir, [encode(COLOR)], 3)
    assert "decoding" in capsys.readouterr().err
    config = DatasetConfig(name="drawn", data_dir=str(data_dir))
    sources.load(config)
    assert "decoding" not in capsys.readouterr().err
    monkeypatch.setattr(decoding, "NAME", "another")
    sources.load(config)
    assert "decoding" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_predictions_of_the_files_of_a_set_are_those_of_its_arrays(data_dir, tmp_path, channels, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        *GRAY_FORMS.values(),
        *BIT_FORMS.values(),
        encode(TRANSPARENT),
        encode(Image.fromarray(TRANSPARENT, "CMYK"), "JPEG"),
        encode(np.rot90(COLOR).copy(), "JPEG", exif=exif),
        encode(COLOR, "MPO", save_all=True, append_images=[Image.fromarray(255 - COLOR)]),
        png16(RNG.integers(0, 2**16, (*SIZE, 3))),
    ]
    kernel = RNG.normal(0, 1e-3, (4 * 6 * channels, 2)).astype(np.float32)

    def classify(_, inputs):
        return {"logits": inputs["image"].reshape(inputs["image"].shape[0], -1).astype("float32") @ kernel}

    function = ExportedFunction(classify, {"image": (f"b, 4, 6, {channels}", "uint8")}, "")
    artifact = artifacts.write(tmp_path / "artifact", "ab", {"classify": function})
    (tmp_path / "files").mkdir()
    for number, file in enumerate(files):
        (tmp_path / "files" / f"{number:02}.png").write_bytes(file)  # Pillow goes by the contents
    predict.run([f"--artifact={artifact}", str(tmp_path / "files")])
    lines = capsys.readouterr().out.splitlines()
    logits = _load(data_dir, files, channels).reshape(len(files), -1) @ kernel
    assert len(lines) == len(files)
    for line, (a, b) in zip(lines, logits):
        shares = dict(part.split(" ") for part in line.split("  ")[1:])
        assert float(shares["a"]) == pytest.approx(1 / (1 + np.exp(b - a)), abs=6e-4)
