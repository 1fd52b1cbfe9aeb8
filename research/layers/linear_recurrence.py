"""h_t = a_t h_{t-1} + b_t, elementwise: the recurrence that parallelises over time.

(a, b) then (a', b') is (a' a, a' b + b'), an associative composition, so that all steps take a logarithmic number of
rounds (Blelloch 1990; Martin & Cundy 2018, arXiv 1709.04057). On a CPU, which has no use for that much parallelism, a
plain loop over time makes the same result 5 to 10 times faster, and is what runs there.

Where the mesh in context has an axis `sequence`, each device does its part of the time axis and only the parts' ends
travel. The adjoint of the recurrence is the same recurrence backwards in time, so the gradient costs one more of them
and needs nothing kept but h.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

SEQUENCE = "sequence"
_Function = Callable[..., jax.Array]


@jax.custom_vjp
def linear_recurrence(a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + b_t at every time step.

    Args:
      a: real or complex [T, b, units]; at most 1 in magnitude, or long sequences overflow.
      b: [T, b, units], of a's dtype.
      h: before the first step, [b, units], of a's dtype.

    Returns:
      h after each step, [T, b, units].
    """
    return _run(a, b, h, reverse=False)


def _forward(a: jax.Array, b: jax.Array, h: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    hidden = _run(a, b, h, reverse=False)
    return hidden, (a, h, hidden)


def _backward(residuals: tuple[jax.Array, ...], d_hidden: jax.Array) -> tuple[jax.Array, ...]:
    a, h, hidden = residuals
    zero = jnp.zeros_like(h)
    d_b = _run(_shifted(a, zero, reverse=True), d_hidden, zero, reverse=True)
    return d_b * _shifted(hidden, h, reverse=False), d_b, a[0] * d_b[0]


linear_recurrence.defvjp(_forward, _backward)


def _over_time(one_device: _Function, a_shard: _Function, *arrays: jax.Array) -> jax.Array:
    """What either function makes of arrays [T, b, units], the last one [b, units]: by parts where the mesh has them."""
    shards = jax.sharding.get_abstract_mesh().shape.get(SEQUENCE, 1)
    if shards == 1 or len(arrays[0]) % shards:
        return one_device(*arrays)
    specs = (*[P(SEQUENCE)] * (len(arrays) - 1), P())
    # What check_vma guards is differentiation through shard_map, which the custom gradient never does.
    options = {"axis_names": {SEQUENCE}, "in_specs": specs, "out_specs": P(SEQUENCE), "check_vma": False}
    return jax.shard_map(a_shard, **options)(*arrays)


def _run(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> jax.Array:
    """The recurrence, from the last time step to the first where `reverse`."""
    return _over_time(partial(_on_one_device, reverse=reverse), partial(_on_a_shard, reverse=reverse), a, b, h)


def _shifted(x: jax.Array, outside: jax.Array, *, reverse: bool) -> jax.Array:
    """x of the time step before, of the one after where `reverse`; `outside` is that of none of them."""

    def one_device(x: jax.Array, outside: jax.Array) -> jax.Array:
        return jnp.concatenate([x[1:], outside[None]] if reverse else [outside[None], x[:-1]])

    def a_shard(x: jax.Array, outside: jax.Array) -> jax.Array:
        index, last = lax.axis_index(SEQUENCE), lax.axis_size(SEQUENCE) - 1
        pairs = [(i + 1, i) if reverse else (i, i + 1) for i in range(last)]
        neighbour = lax.ppermute(x[0 if reverse else -1], SEQUENCE, pairs)
        return one_device(x, jnp.where(index == (last if reverse else 0), outside, neighbour))

    return _over_time(one_device, a_shard, x, outside)


def _on_a_shard(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> jax.Array:
    """This device's part of the time axis; `h` is that before the whole of it."""
    end = 0 if reverse else -1
    part = _on_one_device(a, b, jnp.zeros_like(h), reverse=reverse)[end]
    decays, parts = (lax.all_gather(x, SEQUENCE) for x in (a.prod(0), part))
    ends = sequential(decays, parts, h, reverse=reverse)  # after each device's part
    before = jnp.concatenate([ends[1:], h[None]] if reverse else [h[None], ends[:-1]])
    return _on_one_device(a, b, before[lax.axis_index(SEQUENCE)], reverse=reverse)


def _on_one_device(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> jax.Array:
    # Decided when the program is lowered, so compiling for a TPU from a process that only has CPUs is right too.
    return lax.platform_dependent(
        a, b, h, cpu=partial(sequential, reverse=reverse), default=partial(parallel, reverse=reverse)
    )


def sequential(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The recurrence as a loop over time."""

    def body(h: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = ab[0] * h + ab[1]
        return h, h

    return lax.scan(body, h, (a, b), reverse=reverse)[1]


def parallel(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The recurrence as a tree of compositions."""

    def compose(first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return then[0] * first[0], then[0] * first[1] + then[1]

    a, b = lax.associative_scan(compose, (a, b), reverse=reverse)
    return a * h + b
