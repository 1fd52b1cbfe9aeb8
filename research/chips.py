"""Specifications of TPU and GPU chips, each with its source."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip and its interconnect.

    Attributes:
      name: the name used in topologies.
      bfloat16_flops: peak FLOP/s of dense bfloat16 matrix products.
      float32_flops: peak FLOP/s of float32 matrix products at JAX's default precision, for which TPUs round to bfloat16
        and GPUs to TF32.
      memory_bytes: size of the HBM.
      memory_bandwidth: bandwidth of the HBM, bytes/s.
      dimensions: of the interconnect: 2 or 3 for a TPU's torus, 1 for a GPU's switch, which is treated as a ring.
      link_bandwidth: outgoing bytes/s of one link; each dimension has two links.
      ring: a dimension whose size is a multiple of this wraps around to a ring; others are open lines.
      network_bandwidth: outgoing bytes/s of a chip between slices, or between GPU machines.
      devices: JAX devices per chip.
      vcpus: vCPUs of Google Cloud's host per chip.
      source: URLs of these specifications.
    """

    name: str
    bfloat16_flops: float
    float32_flops: float
    memory_bytes: int
    memory_bandwidth: float
    dimensions: int
    link_bandwidth: float
    ring: int
    network_bandwidth: float
    devices: int
    vcpus: int
    source: str

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products of this dtype."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


_GIB = 2**30
_DOCS = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_BOOK = "https://jax-ml.github.io/scaling-book"

# vCPUs: ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t and tpu7x-standard-4t have 112, 208, 180 and 224 for four
# chips, a host of v4 240; a2-ultragpu-8g, a3-highgpu-8g and a3-ultragpu-8g 96, 208 and 224 for eight GPUs.
# A link's bandwidth is the vendor's "bidirectional ICI bandwidth per chip", divided by two directions and all links.
CHIPS = {
    chip.name: chip
    for chip in (
        # Links: https://arxiv.org/abs/2304.01433, table 4; network: 25 GB/s per host of 4 chips, from the scaling book.
        Chip("v4", 275e12, 275e12, 32 * _GIB, 1.2e12, 3, 50e9, 4, 6.25e9, 1, 60, f"{_DOCS}/v4 {_BOOK}/tpus"),
        Chip("v5e", 197e12, 197e12, 16 * _GIB, 819e9, 2, 50e9, 16, 3.125e9, 1, 28, f"{_DOCS}/v5e"),
        Chip("v5p", 459e12, 459e12, 95 * _GIB, 2765e9, 3, 100e9, 4, 6.25e9, 1, 52, f"{_DOCS}/v5p"),
        Chip("v6e", 918e12, 918e12, 32 * _GIB, 1638e9, 2, 100e9, 16, 12.5e9, 1, 45, f"{_DOCS}/v6e {_DOCS}/tpu7x"),
        Chip("tpu7x", 2307e12, 2307e12, 192 * _GIB, 7380e9, 3, 100e9, 4, 12.5e9, 2, 56, f"{_DOCS}/tpu7x"),
        # NVLink's 600 and 900 GB/s sum both directions. Network: one port of 200 or 400 Gb/s per GPU, as in a DGX.
        Chip("a100", 312e12, 156e12, 80 * 10**9, 2039e9, 1, 150e9, 1, 25e9, 1, 12, f"{_NVIDIA}/a100"),
        Chip("h100", 989.4e12, 494.7e12, 80 * 10**9, 3350e9, 1, 225e9, 1, 50e9, 1, 26, f"{_NVIDIA}/h100"),
        Chip("h200", 989.4e12, 494.7e12, 141 * 10**9, 4800e9, 1, 225e9, 1, 50e9, 1, 28, f"{_NVIDIA}/h200"),
    )
}

# Other models of these GPUs, with fewer cores or a lower clock, and parts of one (MIG) have other names.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def of_device(device_kind: str) -> Chip | None:
    """Returns the chip that JAX calls `device_kind`, or None if it is not known, as for every CPU."""
    return CHIPS.get(_DEVICE_KINDS.get(device_kind, ""))
