"""Eight CPU devices for every test, and a cache folder that no test shares with its user."""

import os
import tempfile

# Before jax starts, which the first test module that is imported may do.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
_CACHE = tempfile.TemporaryDirectory(prefix="meshwork-tests-")
os.environ["MESHWORK_CACHE_DIR"] = _CACHE.name
