"""The networks for images equal torchvision's, and every parameter has its name there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_networks
from flax import nnx

from research.config import ImageNetworkConfig
from research.errors import UserError
from research.models import image_networks
from research.models.torch_layout import from_torch, to_torch
from research.parametrization import Network

SHAPE = (65, 97, 3)


def _create(config: ImageNetworkConfig, shape=SHAPE, num_classes=10) -> nnx.Module:
    return image_networks.create(config, image_shape=shape, num_classes=num_classes, rngs=nnx.Rngs(0))


def _config(name, **fields):
    return image_networks.resolve(ImageNetworkConfig(name=name, **fields), SHAPE)


def _random(config, shape=SHAPE):
    """Returns a network in which every value is random, batch statistics and scales too."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _create(config, shape)))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1:
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif "scale" in name or "var" in name:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


def _flat(model):
    """Returns the arrays of a network by path."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _call(graphdef, state, images, key, train):
    return nnx.merge(graphdef, state, copy=True)(images, train=train, key=key)


def _apply(model, images, *, train, key=None):
    return np.asarray(_call(*nnx.split(model), images, key, train))


def _images(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


COUNTS = {  # torchvision's
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
}


def _slow_if_large(name):
    return pytest.param(name, marks=[pytest.mark.slow] if COUNTS[name] > 40e6 else [])


@pytest.mark.parametrize("name", [_slow_if_large(name) for name in COUNTS])
def test_parameter_counts_and_names(name):
    config = _config(name)
    model = nnx.eval_shape(lambda: _create(config, (224, 224, 3), 1000))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == COUNTS[name]
    names = image_networks.torch_names(config)
    assert names.keys() == _flat(model).keys()
    for place in (0, -1):  # in torchvision, and in timm
        assert len({peers[place] for peers in names.values()}) == len(names)


def _torch_state(model, config):
    """Returns the network's arrays by their names in torchvision."""
    names = image_networks.torch_names(config)
    return {names[path][0]: to_torch(np.asarray(value)) for path, value in _flat(model).items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", pytest.param("convnext_tiny", marks=pytest.mark.slow)])
def test_logits_equal_those_of_the_published_network(name):
    """Written in NumPy, in float64, with torchvision's names and layouts."""
    config = _config(name, width=8)
    model, images = _random(config), _images(2, *SHAPE)
    state = {key: value.astype(np.float64) for key, value in _torch_state(model, config).items()}
    expected = torch_networks.NETWORKS[name](state, images.transpose(0, 3, 1, 2).astype(np.float64))
    logits = _apply(model, images, train=False)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_tiny"])
def test_logits_equal_those_of_torchvision(name):
    torch, torchvision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    config = _config(name)
    model, images = _random(config), _images(2, *SHAPE)
    peer = getattr(torchvision.models, name)(num_classes=10).eval()
    shapes = {key: tuple(value.shape) for key, value in peer.state_dict().items()}
    names, flat = image_networks.torch_names(config), _flat(model)
    state = {names[path][0]: to_torch(np.array(value), shapes[names[path][0]]) for path, value in flat.items()}
    missing, unexpected = peer.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        expected = peer(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    logits = _apply(model, images, train=False)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("ours", "theirs"), [((7, 7, 1, 5), (5, 1, 7, 7)), ((3, 4), (4, 3)), ((6,), (6, 1, 1)), ((3, 4), (4, 3, 1, 1))]
)
def test_layouts_convert_both_ways(ours, theirs):
    array = _images(*ours)
    converted = to_torch(array, theirs)
    assert converted.shape == theirs
    np.testing.assert_array_equal(from_torch(converted, ours), array)
    if len(ours) == 4:
        assert converted[1, 0, 2, 3] == array[2, 3, 0, 1]
    with pytest.raises(ValueError, match="does not fit"):
        from_torch(converted, (*ours[:-1], ours[-1] + 1))
    with pytest.raises(ValueError, match="does not fit"):
        to_torch(array, (*theirs, 2))


def _initial(name, select):
    """Returns what `select` takes from a new network; the compiled program draws nothing else."""
    return jax.tree.map(np.asarray, jax.jit(lambda: select(_create(_config(name, width=16))))())


def test_convnext_has_the_published_initial_values():
    block = _initial("convnext_tiny", lambda model: nnx.to_pure_dict(nnx.state(model.blocks[-1])))
    for layer in ("conv", "expand", "contract"):
        assert block[layer]["kernel"].std() == pytest.approx(0.02, rel=0.05)
        assert not block[layer]["bias"].any()
    assert set(block["layer_scale"].tolist()) == {float(np.float32(1e-6))}


def test_a_bottleneck_starts_as_its_shortcut():
    x = jnp.asarray(_images(2, 5, 5, 64))
    y = _initial("resnet50", lambda model: model.blocks[1](x, train=True, key=None))
    np.testing.assert_array_equal(y, nnx.relu(x))


@pytest.fixture(scope="module")
def block_output():
    """`block_output(**fields)` is that of a ConvNeXt's last block in training."""
    x = jnp.asarray(_images(4, 2, 2, 32))

    @functools.cache
    def output(**fields):
        model = _random(_config("convnext_tiny", width=4, **fields))
        call = jax.jit(lambda x, key: model.blocks[-1](x.astype(model.logits.dtype), train=True, key=key))
        return np.asarray(call(x, jax.random.key(0)), np.float32)

    return output


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), [("norm", "group"), ("dtype", "bfloat16"), ("drop_path", 0.9)])
def test_each_field_changes_convnexts_blocks(field, value, block_output):
    assert np.abs(block_output() - block_output(**{field: value})).max() > 1e-4


@pytest.mark.parametrize(
    ("name", "norm"),
    [("resnet18", "none"), ("resnet18", "layer"), pytest.param("convnext_tiny", "batch", marks=pytest.mark.slow)],
)
def test_other_normalizations_work_and_are_named(name, norm):
    config = _config(name, norm=norm, dropout=0.1, drop_path=0.1)
    key = jax.random.key(0)
    shape = jax.eval_shape(lambda key: _create(config)(jnp.zeros((4, *SHAPE)), train=True, key=key), key)
    assert shape.shape == (4, 10)
    assert image_networks.torch_names(config).keys() == _flat(nnx.eval_shape(lambda: _create(config))).keys()


@pytest.mark.parametrize("name", [pytest.param("resnet50", marks=pytest.mark.slow), "convnext_tiny"])
def test_mup_compares_the_network_with_that_of_the_base_width(name):
    config = _config(name, width=16, parametrization="mup", base_width=4)
    widths = nnx.to_pure_dict(Network(lambda config, rngs: _create(config), config).widths)
    stem, logits = widths["stem"]["kernel"], widths["logits"]["kernel"]
    hidden = widths["blocks"][3]["conv1" if name == "resnet50" else "expand"]["kernel"]
    assert (stem.inputs, stem.outputs) == (1, 4)
    assert (hidden.inputs, hidden.outputs) == (4, 4)
    assert (logits.inputs, logits.outputs) == (4, 1)
    if name == "convnext_tiny":  # a depthwise kernel has as many inputs at every width
        depthwise = widths["blocks"][3]["conv"]["kernel"]
        assert (depthwise.inputs, depthwise.outputs, depthwise.rate_scale("adam")) == (1, 4, 1)


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_images_below_the_minimum_are_an_error(name):
    with pytest.raises(UserError, match=f"name={name} needs images of 32x32 or more, not 31x64"):
        image_networks.resolve(ImageNetworkConfig(name=name), (31, 64, 3))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("convnext_tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(32, 32, 1), (33, 47, 3)])
def test_the_smallest_images_work(name, shape):
    config = _config(name, width=4)
    logits = jax.eval_shape(lambda: _create(config, shape)(jnp.zeros((2, *shape)), train=False))
    assert logits.shape == (2, 10)
