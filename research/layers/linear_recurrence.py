"""The linear recurrence h_t = a_t h_{t-1} + b_t, elementwise, parallel over time by an associative scan.

The composition of two steps, (a, b) then (a', b'), is (a' a, a' b + b'). It is associative, so all steps take a
logarithmic number of rounds (Blelloch 1990; Martin & Cundy 2018, arXiv 1709.04057). Long sequences are divided into
chunks, whose steps are looped over. A CPU cannot use that much parallelism: there a plain loop over time is 5 to 10
times as fast, and is used instead.

If the mesh in context has an axis `sequence`, each device computes its shard of the time axis, and only the states at
the ends of the shards are communicated. The adjoint is the same recurrence backwards in time, so the gradient costs one
more recurrence, and of the intermediate results only h is kept.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jax.sharding import PartitionSpec as P

from research.sharding import SEQUENCE, is_unsharded, time_shards

# libtpu's time to compile an associative scan grows with the size of its arrays: 6 s for 65,536 elements, and minutes
# for a long sequence. Chunks also move less memory.
_MAX_SCANNED, _MIN_CHUNKS = 2**17, 16
_Function = Callable[..., jax.Array]


@jax.custom_vjp
def linear_recurrence(a: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
    """Computes h_t = a_t h_{t-1} + b_t for every time step.

    Args:
      a: real or complex [T, b, units], or [units] if it is the same at every step; at most 1 in magnitude, or long
        sequences overflow.
      b: [T, b, units], of a's dtype.
      h: the initial state, [b, units], of a's dtype.

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
    if a.ndim == 1:
        d_b = _run(a, d_hidden, zero, reverse=True)
        d_a = (d_b * _shifted(hidden, h, reverse=False)).sum((0, 1))
        return d_a, d_b, a * d_b[0]
    d_b = _run(_shifted(a, zero, reverse=True), d_hidden, zero, reverse=True)
    return d_b * _shifted(hidden, h, reverse=False), d_b, a[0] * d_b[0]


linear_recurrence.defvjp(_forward, _backward)


def _over_time(one_device: _Function, per_shard: _Function, *arrays: jax.Array) -> jax.Array:
    """Calls `per_shard` in a `jax.shard_map` over time if the mesh and T allow, else `one_device`.

    The arrays are [T, b, units], except for the last, which is [b, units]; `per_shard` gets the shard's number first.
    """
    shards = time_shards(len(arrays[0]))
    if shards == 1:
        return one_device(*arrays)

    # A sharded array, since libtpu cannot compile `axis_index` if GSPMD shards other axes.
    def on_shard(numbers: jax.Array, *arrays: jax.Array) -> jax.Array:
        return per_shard(numbers[0], *arrays)

    specs = (*[P(SEQUENCE)] * len(arrays), P())
    # check_vma is needed to differentiate through shard_map only, and the custom gradient does not.
    options = {"axis_names": {SEQUENCE}, "in_specs": specs, "out_specs": P(SEQUENCE), "check_vma": False}
    return jax.shard_map(on_shard, **options)(jnp.arange(shards), *arrays)


def _run(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> jax.Array:
    """Computes the recurrence; with `reverse`, from the last time step to the first."""
    if a.ndim == 1:
        if not is_unsharded():
            # GSPMD would shard it as the parameters that it depends on, and gather it in every iteration of a loop.
            a = lax.with_sharding_constraint(a, P())

        def per_shard(index: jax.Array, b: jax.Array, h: jax.Array) -> jax.Array:
            return _on_a_shard(index, a, b, h, reverse=reverse)

        return _over_time(partial(_on_one_device, a, reverse=reverse), per_shard, b, h)
    return _over_time(partial(_on_one_device, reverse=reverse), partial(_on_a_shard, reverse=reverse), a, b, h)


def _shifted(x: jax.Array, outside: jax.Array, *, reverse: bool) -> jax.Array:
    """Shifts x by one time step, so that step t has x of t - 1 (`reverse`: of t + 1); `outside` fills the end."""
    one_device = partial(_shifted_on_one_device, reverse=reverse)

    def per_shard(index: jax.Array, x: jax.Array, outside: jax.Array) -> jax.Array:
        last = lax.axis_size(SEQUENCE) - 1
        pairs = [(i + 1, i) if reverse else (i, i + 1) for i in range(last)]
        neighbor = lax.ppermute(x[0 if reverse else -1], SEQUENCE, pairs)
        return one_device(x, jnp.where(index == (last if reverse else 0), outside, neighbor))

    return _over_time(one_device, per_shard, x, outside)


def _shifted_on_one_device(x: jax.Array, outside: jax.Array, *, reverse: bool) -> jax.Array:
    """Shifts as `_shifted` does, without a mesh: x is all of the sequence."""
    return jnp.concatenate([x[1:], outside[None]] if reverse else [outside[None], x[:-1]])


def _on_a_shard(index: jax.Array, a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> jax.Array:
    """Computes shard `index` of the time axis; `h` is the initial state of the whole sequence."""
    # Each device composes its steps to one; the recurrence over these gives the state at the end of every shard.
    end = 0 if reverse else -1
    shard_b = _on_one_device(a, b, jnp.zeros_like(h), reverse=reverse)[end]
    shard_a = jnp.broadcast_to(a ** len(b), h.shape) if a.ndim == 1 else a.prod(0)
    all_a, all_b = (lax.all_gather(x, SEQUENCE) for x in (shard_a, shard_b))
    ends = sequential(all_a, all_b, h, reverse=reverse)
    before = _shifted_on_one_device(ends, h, reverse=reverse)
    return _on_one_device(a, b, before[index], reverse=reverse)


def _on_one_device(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> jax.Array:
    # Decided when the program is lowered, so this is also right when a process with CPUs only compiles for a TPU.
    return lax.platform_dependent(
        a, b, h, cpu=partial(sequential, reverse=reverse), default=partial(parallel, reverse=reverse)
    )


def sequential(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Computes the recurrence as a loop over time."""
    return _loop(a, b, h, reverse=reverse)[1]


def _loop(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """Returns h after the last step, and after every step."""

    def body(h: jax.Array, ab: tuple[jax.Array | None, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = (a if ab[0] is None else ab[0]) * h + ab[1]
        return h, h

    return lax.scan(body, h, (None if a.ndim == 1 else a, b), reverse=reverse)


def parallel(a: jax.Array, b: jax.Array, h: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Computes the recurrence as an associative scan, over chunks of a long sequence."""
    most = max(_MIN_CHUNKS, _MAX_SCANNED // (h.shape[-1] if is_symbolic_dim(h.shape[0]) else h.size))
    if len(b) > most:
        return _in_chunks(a, b, h, most, reverse=reverse)

    def compose(first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return then[0] * first[0], then[0] * first[1] + then[1]

    a, b = lax.associative_scan(compose, (jnp.broadcast_to(a, b.shape), b), reverse=reverse)
    return a * h + b


def _in_chunks(a: jax.Array, b: jax.Array, h: jax.Array, most: int, *, reverse: bool) -> jax.Array:
    """Computes the recurrence in at most `most` chunks of a long sequence.

    A loop over the steps of all chunks at once composes each chunk to one step, a scan over the chunks gives the state
    before each, and a second loop computes all steps.
    """
    steps = -(-len(b) // most)
    chunks = -(-len(b) // steps)
    padding = steps * chunks - len(b)

    def chunked(x: jax.Array) -> jax.Array:
        # The padding comes after all other steps, so its values do not matter.
        widths = [(padding, 0) if reverse else (0, padding), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x, widths).reshape(chunks, steps, *x.shape[1:]).swapaxes(0, 1)

    a, b = a if a.ndim == 1 else chunked(a), chunked(b)
    chunk_b = _loop(a, b, jnp.zeros_like(b[0]), reverse=reverse)[0]
    chunk_a = a**steps if a.ndim == 1 else a.prod(0)
    ends = parallel(chunk_a, chunk_b, h, reverse=reverse)
    hidden = sequential(a, b, _shifted_on_one_device(ends, h, reverse=reverse), reverse=reverse)
    hidden = hidden.swapaxes(0, 1).reshape(-1, *h.shape)
    return hidden[padding:] if reverse else hidden[: len(hidden) - padding]
