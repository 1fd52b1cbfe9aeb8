"""XLA flags that make compiled programs faster, set before jax starts; the one place for them.

None is set for overlapping collectives with arithmetic, which is the compilers' default by now: the programs for eight
H100 (ResNet-18, data parallel; jaxlib 0.10.2) and eight v5e chips (char_rnn, fsdp; libtpu 0.0.42.1) are the same to the
byte with `--xla_gpu_enable_latency_hiding_scheduler` and libtpu's flags of asynchronous collectives as without them. In
the first, 374 operations stand between the starts and the ends of its all-reduces.
"""

import os
from importlib.metadata import version

# By jaxlib version, since an XLA flag that a jaxlib does not know aborts the process: only where it was measured.
# Empty: no YNN convolutions. On two cores with AVX-512 Eigen's made a step of the paper's CNN 1.7, 1.2 and 1.2 to 1.6
# times as fast in these jaxlibs; with AVX2 they are 2 to 5 times as fast in the first.
_FLAGS: tuple[str, ...] = ("--xla_cpu_experimental_ynn_fusion_type=",)
_BY_JAXLIB = {"0.10.2": _FLAGS, "0.11.2": _FLAGS, "0.12.0.1": _FLAGS}


def set_flags() -> None:
    """Appends to `XLA_FLAGS` what this jaxlib is faster with; a flag that the user has named is left alone."""
    given = os.environ.get("XLA_FLAGS", "")
    named = {flag.partition("=")[0] for flag in given.split()}
    new = [flag for flag in _BY_JAXLIB.get(version("jaxlib"), ()) if flag.partition("=")[0] not in named]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])
