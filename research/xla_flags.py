"""XLA flags that make compiled programs faster, set before jax starts; the one place for them."""

import os
from importlib.metadata import version

# By jaxlib version, since an XLA flag that a jaxlib does not know aborts the process: only where it was measured.
_BY_JAXLIB = {
    # Empty: the YNN convolutions are 2 to 5 times slower than Eigen's on the CPU.
    "0.10.2": ("--xla_cpu_experimental_ynn_fusion_type=",),
}


def set_flags() -> None:
    """Appends to `XLA_FLAGS` what this jaxlib is faster with; a flag that the user has named is left alone."""
    given = os.environ.get("XLA_FLAGS", "")
    named = {flag.partition("=")[0] for flag in given.split()}
    new = [flag for flag in _BY_JAXLIB.get(version("jaxlib"), ()) if flag.partition("=")[0] not in named]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])
