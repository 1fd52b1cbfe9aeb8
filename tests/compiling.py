"""Compiler options of the tests."""

from importlib.metadata import version

# Compiling takes most of the tests' time, and more than half of that goes into optimizations and kernel generators that
# small tests do not need. `XLA_FLAGS= pytest` compiles as users do in the tests' own processes; tests that train on
# CIFAR-10 always do.
QUICKLY = "--xla_backend_optimization_level=0"

# Options of `jax.jit`, for tests of rounding: the other kernel generator contracts the same product and difference to a
# fused multiply-add in one kernel, and not in another.
AS_USERS: dict[str, bool | int] = {"xla_backend_optimization_level": 3}

# Jaxlib aborts the process at a flag that it does not know, and later versions do not know this one.
if version("jaxlib") == "0.10.2":
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
