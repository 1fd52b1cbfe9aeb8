"""Counts the floating-point operations (FLOPs) of the matrix products and convolutions in a traced function.

They are counted in the jaxpr, so every iteration of a `lax.scan` counts, which XLA's cost analysis does not do, and
the count is the same on every mesh and platform. A product of m x k and k x n matrices has 2mkn FLOPs; multiplications
with the zeros of padding and dilation do not count. Other operations are not counted.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

GRADIENT = "gradient"  # the scope of the loss and its gradient in a train step
_RECOMPUTED = "rematted_computation"  # JAX's scope of what `jax.checkpoint` recomputes
# Products that cannot be counted in a jaxpr.
_OPAQUE = ("pallas_call", "ffi_call", "ragged_dot", "scaled_matmul", "dot_product_attention")


class Product(NamedTuple):
    """A matrix product or convolution.

    Attributes:
      flops: of all its executions; NaN if they cannot be counted.
      dtype: of its operands; "" if they cannot be counted.
      scope: the path of `jax.named_scope`s that contain it.
    """

    flops: float
    dtype: str
    scope: str


def model_flops(step: ClosedJaxpr) -> dict[str, float]:
    """Returns the FLOPs of loss and gradient in a traced train step, by dtype of the operands.

    This is the work that the network requires, the numerator of the model FLOPs utilization (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B): without the optimizer's, and without what `jax.checkpoint` recomputes. NaN if some
    products cannot be counted: custom kernels, and loops whose number of iterations is not known in advance.

    Args:
      step: `jax.jit(...).trace(...).jaxpr`; its loop over steps counts as one step.
    """
    totals: dict[str, float] = {}
    for product in products(step, GRADIENT):
        if _RECOMPUTED not in product.scope:
            totals[product.dtype] = totals.get(product.dtype, 0.0) + product.flops
    return totals


def products(traced: ClosedJaxpr, scope: str = "") -> list[Product]:
    """Returns the products within a scope of a traced function; what is computed in vain is left out."""
    return [product for product in _products(_needed(traced.jaxpr), "", 1.0, scope) if scope in product.scope]


def _needed(jaxpr: Jaxpr) -> Jaxpr:
    """Returns the jaxpr without equations that its outputs do not depend on, such as the gradient of the images."""
    return dce_jaxpr(jaxpr, True)[0]


def _products(jaxpr: Jaxpr, outer: str, times: float, scope: str) -> Iterator[Product]:
    for eqn in jaxpr.eqns:
        path, name = f"{outer}/{eqn.source_info.name_stack}", eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot_flops(eqn) if name == "dot_general" else _convolution_flops(eqn)
            operand: Any = eqn.invars[0].aval
            is_complex = jnp.issubdtype(operand.dtype, np.complexfloating)
            yield Product(times * flops * (4 if is_complex else 1), operand.dtype.name, path)
        elif name.startswith(_OPAQUE):
            yield Product(math.nan, "", path)
        elif name == "cond":
            yield from _of_branch(eqn, path, times, scope)
        else:
            for inner in _inner_jaxprs(eqn):
                yield from _products(inner, path, times * _executions(eqn, in_scope=scope in path), scope)


def _executions(eqn: JaxprEqn, *, in_scope: bool) -> float:
    """Returns how often a call, loop or `jax.shard_map` executes its jaxpr; NaN if nobody knows."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "while":
            return math.nan if in_scope else 1
        case "shard_map":  # shapes are those of one device
            params = eqn.params
            axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # in jax 0.9
            return math.prod(params["mesh"].shape[axis] for axis in axes)
        case _:
            return 1


def _of_branch(eqn: JaxprEqn, path: str, times: float, scope: str) -> Iterator[Product]:
    """The products of a platform-independent form (`lax.platform_dependent`), or of the branch with the most FLOPs."""
    branches = [branch.jaxpr for branch in eqn.params["branches"]]
    if eqn.params.get("branches_platforms"):
        return _products(branches[-1], path, times, scope)
    counted = [list(_products(branch, path, times, scope)) for branch in branches]
    return iter(max(counted, key=_total))


def _total(found: list[Product]) -> float:
    """Returns the FLOPs of products: infinite if they cannot be counted, as a NaN is neither more nor less."""
    total = sum(product.flops for product in found)
    return math.inf if math.isnan(total) else total


def _inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    leaves = jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    jaxprs = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in leaves if isinstance(x, Jaxpr | ClosedJaxpr)]
    # JAX removes unneeded equations from all of these but loops.
    return [_needed(x) for x in jaxprs] if eqn.primitive.name == "while" else jaxprs


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution_flops(eqn: Any) -> int:
    image, kernel, out = (var.aval.shape for var in (*eqn.invars, *eqn.outvars))
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    pairs = 1  # of an output pixel and a kernel pixel that meet a pixel of the image
    for i, (axis, kernel_axis, out_axis) in enumerate(zip(*(spec[2:] for spec in numbers))):
        starts = np.arange(out[out_axis])[:, None] * params["window_strides"][i] - params["padding"][i][0]
        places = starts + np.arange(kernel[kernel_axis]) * params["rhs_dilation"][i]
        index, hole = np.divmod(places, params["lhs_dilation"][i])
        pairs *= int(((hole == 0) & (index >= 0) & (index < image[axis])).sum())
    examples, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2 * examples * features * kernel[numbers.rhs_spec[1]] * pairs
