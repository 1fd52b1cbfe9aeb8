"""The model FLOPs utilization: the FLOP/s that the network requires at a speed, as a fraction of the devices' peak.

`research.flops.model_flops` says what is counted: loss and gradient, without recomputation and the optimizer. The peak
(`research.chips`) is that of the dtype that most of these FLOPs have, at JAX's default precision.
"""

import math

from research import chips
from research.training.run import Training


def model_flops(run: Training) -> float | None:
    """Returns the model FLOPs of a train step, over all devices; None if they cannot be counted."""
    total = sum(run.model_flops.values())
    return None if math.isnan(total) else total


def peak_speed(run: Training) -> float | None:
    """Returns the examples per second at a utilization of 1; None if FLOPs or peak of the devices are not known."""
    chip = chips.of_device(run.mesh.devices.flat[0].device_kind)
    by_dtype = run.model_flops if chip else {}
    dtype = max(by_dtype, key=lambda name: by_dtype[name], default="")
    total = sum(by_dtype.values())
    if chip is None or dtype not in ("float32", "bfloat16") or math.isnan(total):
        return None
    return run.config.batch_size * run.mesh.size * chip.flops(dtype) / chip.devices / total
