"""Color jitter, random erasing, MixUp and CutMix against NumPy and Pillow; everything together on any mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageEnhance
from scipy import stats

from research import sharding
from research.config import AugmentConfig, MeshConfig
from research.data import augmentation, color_jitter, erasing, mixing
from research.data.batch import Batch
from research.errors import UserError

RNG = np.random.default_rng(0)
KINDS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
PHOTOS = (RNG.integers(0, 200, (64, 9, 8, 3)) // 2 + RNG.integers(0, 100, (64, 1, 1, 3))).astype(np.float32)


def _jittered(config: AugmentConfig) -> np.ndarray:
    return np.asarray(color_jitter.jitter(jnp.array(PHOTOS), jax.random.key(0), config))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_color_jitter_is_pillows_in_each_order(order, monkeypatch):
    """With fixed draws: factors of 1.3, 0.6 and 1.6."""
    factors = np.array([1.3, 0.6, 1.6], np.float32)
    config = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.8)
    low, high = 1 - np.array([0.5, 0.5, 0.8]), 1 + np.array([0.5, 0.5, 0.8])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.array((factors - low) / (high - low)))
    monkeypatch.setattr(jax.random, "permutation", lambda key, count: jnp.array(order))
    for got, photo in zip(_jittered(config)[:8], PHOTOS):
        picture = Image.fromarray(photo.astype(np.uint8))
        for kind in order:
            picture = list(KINDS.values())[kind](picture).enhance(float(factors[kind]))
        np.testing.assert_allclose(got, np.asarray(picture), atol=4)  # Pillow rounds down three times


@pytest.mark.parametrize("kind", KINDS)
def test_jitter_draws_its_factor_between_1_minus_and_1_plus_the_strength(kind):
    out = _jittered(AugmentConfig(**{kind: 0.4}))
    luma = PHOTOS @ np.array([0.2989, 0.587, 0.114])
    other = {"brightness": 0, "contrast": luma.mean((1, 2))[:, None, None, None], "saturation": luma[..., None]}[kind]
    away, inside = PHOTOS - other, (out > 0) & (out < 255)
    factors = np.array([((o - x) * a)[m].sum() / (a * a)[m].sum() for o, x, a, m in zip(out, PHOTOS, away, inside)]) + 1
    np.testing.assert_allclose(out, np.clip(PHOTOS + (factors[:, None, None, None] - 1) * away, 0, 255), atol=1e-2)
    assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 0.01


def _rectangles(mask: np.ndarray) -> np.ndarray:
    """Returns top, left, height, width of the rectangle in each mask [n, h, w]; zeros where there is none."""
    found = []
    for one in mask:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one.sum() == len(rows) * len(columns)
        assert not len(rows) or (np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns))
        found.append((rows[0], columns[0], len(rows), len(columns)) if len(rows) else (0, 0, 0, 0))
    return np.array(found)


def _torchvisions_rectangle(height: int, width: int) -> tuple[int, int, int, int]:
    """RandomErasing.get_params of torchvision, in NumPy."""
    for _ in range(10):
        area = height * width * RNG.uniform(0.02, 0.33)
        ratio = np.exp(RNG.uniform(np.log(0.3), np.log(3.3)))
        rows, columns = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if rows < height and columns < width:
            return int(RNG.integers(0, height - rows + 1)), int(RNG.integers(0, width - columns + 1)), rows, columns
    return 0, 0, 0, 0


def test_random_erasing_draws_torchvisions_rectangles():
    height, width, count = 12, 30, 2000
    images = jnp.ones((count, height, width, 2))
    out = np.asarray(jax.jit(erasing.erase)(images, jax.random.key(0), 1.0))
    assert set(np.unique(out)) == {0, 1}
    assert (out[..., 0] == out[..., 1]).all()
    got = _rectangles(out[..., 0] == 0)
    expected = np.array([_torchvisions_rectangle(height, width) for _ in range(count)])
    for mine, other in zip(got.T, expected.T):  # top, left, height, width
        assert stats.ks_2samp(mine, other).pvalue > 0.01
    assert stats.ks_2samp(got[:, 2] * got[:, 3], expected[:, 2] * expected[:, 3]).pvalue > 0.01


def test_random_erasing_leaves_the_other_images_as_they_are():
    images = jnp.array(RNG.normal(size=(500, 8, 8, 1)))
    out = np.asarray(jax.jit(erasing.erase)(images, jax.random.key(1), 0.25))
    changed = (out != images).any((1, 2, 3))
    assert 90 < changed.sum() < 160
    assert not np.array_equal(changed[:100], changed[100:200])


COUNT, SIDE = 600, 10
# The value of image i is i, so a mixed image has i + 1 - weight.
NUMBERED = np.broadcast_to(np.arange(COUNT, dtype=np.float32)[:, None, None, None], (COUNT, SIDE, SIDE, 1))
LABELS = np.arange(COUNT, dtype=np.int32) % 7


def _mixed(**fields):
    """The weight of each pixel of the images, and their labels."""
    config = AugmentConfig(**fields)
    mix = jax.jit(lambda x, labels, key: mixing.mix(x, labels, key, config))
    images, labels = mix(jnp.array(NUMBERED), jnp.array(LABELS), jax.random.key(0))
    labels = jax.tree.map(np.asarray, labels)
    np.testing.assert_array_equal(labels.first, LABELS)
    np.testing.assert_array_equal(labels.second, np.roll(LABELS, -1))
    difference = np.roll(NUMBERED, -1, 0) - NUMBERED
    weights = 1 - (np.asarray(images) - NUMBERED) / difference
    np.testing.assert_allclose(labels.weight, weights.mean((1, 2, 3)), atol=1e-4)
    return weights[..., 0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_weights_images_and_labels_by_beta(alpha):
    weights = _mixed(mixup=alpha)
    assert np.ptp(weights, axis=(1, 2)).max() < 1e-4
    assert stats.kstest(weights[:, 0, 0].clip(0, 1), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_takes_a_clipped_rectangle_of_the_other_image():
    """Against `rand_bbox` of the paper's code, in NumPy."""
    weights = _mixed(cutmix=1.0)
    np.testing.assert_allclose(weights * (1 - weights), 0, atol=1e-4)
    got = _rectangles(weights < 0.5)
    expected = []
    for weight, *center in zip(RNG.beta(1, 1, 4000), RNG.integers(0, SIDE, 4000), RNG.integers(0, SIDE, 4000)):
        half = int(SIDE * np.sqrt(1 - weight)) // 2
        sides = [min(c + half, SIDE) - max(c - half, 0) for c in center]
        expected.append((max(center[0] - half, 0), max(center[1] - half, 0), *sides) if half else (0, 0, 0, 0))
    for mine, other in zip(got.T, np.array(expected).T):
        assert stats.ks_2samp(mine, other).pvalue > 0.01


def test_with_both_each_image_gets_one_of_the_two():
    weights = _mixed(mixup=8.0, cutmix=1.0)
    is_mixup = np.ptp(weights, axis=(1, 2)) < 1e-4
    is_mixup &= np.abs(weights[:, 0, 0] - 0.5) < 0.499  # not an empty or full rectangle
    assert 0.42 * COUNT < is_mixup.sum() < 0.58 * COUNT
    others = weights[~is_mixup]
    np.testing.assert_allclose(others * (1 - others), 0, atol=1e-4)


ALL = AugmentConfig(
    crop=1,
    flip="random",
    cutout=2,
    randaugment=2,
    randaugment_magnitude=9.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    erasing=0.5,
    mixup=0.4,
    cutmix=1.0,
)


def _augment(image, label, index, config=ALL):
    batch = Batch({"image": image, "label": label}, index, epoch=jnp.zeros_like(index))
    return augmentation.augment(batch, jax.random.key(3), config, (0.5,) * 3, (0.25,) * 3)


def _on_each_device(function, devices, count):
    """Returns `function`, which each device applies to its part of a batch, and the mesh."""
    config = type("C", (), {"mesh": MeshConfig(), "batch_size": count, "microbatch_size": 0})
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    part = P(sharding.BATCH_AXES)
    return jax.shard_map(function, mesh=mesh, in_specs=part, out_specs=part), mesh


@pytest.mark.slow
@pytest.mark.parametrize("manual", [pytest.param(False, id="GSPMD"), pytest.param(True, id="shard_map")])
def test_everything_is_the_same_on_any_mesh(manual):
    rng = np.random.default_rng(1)
    index = np.arange(8, dtype=np.int32)
    arrays = rng.integers(0, 256, (8, 6, 5, 3), np.uint8), index % 3, index
    options = {"xla_backend_optimization_level": 0}  # compiles faster
    expected = jax.jit(_augment, compiler_options=options)(*arrays)
    mapped, mesh = _on_each_device(_augment, 4, 8)
    placed = jax.device_put(arrays, sharding.batch_sharding(mesh, 0))
    with jax.set_mesh(mesh):
        got = jax.jit(mapped if manual else _augment, compiler_options=options)(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.parametrize(("devices", "count"), [(8, 8), (4, 12), (1, 3), (2, 2)])
def test_the_next_example_is_the_next_of_the_global_batch(devices, count):
    mapped, mesh = _on_each_device(sharding.next_examples, devices, count)
    x = np.arange(2 * count).reshape(count, 2)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(jax.jit(mapped)(x), np.roll(x, -1, 0))
        placed = jax.device_put(x, sharding.batch_sharding(mesh, 0))
        np.testing.assert_array_equal(jax.jit(sharding.next_examples)(placed), np.roll(x, -1, 0))


def test_all_off_is_normalization():
    image = RNG.integers(0, 256, (4, 5, 5, 3), np.uint8)
    out, mixed = _augment(image, np.zeros(4, np.int32), np.arange(4), AugmentConfig())
    np.testing.assert_allclose(out, (image / 255 - 0.5) / 0.25, atol=1e-5)
    assert mixed is None


def test_colors_change_before_normalization_and_rectangles_are_the_mean():
    """Brighter than white is white; what is erased is 0 after normalization."""
    image = np.full((64, 8, 8, 3), 250, np.uint8)
    config = AugmentConfig(brightness=1.0, erasing=1.0)
    out = np.asarray(_augment(image, np.zeros(64, np.int32), np.arange(64), config)[0])
    erased = (out == 0).all(-1)
    assert 0.01 < erased.mean() < 0.4
    values = [one[~cut].max() for one, cut in zip(out, erased)]
    assert np.isclose(max(values), 2)  # 255, normalized
    assert np.isclose(values, 2).sum() > 16


@pytest.mark.parametrize(
    ("fields", "data", "words"),
    [
        ({"randaugment": 2}, {}, "RandAugment needs both, as in 2 and 9"),
        ({"randaugment_magnitude": 9.0}, {}, "RandAugment needs both, as in 2 and 9"),
        ({"randaugment": 2, "randaugment_magnitude": 9.0}, {"channels": 4}, "randaugment=2 needs images of 1 or 3"),
        ({"contrast": 0.4}, {"channels": 2}, "contrast=0.4 needs images of 1 or 3 channels, not 2"),
        ({"saturation": 0.4}, {"channels": 1}, "saturation=0.4 needs images of 3 channels, not 1"),
        ({"mixup": 0.2}, {"num_classes": 1}, "mixup=0.2 mixes classes, but the data set has 1"),
        ({"cutmix": 1.0}, {"num_classes": 1}, "cutmix=1.0 mixes classes, but the data set has 1"),
        ({"cutmix": 1.0}, {"examples_at_once": 1}, "cutmix=1.0 mixes the images of a batch, which has 1"),
        ({"crop": 8}, {}, "crop=8: must be below"),
    ],
)
def test_augmentation_without_an_effect_is_an_error(fields, data, words):
    data = {"channels": 3, "num_classes": 2, "examples_at_once": 2} | data
    with pytest.raises(UserError, match=words):
        augmentation.check(AugmentConfig(**fields), (8, 8, data.pop("channels")), **data)
    augmentation.check(ALL, (8, 8, 3), 2, 2)
