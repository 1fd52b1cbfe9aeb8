"""Pins the JAX settings that change results, so that a run computes the same numbers in every environment.

With 64-bit numbers, arrays and checkpoints would have different dtypes. Random number generators other than
partitionable threefry2x32 draw different numbers on a different mesh. `jax_default_matmul_precision`, which trades
precision for speed, is the user's choice, and summary.json records it.
"""

import sys
from typing import Any

import jax

from research import randomness

PINNED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": randomness.IMPLEMENTATION,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    # These do not change results, but other values are errors in programs that rely on JAX's defaults.
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
_RECORDED = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_default_matmul_precision")


def pin() -> None:
    """Pins the settings for this process; process 0 warns about each that had another value."""
    for name, value in PINNED.items():
        given = getattr(jax.config, name)
        if given != value:
            jax.config.update(name, value)
            if jax.process_index() == 0:
                print(f"WARNING: {name.upper()}={given} is ignored: this program uses {value}", file=sys.stderr)


def settings() -> dict[str, Any]:
    """Returns the settings that change results, as they appear in summary.json."""
    return {name: getattr(jax.config, name) for name in _RECORDED}
