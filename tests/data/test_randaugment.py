"""RandAugment's operations against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from research.data import randaugment
from research.data.randaugment import OPERATIONS

HEIGHT, WIDTH = 22, 27
LEFT, TOP = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
# Smooth, noisy and not of full range, so that every operation changes it.
PHOTO = np.stack([40 + 4 * LEFT, 30 + 5 * TOP, 60 + 2 * LEFT + 2 * TOP], -1)
PHOTO = (PHOTO + np.random.default_rng(0).integers(0, 40, PHOTO.shape)).clip(20, 220).astype(np.uint8)


def _by_pillow(image: np.ndarray, name: str, strength: float) -> np.ndarray:
    picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    enhancers = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "sharpness": ImageEnhance.Sharpness}
    enhancers["brightness"] = ImageEnhance.Brightness
    shift = 150 / 331 * strength
    inverse = {
        "shear_x": (1, 0.3 * strength, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * strength, 1, 0),
        "translate_x": (1, 0, shift * picture.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift * picture.height),
    }
    fill = (128,) * len(picture.getbands())
    if name in enhancers:
        picture = enhancers[name](picture).enhance(1 + 0.9 * strength)
    elif name in inverse:
        picture = picture.transform(picture.size, Image.Transform.AFFINE, inverse[name], fillcolor=fill)
    elif name == "rotate":
        picture = picture.rotate(30 * strength, fillcolor=fill)
    elif name == "posterize":
        picture = ImageOps.posterize(picture, 8 - round(4 * abs(strength)))
    elif name == "solarize":
        picture = ImageOps.solarize(picture, 255 - 255 * abs(strength))
    elif name != "identity":
        picture = {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}[name](picture)
    return np.asarray(picture).reshape(image.shape)


def _is_same(got: np.ndarray, expected: np.ndarray) -> bool:
    """At most 1% of the values may differ: where a position or a product is rounded."""
    return (np.abs(got - expected) > 0).mean() <= 0.01


_operate = jax.jit(jax.vmap(randaugment.operate, (None, 0, 0)))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_is_pillows(channels):
    strengths = np.array([-1, -0.55, 0.3, 0.9], np.float32)
    cases = [(number, strength) for number in range(len(OPERATIONS)) for strength in strengths]
    image = PHOTO[..., :channels]
    results = np.asarray(_operate(jnp.float32(image), *(jnp.array(column) for column in zip(*cases))))
    for (number, strength), got in zip(cases, results):
        expected = _by_pillow(image, OPERATIONS[number], float(strength))
        assert _is_same(got, expected), (OPERATIONS[number], strength)
        is_color_of_gray = channels == 1 and OPERATIONS[number] == "color"
        assert np.array_equal(expected, image) == (OPERATIONS[number] == "identity" or is_color_of_gray)


@pytest.mark.parametrize("image", [np.full((5, 4, 3), 77, np.uint8), np.arange(6, dtype=np.uint8).reshape(2, 1, 3)])
def test_images_of_few_values_and_pixels_are_pillows(image):
    numbers = np.arange(len(OPERATIONS))
    results = np.asarray(_operate(jnp.float32(image), numbers, np.full(len(numbers), 0.5, np.float32)))
    for name, got in zip(OPERATIONS, results):
        np.testing.assert_array_equal(got, _by_pillow(image, name, 0.5), err_msg=name)


def test_every_operation_and_direction_is_drawn():
    """With one operation an image, each result is that of one operation and sign."""
    names = {(name, sign): _by_pillow(PHOTO, name, sign * 0.7) for name in OPERATIONS for sign in (-1, 1)}
    augment = jax.jit(lambda x, key, magnitude: randaugment.randaugment(x, key, 1, magnitude))
    batch = jnp.array(np.broadcast_to(PHOTO, (400, *PHOTO.shape)))
    results = np.asarray(augment(batch, jax.random.key(0), 7.0))
    found = [[case for case, expected in names.items() if _is_same(got, expected)] for got in results]
    counts = {case: sum(case in cases for cases in found) for case in names}
    assert all(found)
    assert min(counts.values()) >= 4  # 14 are expected


@pytest.mark.slow
def test_the_operations_are_applied_one_after_another():
    batch = jnp.array(np.broadcast_to(PHOTO, (40, *PHOTO.shape)))
    results = np.asarray(jax.jit(lambda x, key: randaugment.randaugment(x, key, 2, 7.0))(batch, jax.random.key(1)))
    once = [_by_pillow(PHOTO, name, sign * 0.7) for name in OPERATIONS for sign in (-1, 1)]
    twice = np.stack([_by_pillow(x, name, sign * 0.7) for x in once for name in OPERATIONS for sign in (-1, 1)])
    # An equalized or sharpened image depends on each pixel before: rounding may change a few more.
    different = np.abs(results[:, None] - twice[None]).max(-1) > 1
    assert (different.mean((2, 3)).min(1) < 0.05).all()
    assert sum(_is_same(got, PHOTO) for got in results) < 10
