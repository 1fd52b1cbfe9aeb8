"""Normalization and augmentation against NumPy, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from research.config import AugmentConfig
from research.data import images
from research.errors import UserError

COUNT, HEIGHT, WIDTH = 32, 9, 11
# Every pixel has a different value, which identifies it after augmentation.
PIXELS = np.arange(COUNT * HEIGHT * WIDTH * 2, dtype=np.float32).reshape(COUNT, HEIGHT, WIDTH, 2) + 1
INDEX = np.arange(COUNT, dtype=np.int32)


def _augment(config: AugmentConfig, seed=0, epoch=0, index=INDEX):
    epochs = np.full(len(index), epoch, np.int32)
    augment = jax.jit(lambda x, key: images.augment(x, key, config, index=index, epoch=epochs))
    return np.asarray(augment(jnp.asarray(PIXELS), jax.random.key(seed)))


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))))
def test_channel_statistics_are_numpys(batch):
    mean, std = images.channel_statistics(batch)
    scaled = batch / np.float64(255)
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), atol=1e-12)
    expected = scaled.std((0, 1, 2))
    np.testing.assert_allclose(std, np.where(np.ptp(batch, axis=(0, 1, 2)) > 0, expected, 1.0), rtol=1e-9)


def test_channel_statistics_of_many_chunks(monkeypatch):
    batch = np.random.default_rng(0).integers(0, 256, (2500, 32, 32, 3), np.uint8)  # larger than one chunk
    mean, std = images.channel_statistics(batch)
    np.testing.assert_allclose(mean, batch.mean((0, 1, 2)) / 255, rtol=1e-10)
    np.testing.assert_allclose(std, batch.std((0, 1, 2)) / 255, rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_normalized_images_have_mean_0_and_variance_1(dtype):
    batch = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    mean, std = images.channel_statistics(batch)
    out = images.normalize(batch, mean, std, dtype)
    assert out.dtype == dtype
    expected = (batch / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(np.float64(out), expected, atol=1e-5 if dtype == "float32" else 2e-2)


def test_the_default_config_changes_nothing():
    np.testing.assert_array_equal(_augment(AugmentConfig()), PIXELS)


def test_random_flips_turn_half_of_the_images():
    out = _augment(AugmentConfig(flip="random"))
    flipped = [not np.array_equal(one, original) for one, original in zip(out, PIXELS)]
    for one, original, turned in zip(out, PIXELS, flipped):
        np.testing.assert_array_equal(one, original[:, ::-1] if turned else original)
    assert 8 <= sum(flipped) <= 24
    assert not np.array_equal(out, _augment(AugmentConfig(flip="random"), seed=1))


def test_alternating_flips_turn_each_image_every_other_epoch():
    config = AugmentConfig(flip="alternating")
    first, second, third = (_augment(config, seed=epoch, epoch=epoch) for epoch in range(3))
    np.testing.assert_array_equal(first, third)
    np.testing.assert_array_equal(first, second[:, :, ::-1])
    assert 8 <= sum(not np.array_equal(one, original) for one, original in zip(first, PIXELS)) <= 24
    # The image's number decides, not its place in the batch.
    swapped = _augment(config, index=INDEX[::-1].copy())
    turned = (first != PIXELS).any((1, 2, 3))
    np.testing.assert_array_equal((swapped != PIXELS).any((1, 2, 3)), turned[::-1])


@pytest.mark.parametrize("crop", [1, 3, 8])
def test_crops_are_windows_of_the_reflected_image(crop):
    out = _augment(AugmentConfig(crop=crop))
    shifts = set()
    for one, original in zip(out, PIXELS):
        padded = np.pad(original, ((crop, crop), (crop, crop), (0, 0)), "reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (HEIGHT, WIDTH), axis=(0, 1))
        same = (windows == one.transpose(2, 0, 1)).all((2, 3, 4))
        assert same.any()
        shifts.add(tuple(np.argwhere(same)[0]))
    assert len(shifts) > min((2 * crop + 1) ** 2, COUNT) / 2


@pytest.mark.parametrize("side", [1, 4, 5, 9])
def test_cutout_sets_one_square_to_the_mean(side):
    out = _augment(AugmentConfig(cutout=side))
    areas = []
    for one, original in zip(out, PIXELS):
        cut = (one != original).any(-1)
        assert (one[cut] == 0).all()
        rows, columns = np.flatnonzero(cut.any(1)), np.flatnonzero(cut.any(0))
        assert cut.sum() == len(rows) * len(columns)  # a full rectangle: the square, clipped at the borders
        assert np.ptp(rows) == len(rows) - 1
        assert np.ptp(columns) == len(columns) - 1
        areas.append(cut.sum())
        assert max(len(rows), len(columns)) <= side
    assert max(areas) == side**2 or side == 9  # the largest square fits the 9 rows at one position only


@pytest.mark.parametrize("side", [1, 2, 4, 5, 9])
def test_cutout_is_centered_at_a_uniform_pixel_with_an_even_sides_extra_above_and_left(side):
    """Against NumPy: every pixel is drawn as often, and each mask is a square around one of them."""
    before, after = side // 2, (side - 1) // 2  # 5: two on both sides; 4: two above and left, one below and right
    masks = {}
    for row, column in np.ndindex(HEIGHT, WIDTH):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[max(row - before, 0) : row + after + 1, max(column - before, 0) : column + after + 1] = True
        masks[mask.tobytes()] = row, column
    assert len(masks) == HEIGHT * WIDTH  # each mask identifies its pixel
    count = 100 * HEIGHT * WIDTH
    batch, index = jnp.ones((count, HEIGHT, WIDTH, 1)), np.zeros(count, np.int32)
    out = images.augment(batch, jax.random.key(3), AugmentConfig(cutout=side), index=index, epoch=index)
    drawn = np.zeros((HEIGHT, WIDTH))
    for one in np.asarray(out)[..., 0] == 0:
        drawn[masks[one.tobytes()]] += 1
    assert (np.abs(drawn - 100) < 50).all()  # five standard deviations


def test_combined_augmentation_keeps_shape_and_dtype():
    config = AugmentConfig(crop=2, flip="random", cutout=3)
    out = _augment(config)
    assert (out.shape, out.dtype) == (PIXELS.shape, PIXELS.dtype)
    kept = out != 0
    assert all(set(one[mask]) <= set(original.ravel()) for one, original, mask in zip(out, PIXELS, kept))


@pytest.mark.parametrize(("fields", "words"), [({"crop": 9}, "crop=9"), ({"cutout": 10}, "cutout=10")])
def test_augmentation_too_large_for_the_images_is_an_error(fields, words):
    with pytest.raises(UserError, match=words):
        images.check(AugmentConfig(**fields), (HEIGHT, WIDTH, 2))
    images.check(AugmentConfig(crop=8, cutout=9), (HEIGHT, WIDTH, 2))


def test_pixel_means_are_numpys_over_chunks():
    values = np.random.default_rng(0).integers(0, 256, (3000, 20, 20, 3)).astype(np.uint8)  # more than one chunk
    np.testing.assert_allclose(images.pixel_means(values), values.mean(0) / 255, rtol=1e-12)
