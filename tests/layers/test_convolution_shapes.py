"""The convolution and both gradients in unusual shapes, against NumPy in float64 and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from research.layers.convolution import conv2d

LAYOUTS = ("NHWC", "HWIO", "NHWC")


def _draw(seed):
    """Draws (x's shape, kernel's shape, strides, padding, dtype) with at least one window."""
    rng = np.random.default_rng(seed)
    inputs, outputs = int(rng.choice([1, 3, 4, 5, 8, 20])), int(rng.choice([1, 3, 8, 17]))
    strides, dtype = tuple(rng.integers(1, 6, 2).tolist()), "bfloat16" if seed % 3 == 0 else "float32"
    while True:
        size, window = rng.integers(1, 13, 2), rng.integers(1, 7, 2)
        pads = rng.integers(-6, 7, (2, 2)) * (rng.random((2, 1)) < 0.8)
        padding = ("SAME", "VALID")[seed % 8 // 4] if seed % 4 == 0 else tuple(map(tuple, pads.tolist()))
        if padding == "SAME" or (size + (0 if padding == "VALID" else pads.sum(1)) >= window).all():
            return (2, *size.tolist(), inputs), (*window.tolist(), inputs, outputs), strides, padding, dtype


REPORTED = [
    ((2, 16, 16, 8), (5, 5, 8, 8), (4, 4), ((2, 2), (2, 2)), "float32"),
    ((2, 15, 15, 8), (4, 4, 8, 8), (4, 4), ((2, 2), (2, 2)), "float32"),
    ((2, 10, 13, 8), (5, 2, 8, 8), (2, 1), ((5, 1), (2, 2)), "float32"),
    ((1, 15, 6, 8), (1, 1, 8, 8), (1, 1), ((0, 0), (-5, 1)), "float32"),  # openxla/xla#48713
    ((1, 6, 6, 8), (2, 2, 8, 8), (1, 1), ((-7, 4), (-2, -3)), "float32"),  # all of the input is cropped
    ((1, 2, 2, 8), (1, 1, 8, 8), (6, 6), ((5, 0), (5, 0)), "float32"),  # the only window is in the padding
    ((2, 3, 9, 3), (6, 2, 3, 4), (1, 1), "VALID", "float32"),  # no window fits
]
CASES = REPORTED + [_draw(seed) for seed in range(20)]


def _arrays(x, kernel, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in (x, kernel)]


def _pads(x, kernel, strides, padding):
    return lax.padtype_to_pads(x[1:3], kernel[:2], strides, padding) if isinstance(padding, str) else padding


def _cotangent(shape, dtype):
    return jnp.asarray(np.cos(np.arange(np.prod(shape))).reshape(shape), dtype)


def _overlap(size, low, high):
    """Returns two slices of equal length: of the padded input and of the input, where they overlap."""
    start, stop = max(0, -low), min(size, size + high)
    return (slice(start, stop), slice(start + low, stop + low)) if start < stop else (slice(0), slice(0))


def _reference(x, kernel, strides, pads, dtype):
    """Computes y, dx and dkernel in float64, one kernel element at a time."""
    x, kernel = np.float64(x), np.float64(kernel)
    inner, outer = zip(*(_overlap(size, *pair) for size, pair in zip(x.shape[1:3], pads)))
    padded = np.zeros((len(x), *(size + sum(pair) for size, pair in zip(x.shape[1:3], pads)), x.shape[-1]))
    padded[:, *outer] = x[:, *inner]
    counts = [max(0, (n - side) // stride + 1) for n, side, stride in zip(padded.shape[1:3], kernel.shape, strides)]
    y = np.zeros((len(x), *counts, kernel.shape[-1]))
    dy, d_padded, d_kernel, d_x = np.float64(_cotangent(y.shape, dtype)), 0 * padded, 0 * kernel, 0 * x
    for tap in np.ndindex(kernel.shape[:2]) if y.size else ():
        place = [slice(i, i + (n - 1) * stride + 1, stride) for i, n, stride in zip(tap, counts, strides)]
        y += padded[:, *place] @ kernel[tap]
        d_padded[:, *place] += dy @ kernel[tap].T
        d_kernel[tap] = np.einsum("bhwi,bhwo->io", padded[:, *place], dy)
    d_x[:, *inner] = d_padded[:, *outer]
    return y, d_x, d_kernel


def _value_and_gradients(function, x, kernel):
    @jax.jit
    def run(x, kernel):
        y, vjp = jax.vjp(function, x, kernel)
        return y, *vjp(_cotangent(y.shape, y.dtype))

    return run(x, kernel)


def _agree(ours, theirs, dtype):
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    for name, one, other in zip(("y", "dx", "dkernel"), ours, theirs, strict=True):
        assert one.shape == other.shape
        scale = np.abs(other).max(initial=1)
        np.testing.assert_allclose(np.float64(one) / scale, np.float64(other) / scale, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_equal_those_of_numpy(case):
    *shapes, strides, padding, dtype = case
    x, kernel = _arrays(*shapes, dtype)
    ours = _value_and_gradients(lambda x, k: conv2d(x, k, strides=strides, padding=padding), x, kernel)
    assert {array.dtype for array in ours} == {x.dtype}
    _agree(ours, _reference(x, kernel, strides, _pads(*shapes, strides, padding), dtype), dtype)


@pytest.mark.parametrize("case", [case for case in CASES if "SAME" in case or "VALID" in case], ids=str)
def test_without_negative_padding_lax_agrees_with_numpy(case):
    """With negative padding, XLA:CPU has the bug openxla/xla#48713, so lax is no reference."""
    *shapes, strides, padding, dtype = case
    x, kernel = _arrays(*shapes, dtype)
    lax_conv = _value_and_gradients(
        lambda x, k: lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=LAYOUTS), x, kernel
    )
    _agree(lax_conv, _reference(x, kernel, strides, _pads(*shapes, strides, padding), dtype), dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorch_agrees_with_numpy(case):
    torch = pytest.importorskip("torch")
    *shapes, strides, padding, dtype = case
    arrays = _arrays(*shapes, dtype)
    pads = _pads(*shapes, strides, padding)
    expected = _reference(*arrays, strides, pads, dtype)
    if not expected[0].size:
        pytest.skip("PyTorch refuses a window larger than the padded input")
    x, kernel = (torch.tensor(np.float64(array), requires_grad=True) for array in arrays)
    # PyTorch's `pad` cannot crop a whole axis from one side, so rows are padded and then sliced.
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), [max(p, 0) for pair in pads[::-1] for p in pair])
    (top, bottom), (left, right) = ((max(-low, 0), max(-high, 0)) for low, high in pads)
    cropped = padded[:, :, top : padded.shape[2] - bottom, left : padded.shape[3] - right]
    y = torch.nn.functional.conv2d(cropped, kernel.permute(3, 2, 0, 1).contiguous(), stride=strides).permute(0, 2, 3, 1)
    y.backward(torch.tensor(np.float64(_cotangent(expected[0].shape, dtype))))
    ours = [tensor.detach().numpy() for tensor in (y, x.grad, kernel.grad)]
    _agree(ours, expected, "float32")
