"""The convolution and its gradients equal those of `lax`, in every shape that the networks use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from research.layers import convolution
from research.layers.bias import bias_add
from research.layers.convolution import conv2d, conv_general_dilated

LAYOUTS = ("NHWC", "HWIO", "NHWC")


def _random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _value_and_gradients(function, x, kernel):
    @jax.jit  # one compilation instead of one per operation
    def run(x, kernel):
        y, vjp = jax.vjp(function, x, kernel)
        return y, *vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return run(x, kernel)


def _agree(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = float(jnp.abs(other).max(initial=0)) or 1.0  # initial: outputs may be empty
        np.testing.assert_allclose(np.float32(one) / scale, np.float32(other) / scale, atol=tolerance)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    features=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["SAME", "VALID", ((1, 1), (1, 1)), ((0, 2), (1, 0))]),
)
def test_value_and_gradients_equal_those_of_lax(size, features, window, strides, padding):
    x, kernel = _random(0, 2, *size, features[0]), _random(1, *window, *features)
    ours = _value_and_gradients(lambda x, k: conv2d(x, k, strides=strides, padding=padding), x, kernel)
    theirs = _value_and_gradients(
        lambda x, k: lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=LAYOUTS), x, kernel
    )
    _agree(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "side", "strides", "padding"),
    [
        (3, 32, 32, (1, 1), "VALID"),
        (32, 64, 15, (1, 1), "VALID"),
        (64, 64, 6, (1, 1), "VALID"),
        (24, 32, 31, (1, 1), ((1, 1), (1, 1))),
        (64, 128, 16, (2, 2), ((1, 1), (1, 1))),
        (64, 128, 7, (2, 2), ((1, 1), (1, 1))),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_the_networks_shapes_agree_with_lax(inputs, outputs, side, strides, padding, dtype, tolerance):
    x = _random(0, 2, side, side, inputs).astype(dtype)
    kernel = _random(1, 3, 3, inputs, outputs).astype(dtype)
    ours = _value_and_gradients(lambda x, k: conv2d(x, k, strides=strides, padding=padding), x, kernel)
    theirs = _value_and_gradients(
        lambda x, k: lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=LAYOUTS), x, kernel
    )
    _agree(ours, theirs, tolerance)


@pytest.mark.parametrize("side", [32, 33])
def test_a_large_kernel_of_few_channels_is_not_multiplied_as_patches(side):
    x, kernel = _random(0, 2, side, side, 3), _random(1, 7, 7, 3, 8)
    options = {"strides": (2, 2), "padding": ((3, 3), (3, 3))}
    assert len(_convolutions(lambda x: conv2d(x, kernel, **options), x)) == 1
    assert not _convolutions(lambda x: conv2d(x, kernel[:3, :3], **options), x)
    ours = _value_and_gradients(lambda x, k: conv2d(x, k, **options), x, kernel)
    theirs = _value_and_gradients(
        lambda x, k: lax.conv_general_dilated(x, k, *options.values(), dimension_numbers=LAYOUTS), x, kernel
    )
    _agree(ours, theirs, 1e-5)


@pytest.mark.parametrize(("size", "side"), [((2, 2), 3), ((1, 1), 3), ((4, 4), 5)])
def test_a_kernel_with_more_pixels_than_the_image_is_multiplied_as_patches(size, side):
    """XLA swaps image and kernel of such a convolution, and has no fast code for what results."""
    x, kernel = _random(0, 2, *size, 8), _random(1, side, side, 8, 16)
    options = {"strides": (1, 1), "padding": "SAME"}
    assert not _convolutions(
        lambda x: jax.vjp(lambda x: conv2d(x, kernel, **options), x)[1](_random(2, 2, *size, 16)), x
    )
    ours = _value_and_gradients(lambda x, k: conv2d(x, k, **options), x, kernel)
    theirs = _value_and_gradients(
        lambda x, k: lax.conv_general_dilated(x, k, *options.values(), dimension_numbers=LAYOUTS), x, kernel
    )
    _agree(ours, theirs, 1e-5)


def test_gradients_in_a_loop_are_canonical_convolutions():
    """Every convolution in the body of a scan is NHWC x HWIO, which is fast on the CPU."""
    kernel = _random(1, 3, 3, 4, 8)

    def loss(kernel, x):
        return jnp.square(conv2d(x, kernel, padding="SAME")).sum()

    def body(kernel, x):
        return kernel - jax.grad(loss)(kernel, x), None

    convolutions = _convolutions(lambda k, xs: lax.scan(body, k, xs)[0], kernel, _random(0, 3, 2, 8, 8, 4))
    assert convolutions
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in convolutions)


def test_the_gradient_of_strides_multiplies_no_zeros():
    def loss(x):
        return jnp.square(conv2d(x, _random(1, 3, 3, 8, 8), strides=(2, 2), padding="SAME")).sum()

    _, *backward = _convolutions(jax.grad(loss), _random(0, 2, 8, 8, 8))
    assert len(backward) == 4  # kernels of 1x1, 1x2, 2x1 and 2x2
    assert all("lhs_dilate = [1, 1]" in line for line in backward)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "chunks"), [(1 / 3, 4), (2, 2)])
def test_the_kernels_gradient_is_the_sum_over_chunks(size, chunks, dtype, monkeypatch):
    x, kernel = _random(0, 12, 9, 9, 8).astype(dtype), _random(1, 3, 3, 8, 6).astype(dtype)

    def gradients(x, kernel):
        return _value_and_gradients(lambda x, k: conv2d(x, k, padding="SAME"), x, kernel)[1:]

    whole = gradients(x, kernel)
    monkeypatch.setattr(convolution, "_CHUNK_BYTES", int(x.nbytes * size))
    loops = str(jax.make_jaxpr(gradients)(x, kernel)).count(f"length={chunks}")
    assert loops == 1
    _agree(gradients(x, kernel), whole, 1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("manual", [False, True])
def test_no_chunk_is_gathered_if_the_batch_is_sharded(manual, monkeypatch):
    monkeypatch.setattr(convolution, "_CHUNK_BYTES", 100)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()

    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.square(conv2d(x, k, padding="SAME")).sum())(kernel)

    def on_device(x, kernel):
        return lax.psum(gradient(x, kernel), "data")

    with jax.set_mesh(mesh):
        step = (
            jax.shard_map(on_device, in_specs=(rows, whole), out_specs=whole, check_vma=False) if manual else gradient
        )
        x = jax.device_put(_random(0, 16, 9, 9, 8), jax.NamedSharding(mesh, rows))
        compiled = jax.jit(step).lower(x, _random(1, 3, 3, 8, 6)).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()


def _convolutions(function, *arrays):
    """Returns the lines of the convolutions in the lowered program."""
    text = jax.jit(function).lower(*arrays).as_text()
    return [line for line in text.splitlines() if "stablehlo.convolution" in line]


@pytest.mark.parametrize(
    "options",
    [
        {"rhs_dilation": (2, 2)},
        {"lhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ],
)
def test_other_convolutions_go_to_lax(options):
    x, kernel = _random(0, 2, 8, 8, 4), _random(1, 3, 3, 4 // options.get("feature_group_count", 1), 6)
    if layouts := options.get("dimension_numbers"):
        x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    options = {"dimension_numbers": layouts or LAYOUTS, **options}
    pads = ((1, 1), (1, 1))
    ours = conv_general_dilated(x, kernel, (1, 1), pads, **options)
    np.testing.assert_array_equal(ours, lax.conv_general_dilated(x, kernel, (1, 1), pads, **options))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_dilated_input_needs_padding_in_numbers(padding):
    options = {"padding": padding, "input_dilation": 2, "conv_general_dilated": conv_general_dilated}
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=rf"'{padding}' is not defined with lhs_dilation=\(2, 2\) .*: give .* pairs"):
        conv(_random(0, 2, 8, 8, 4))


def test_a_dilated_input_is_a_transposed_convolution():
    """The error's two remedies, padding in numbers and `nnx.ConvTranspose`, agree for the same kernel."""
    x = _random(0, 2, 8, 8, 4)
    options = {"input_dilation": 2, "padding": ((2, 1), (2, 1)), "conv_general_dilated": conv_general_dilated}
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
    transposed = nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), padding="SAME", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(conv(x), transposed(x), atol=1e-6)


def test_it_serves_nnx_conv():
    plain = nnx.Conv(3, 5, (3, 3), strides=2, rngs=nnx.Rngs(0))
    fast = nnx.Conv(3, 5, (3, 3), strides=2, conv_general_dilated=conv_general_dilated, rngs=nnx.Rngs(0))
    x = _random(0, 2, 9, 9, 3)
    np.testing.assert_allclose(fast(x), plain(x), atol=1e-6)
    assert "custom_vjp" in str(jax.make_jaxpr(fast)(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bias_add(dtype):
    x, bias = _random(0, 2, 3, 5, 7).astype(dtype), _random(1, 7).astype(dtype)
    _agree(
        _value_and_gradients(bias_add, x, bias),
        _value_and_gradients(jnp.add, x, bias),
        1e-5 if dtype == jnp.float32 else 2e-2,
    )


@pytest.mark.parametrize(
    ("size", "window", "padding"),
    [((9, 6), (7, 7), ((3, 3), (3, 3))), ((1, 2), (7, 7), "SAME"), ((5, 8), (3, 2), ((0, 2), (1, 0)))],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), pytest.param("bfloat16", 1e-2, marks=pytest.mark.slow)]
)
def test_depthwise_convolutions_agree_with_lax(size, window, padding, dtype, tolerance):
    x, kernel = _random(0, 2, *size, 5).astype(dtype), _random(1, *window, 1, 5).astype(dtype)
    options = {"dimension_numbers": LAYOUTS, "feature_group_count": 5}
    theirs = _value_and_gradients(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), padding, **options), x, kernel)
    ours = _value_and_gradients(lambda x, k: conv_general_dilated(x, k, (1, 1), padding, **options), x, kernel)
    _agree(ours, theirs, tolerance)


def test_a_depthwise_convolution_on_the_cpu_is_no_convolution_of_xla():
    x, kernel = _random(0, 2, 9, 9, 5), _random(1, 7, 7, 1, 5)
    options = {"dimension_numbers": LAYOUTS, "feature_group_count": 5}

    def run(strides):
        program = jax.jit(lambda x, k: conv_general_dilated(x, k, strides, "SAME", **options)).lower(x, kernel)
        return program.as_text()

    assert "stablehlo.convolution" not in run((1, 1))
    assert "stablehlo.convolution" in run((2, 2))  # not supported: computed by lax


def test_a_depthwise_gradient_of_a_sharded_batch_agrees_with_lax():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x, kernel = _random(0, 4, 5, 5, 3), _random(1, 3, 3, 1, 3)
    options = {"dimension_numbers": LAYOUTS, "feature_group_count": 3}
    theirs = _value_and_gradients(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", **options), x, kernel)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        ours = _value_and_gradients(
            lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", **options), sharded, jax.device_put(kernel)
        )
    _agree(jax.device_get(ours), theirs, 1e-5)
