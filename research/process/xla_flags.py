"""XLA flags that make compiled programs faster. They must be set before JAX is imported.

No flag overlaps collectives with computation, because the compilers do so by default: the programs for eight H100
(ResNet-18, data parallel; jaxlib 0.10.2) and eight v5e chips (char_rnn, fsdp; libtpu 0.0.42.1) are byte-identical with
and without `--xla_gpu_enable_latency_hiding_scheduler` and libtpu's flags for asynchronous collectives. In the first,
374 operations are scheduled between the starts and the ends of the all-reduces.
"""

import os
from importlib.metadata import version

# By default, XLA computes convolutions and reductions on a CPU by YNN, a library of kernels; this keeps it for
# reductions only. With Eigen's convolutions, a step of the tutorial CNN on two AVX-512 cores is 1.7, 1.2 and 1.2 to 1.6
# times as fast in the three jaxlibs below (measured without YNN's reductions); with AVX2, 2 to 5 times as fast in the
# first. XLA's own reductions are slow: to sum float32 [32, 32, 32, 64] over all axes but the last takes 12.8 ms on two
# AVX-512 cores, by YNN 0.7 ms (medians of 25, in the first and the last jaxlib).
# Listed by version, because jaxlib aborts the process at a flag that it does not know.
FLAGS: tuple[str, ...] = ("--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE",)
_BY_JAXLIB = {"0.10.2": FLAGS, "0.11.2": FLAGS, "0.12.0.1": FLAGS}


def set_flags() -> None:
    """Appends the flags for this jaxlib to `XLA_FLAGS`, except those that the user has set."""
    given = os.environ.get("XLA_FLAGS", "")
    names = {flag.partition("=")[0] for flag in given.split()}
    new = [flag for flag in _BY_JAXLIB.get(version("jaxlib"), ()) if flag.partition("=")[0] not in names]
    if new:
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])
