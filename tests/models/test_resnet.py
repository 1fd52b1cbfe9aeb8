"""The ImageNet ResNets equal the published networks: written in NumPy, and in PyTorch with torchvision's names."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import CNNConfig, ResNetConfig
from research.errors import UserError
from research.models import cnn, resnet
from research.parametrization import Network

SHAPE = (64, 64, 3)


def _create(config: ResNetConfig, image_shape=SHAPE, num_classes=10) -> nnx.Module:
    config = resnet.resolve(config, image_shape)
    return resnet.create(config, image_shape=image_shape, num_classes=num_classes, rngs=nnx.Rngs(0))


def _random(config: ResNetConfig, image_shape=SHAPE) -> nnx.Module:
    """Returns a network in which every value is random, batch statistics and scales too."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _create(config, image_shape)))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if leaf.ndim > 1:
            values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif "scale" in str(path) or "var" in str(path):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _call(graphdef, state, images, key, train):
    model = nnx.merge(graphdef, state, copy=True)
    return model(images, train=train, key=key), nnx.state(model, nnx.BatchStat)


def _apply(model: nnx.Module, images, *, train: bool, key=None):
    """Returns the logits and the batch statistics after the call."""
    graphdef, state = nnx.split(model)
    return _call(graphdef, state, images, key, train)


def _images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("depth", "expected"), [(18, 11_689_512), (34, 21_797_672)])  # torchvision's
def test_parameter_counts(depth, expected):
    model = nnx.eval_shape(lambda: _create(ResNetConfig(depth=depth), (224, 224, 3), 1000))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected


class Reference:
    """The network in NumPy, in float64, with the values of a `resnet.ResNet`."""

    def __init__(self, model: nnx.Module, train: bool):
        self.values = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))
        self.train = train

    def conv(self, x, kernel, stride):
        side = len(kernel)
        x = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))[:, ::stride, ::stride]
        return np.einsum("bhwcij,ijco->bhwo", patches, kernel, optimize=True)

    def norm(self, x, values):
        values = values["layer"]
        if self.train:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) / np.sqrt(var + 1e-5)
            values["mean"] = 0.9 * values["mean"] + 0.1 * mean
            values["var"] = 0.9 * values["var"] + 0.1 * var
        else:
            x = (x - values["mean"]) / np.sqrt(values["var"] + 1e-5)
        return x * values["scale"] + values["bias"]

    def block(self, x, values, stride):
        y = np.maximum(self.norm(self.conv(x, values["conv1"]["kernel"], stride), values["norm1"]), 0)
        y = self.norm(self.conv(y, values["conv2"]["kernel"], 1), values["norm2"])
        if "shortcut" in values:
            x = self.norm(self.conv(x, values["shortcut"]["kernel"], stride), values["shortcut_norm"])
        return np.maximum(x + y, 0)

    def __call__(self, images):
        values = self.values
        x = np.maximum(self.norm(self.conv(np.float64(images), values["stem"]["kernel"], 2), values["norm"]), 0)
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-1, -2))
        first, previous = True, x.shape[-1]
        for _, block in sorted(values["blocks"].items()):
            features = block["conv1"]["kernel"].shape[-1]
            x = self.block(x, block, 1 if first or features == previous else 2)
            first, previous = False, features
        return x.mean((1, 2)) @ values["logits"]["kernel"] + values["logits"]["bias"]


@pytest.mark.parametrize("train", [False, True])
def test_logits_and_batch_statistics_equal_a_reference_in_numpy(train):
    config, shape = ResNetConfig(width=4), (65, 97, 3)
    model, images = _random(config, shape), _images(4, *shape)
    reference = Reference(model, train)
    expected = reference(images)
    logits, statistics = _apply(model, images, train=train)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    updated = nnx.to_pure_dict(statistics)
    assert len(jax.tree.leaves(updated)) == 2 * 20
    jax.tree.map_with_path(
        lambda path, value: np.testing.assert_allclose(
            value, functools.reduce(lambda tree, key: tree[key.key], path, reference.values), rtol=1e-3, atol=1e-4
        ),
        updated,
    )


def _torch_resnet(torch, blocks, classes):
    """Returns torchvision's ResNet of basic blocks, with its names."""
    nn = torch.nn

    def conv(inputs, outputs, size, stride):
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
            self.conv2, self.bn2 = conv(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
            same = stride == 1 and inputs == outputs
            projection = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
            self.downsample = nn.Identity() if same else nn.Sequential(*projection)

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(self.downsample(x) + y)

    layers = {"conv1": conv(3, 64, 7, 2), "bn1": nn.BatchNorm2d(64), "relu": nn.ReLU()}
    layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    inputs = 64
    for group, count in enumerate(blocks):
        outputs, stride = 64 * 2**group, 1 if group == 0 else 2
        rest = [Block(outputs, outputs, 1) for _ in range(count - 1)]
        layers[f"layer{group + 1}"] = nn.Sequential(Block(inputs, outputs, stride), *rest)
        inputs = outputs
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(inputs, classes)}
    return nn.Sequential(collections.OrderedDict(layers))


def _torch_state(model, blocks):
    """Returns the model's values by torchvision's names."""
    values, state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))), {}

    def put(conv, norm, conv_values, norm_values):
        state[f"{conv}.weight"] = conv_values["kernel"].transpose(3, 2, 0, 1)
        layer = norm_values["layer"]
        state[f"{norm}.weight"], state[f"{norm}.bias"] = layer["scale"], layer["bias"]
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = layer["mean"], layer["var"]

    put("conv1", "bn1", values["stem"], values["norm"])
    names = [f"layer{group + 1}.{i}" for group, count in enumerate(blocks) for i in range(count)]
    for i, name in enumerate(names):
        block = values["blocks"][i]
        put(f"{name}.conv1", f"{name}.bn1", block["conv1"], block["norm1"])
        put(f"{name}.conv2", f"{name}.bn2", block["conv2"], block["norm2"])
        if "shortcut" in block:
            put(f"{name}.downsample.0", f"{name}.downsample.1", block["shortcut"], block["shortcut_norm"])
    state["fc.weight"], state["fc.bias"] = values["logits"]["kernel"].T, values["logits"]["bias"]
    return state


def test_logits_equal_those_of_torchvisions_layout_in_pytorch():
    torch = pytest.importorskip("torch")
    blocks = (2, 2, 2, 2)
    model, images = _random(ResNetConfig()), _images(2, 65, 97, 3)
    peer = _torch_resnet(torch, blocks, 10).eval()
    state = collections.OrderedDict((k, torch.tensor(v)) for k, v in _torch_state(model, blocks).items())
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    with torch.no_grad():
        expected = peer(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    logits, _ = _apply(model, images, train=False)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def _initial(config, select):
    """Returns what `select` takes from a new network; the compiled program draws nothing else."""
    return jax.tree.map(np.asarray, jax.jit(lambda: select(_create(config)))())


def test_scales_of_last_normalizations_start_at_zero():
    def scales(model):
        return [(block.norm1.layer.scale[...], block.norm2.layer.scale[...]) for block in model.blocks]

    for first, last in _initial(ResNetConfig(width=4), scales):
        assert np.all(first == 1)
        assert not np.any(last)


def test_a_block_starts_as_its_shortcut():
    x = jnp.asarray(_images(2, 5, 5, 4))
    y = _initial(ResNetConfig(width=4), lambda model: model.blocks[0](x, train=True, key=None))
    np.testing.assert_array_equal(y, nnx.relu(x))


@pytest.mark.parametrize(("mup", "fan_axis"), [(False, 3), (True, 2)])
def test_kernels_have_he_initialization(mup, fan_axis):
    """By fan-out, with mup by fan-in."""

    def kernels(model):
        return [model.stem.kernel[...], model.blocks[-2].conv1.kernel[...]]

    config = ResNetConfig(width=16, parametrization="mup" if mup else "standard", base_width=4)
    for kernel in _initial(config, kernels):
        fan = kernel.shape[0] * kernel.shape[1] * kernel.shape[fan_axis]
        np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / fan), rtol=0.05)
    classifier = _initial(config, lambda model: (model.logits.kernel[...], model.logits.bias[...]))
    assert 0.9 / np.sqrt(128) < np.abs(classifier[0]).max() <= 1 / np.sqrt(128)
    assert not np.any(classifier[1])


def test_networks_for_cifar_keep_their_initial_scales():
    config = cnn.resolve(CNNConfig(name="resnet", width=4), (32, 32, 3))

    def scales():
        model = cnn.create(config, image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0))
        return [block.norm2.layer.scale[...] for block in model.blocks]

    assert all(np.all(scale == 1) for scale in jax.jit(scales)())


@functools.cache
def _trained_logits(**fields):
    model = _random(ResNetConfig(width=4, **fields), (32, 32, 3))
    return _apply(model, _images(2, 32, 32, 3), train=True, key=jax.random.key(0))[0]


@pytest.mark.parametrize(("field", "value"), [("norm", "group"), ("dtype", "bfloat16"), ("dropout", 0.5)])
def test_each_field_changes_the_output(field, value):
    changed = _trained_logits(**{field: value})
    assert changed.dtype == jnp.float32
    assert np.abs(_trained_logits() - changed).max() > 1e-4


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
def test_every_normalization_works(norm):
    config = ResNetConfig(norm=norm, dropout=0.1)
    shape = jax.eval_shape(lambda key: _create(config)(jnp.zeros((4, *SHAPE)), train=True, key=key), jax.random.key(0))
    assert shape.shape == (4, 10)


def test_mup_compares_the_network_with_that_of_the_base_width():
    def create(config, rngs):
        return resnet.create(config, image_shape=SHAPE, num_classes=10, rngs=rngs)

    config = ResNetConfig(width=16, parametrization="mup", base_width=4)
    widths = nnx.to_pure_dict(Network(create, config).widths)
    stem, hidden = widths["stem"]["kernel"], widths["blocks"][3]["conv1"]["kernel"]
    assert (stem.inputs, stem.outputs) == (1, 4)
    assert (hidden.inputs, hidden.outputs) == (4, 4)
    assert (widths["logits"]["kernel"].inputs, widths["logits"]["kernel"].outputs) == (4, 1)


@pytest.mark.parametrize(
    ("depth", "shape", "words"),
    [(20, SHAPE, "depth=20: use 18 or 34"), (18, (31, 64, 3), "32x32 or more, not 31x64")],
)
def test_unsupported_configs_are_an_error(depth, shape, words):
    with pytest.raises(UserError, match=words):
        resnet.resolve(ResNetConfig(depth=depth), shape)


@pytest.mark.parametrize("shape", [(32, 32, 1), (33, 47, 3)])
def test_the_smallest_images_work(shape):
    logits = jax.eval_shape(lambda: _create(ResNetConfig(width=4), shape)(jnp.zeros((2, *shape)), train=False))
    assert logits.shape == (2, 10)
