"""Two-dimensional convolution whose gradients are fast inside compiled loops on the CPU.

XLA:CPU uses its fast kernels only for the layout NHWC x HWIO -> NHWC. It rewrites other layouts in the entry
computation, but not in the body of a loop (https://github.com/jax-ml/jax/issues/12868), and the gradients that JAX
derives have other layouts. On the CPU, this module therefore differs in three ways:

- Both gradients are NHWC x HWIO convolutions between explicit transposes.
- The kernel's gradient is a loop over chunks of the batch that fit a cache. The loop also materializes its operands;
  otherwise XLA:CPU fuses an operand's normalization and sums into each transpose of it and recomputes them per element.
- Strided gradients are split by the offset within the stride; JAX's multiply by inserted zeros.

A train step of ResNet-18 at batch 128 takes 1.60 s instead of 1.94 (2 x86 cores with AVX-512, medians of 4 interleaved
runs). XLA:CPU's kernels are slow for few input channels, as images have; there the patches are gathered and multiplied
by a matrix product (3 channels, 3x3, batch 32 on 2 x86 cores: 0.65 ms against 1.6). Patches of larger kernels are too
many bytes: 7x7 with stride 2 on [32, 128, 128, 3] would take 238 ms against 44. XLA:CPU has no fast kernel at all where
the convolution's kernel has more pixels than its input; products of patches take its place (3x3, 512 to 512 channels on
[32, 2, 2, 512], 2 x86 cores with AVX2: 6 against 449). On other platforms everything is JAX's own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research import sharding
from research.layers import depthwise

Pads = tuple[tuple[int, int], tuple[int, int]]
Pair = tuple[int, int]

_LAYOUTS = ("NHWC", "HWIO", "NHWC")
_FEW_CHANNELS = 4
_SMALL_PATCH = 9 * _FEW_CHANNELS  # values: 3x3 pixels
_CHUNK_BYTES = 4 * 2**20  # of the input, in the loop of a kernel's gradient


def conv2d(
    x: jax.Array, kernel: jax.Array, *, strides: Sequence[int] = (1, 1), padding: str | Sequence[tuple[int, int]]
) -> jax.Array:
    """Computes a two-dimensional convolution, equal to `lax.conv_general_dilated`.

    Args:
      x: float [b, h, w, in].
      kernel: [kh, kw, in, out], of x's dtype.
      strides: of the window, vertical and horizontal.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)); a negative number crops the input.

    Returns:
      [b, h', w', out], of x's dtype.
    """
    return _crop_and_convolve(_conv2d, x, kernel, (strides[0], strides[1]), _pads(x, kernel, strides, padding))


def _pads(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]) -> Pads:
    """Returns the padding as numbers."""
    pads = (
        lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding) if isinstance(padding, str) else padding
    )
    top_bottom, left_right = ((int(low), int(high)) for low, high in pads)
    return top_bottom, left_right


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    **others: Any,
) -> jax.Array:
    """Replaces `lax.conv_general_dilated`, using `conv2d` or `depthwise_conv2d` if it can; made for `nnx.Conv`.

    Args:
      others: further arguments of `lax.conv_general_dilated`. If any is set, or with dilation, the call goes to `lax`.

    Raises:
      ValueError: the input is dilated and `padding` is a string, which `lax.conv_general_dilated` does not define.
    """
    if isinstance(padding, str) and any(d != 1 for d in lhs_dilation or ()):
        raise ValueError(
            f"padding={padding!r} is not defined with lhs_dilation={tuple(lhs_dilation or ())} (the input_dilation of "
            "nnx.Conv): give (low, high) pairs, or use nnx.ConvTranspose or lax.conv_transpose"
        )
    used = {name: value for name, value in others.items() if value is not None and value != 1}
    dilated = any(d != 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if not dilated and lhs.ndim == 4 and lhs.dtype == rhs.dtype:
        canonical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUTS)
        if lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == canonical:
            if not used:
                return conv2d(lhs, rhs, strides=window_strides, padding=padding)
            if used == {"feature_group_count": lhs.shape[-1]} and all(stride == 1 for stride in window_strides):
                pads = _pads(lhs, rhs, window_strides, padding)
                if depthwise.is_supported(lhs, rhs, pads):
                    return depthwise.depthwise_conv2d(lhs, rhs, pads)
    return lax.conv_general_dilated(
        lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, **others
    )


def _lax_conv(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Sequence[Pair], **dilation: Any) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUTS, **dilation)


def _crop_and_convolve(
    convolve: Callable[..., Any],
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    pads: Pads,
    kernel_dilation: Pair = (1, 1),
) -> jax.Array:
    """Calls `convolve` with negative padding replaced by a slice; returns zeros itself where arrays are empty."""
    # XLA:CPU reads outside of the input if the low padding is negative and the high one positive
    # (https://github.com/openxla/xla/issues/48713). A negative `lax.pad` before the convolution would be folded back
    # into its padding (https://github.com/openxla/xla/issues/48715); a slice is not.
    spans, positive, output = [slice(None)], [], []
    for size, (low, high), side, stride, dilation in zip(x.shape[1:3], pads, kernel.shape, strides, kernel_dilation):
        spans.append(slice(max(-low, 0), max(size + min(high, 0), 0)))
        positive.append((max(low, 0), max(high, 0)))
        output.append(max(0, (size + low + high - (side - 1) * dilation - 1) // stride + 1))
    cropped = x[tuple(spans)]
    # All windows lie in the padding, or there is no window.
    if not (cropped.size and kernel.size and math.prod(output)):
        return lax.full_like(x, 0, shape=(len(x), *output, kernel.shape[-1]))
    return convolve(cropped, kernel, strides, (positive[0], positive[1]))


def _product(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Computes the convolution as one matrix product of the patches [b, h', w', kh * kw * in] and the kernel."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    ends = [size - side + 1 for size, side in zip(x.shape[1:3], kernel.shape)]
    (down, right), (height, width) = strides, kernel.shape[:2]
    shifted = [x[:, i : i + ends[0] : down, j : j + ends[1] : right] for i in range(height) for j in range(width)]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    plain = partial(_lax_conv, strides=strides, pads=pads)
    few_channels = x.shape[-1] <= _FEW_CHANNELS and math.prod(kernel.shape[:3]) <= _SMALL_PATCH
    if not few_channels and not _exceeds(kernel, x):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=partial(_product, strides=strides, pads=pads), default=plain)


def _exceeds(kernel: jax.Array, x: jax.Array) -> bool:
    """Returns whether the kernel has more pixels than the image; False if GSPMD shards, which would move patches."""
    return sharding.is_unsharded() and math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3])


def _forward(
    x: jax.Array, kernel: jax.Array, strides: Pair, pads: Pads
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv2d(x, kernel, strides, pads), (x, kernel)


def _backward(
    strides: Pair, pads: Pads, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def canonical(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _input_gradient(x, kernel, dy, strides, pads), _kernel_gradient(x, kernel, dy, strides, pads)

    def by_jax(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(lambda x, kernel: _lax_conv(x, kernel, strides, pads), x, kernel)[1](dy)

    # Decided when the program is lowered, so this is also right when a process with CPUs only compiles for a TPU.
    return lax.platform_dependent(*residuals, dy, cpu=canonical, default=by_jax)


_conv2d.defvjp(_forward, _backward)


def _input_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Computes dx: for each offset within a stride, dy convolved with the mirrored kernel elements that reach it."""

    def at_offsets(offsets: Pair) -> jax.Array:
        taps, backward_pads = [], []
        for axis, (offset, stride) in enumerate(zip(offsets, strides)):
            shift, first = divmod(offset + pads[axis][0], stride)
            taps.append(slice(first, None, stride))
            low = len(range(kernel.shape[axis])[taps[axis]]) - 1 - shift
            backward_pads.append((low, sizes[axis] + shift - dy.shape[axis + 1]))
        mirrored = kernel[tuple(taps)][::-1, ::-1].transpose(0, 1, 3, 2)
        convolve = _product if _exceeds(mirrored, dy) else _lax_conv
        return _crop_and_convolve(convolve, dy, mirrored, (1, 1), (backward_pads[0], backward_pads[1]))

    sizes = [-(-size // stride) for size, stride in zip(x.shape[1:3], strides)]
    down, right = (range(stride) for stride in strides)
    dx = jnp.stack([jnp.stack([at_offsets((i, j)) for j in right], 3) for i in down], 2)  # [b, h/s, s, w/s, s, in]
    return dx.reshape(len(x), sizes[0] * strides[0], -1, x.shape[-1])[:, : x.shape[1], : x.shape[2]]


def _kernel_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Pair, pads: Pads) -> jax.Array:
    """Computes the kernel's gradient: a convolution with x's channels as batch, its batch as channels, dy as kernel.

    It is summed over chunks of the batch, in float32.
    """
    backward_pads = []
    for axis in (0, 1):
        size, reach = kernel.shape[axis], (dy.shape[axis + 1] - 1) * strides[axis] + 1
        low = pads[axis][0]
        backward_pads.append((low, size - 1 + reach - x.shape[axis + 1] - low))
    pads_of_x, convolve = (backward_pads[0], backward_pads[1]), partial(_lax_conv, rhs_dilation=strides)

    def add(gradient: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, dy = pair[0].transpose(3, 1, 2, 0), pair[1].transpose(1, 2, 0, 3)
        return gradient + _crop_and_convolve(convolve, x, dy, (1, 1), pads_of_x, strides), None

    # A single chunk if GSPMD shards the batch: it would gather each chunk.
    chunks = _num_chunks(x, kernel) if sharding.is_unsharded() else 1
    pairs = x.reshape(chunks, -1, *x.shape[1:]), dy.reshape(chunks, -1, *dy.shape[1:])
    # Within `jax.shard_map` the initial sum must vary over the devices as dy does, hence `full_like`.
    zeros = lax.full_like(dy, 0, jnp.float32, shape=[kernel.shape[i] for i in (2, 0, 1, 3)])
    gradient, _ = lax.scan(add, zeros, pairs)
    return gradient.transpose(1, 2, 0, 3).astype(x.dtype)


def _num_chunks(x: jax.Array, kernel: jax.Array) -> int:
    """Returns how many chunks of the batch the kernel's gradient is summed over."""
    chunks = 1 << ((x.nbytes - 1) // _CHUNK_BYTES).bit_length()
    # A loop materializes its operands. That is worth a second chunk if the sum of two gradients is cheap: a step of the
    # tutorial CNN at batch 32 takes 3.70 ms instead of 3.97 (medians of 5 interleaved runs).
    if x.nbytes > max(_CHUNK_BYTES // 8, 8 * kernel.nbytes):
        chunks = max(chunks, 2)
    return math.gcd(len(x), chunks)
