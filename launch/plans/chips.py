"""What the vendors say of their chips: the figures that estimates are made with, each with its page."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip and the ways out of it.

    Attributes:
      name: as topologies are named.
      bfloat16_flops: most operations a second of bfloat16 products, dense.
      float32_flops: those of products of float32 arrays by JAX's default precision: TPUs round them to bfloat16, GPUs
        to TF32.
      memory_bytes: of the main memory (HBM).
      memory_bandwidth: of it, bytes a second.
      dimensions: of the network between neighbours: 2 or 3 of a TPU's torus; 1: a GPU's switch, taken for a ring.
      link_bandwidth: bytes a second that leave by one link; there are two links a dimension.
      ring: a dimension of a multiple of this many chips is a ring, a shorter one is open at its ends.
      network_bandwidth: bytes a second that leave by the network between slices, or between machines of GPUs.
      devices: JAX's devices in a chip.
      source: the pages of these figures.
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
    source: str

    def flops(self, dtype: str) -> float:
        """Most operations a second of products of this dtype."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


_GIB = 2**30
_DOCS = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_BOOK = "https://jax-ml.github.io/scaling-book"

# A hop between neighbours takes about a microsecond (https://jax-ml.github.io/scaling-book/sharding).
HOP_SECONDS = 1e-6

# A link's bandwidth is the vendor's "bidirectional ICI bandwidth per chip" over both directions and all links.
CHIPS = {
    chip.name: chip
    for chip in (
        # Links: https://arxiv.org/abs/2304.01433, table 4; network: the book's 25 GB/s a host of 4.
        Chip("v4", 275e12, 275e12, 32 * _GIB, 1.2e12, 3, 50e9, 4, 6.25e9, 1, f"{_DOCS}/v4 {_BOOK}/tpus"),
        Chip("v5e", 197e12, 197e12, 16 * _GIB, 819e9, 2, 50e9, 16, 3.125e9, 1, f"{_DOCS}/v5e"),
        Chip("v5p", 459e12, 459e12, 95 * _GIB, 2765e9, 3, 100e9, 4, 6.25e9, 1, f"{_DOCS}/v5p"),
        Chip("v6e", 918e12, 918e12, 32 * _GIB, 1638e9, 2, 100e9, 16, 12.5e9, 1, f"{_DOCS}/v6e {_DOCS}/tpu7x"),
        Chip("tpu7x", 2307e12, 2307e12, 192 * _GIB, 7380e9, 3, 100e9, 4, 12.5e9, 2, f"{_DOCS}/tpu7x"),
        # NVLink's 600 and 900 GB/s are of both directions; network: a port of 200 or 400 Gb/s a GPU, as in a DGX.
        Chip("a100", 312e12, 156e12, 80 * 10**9, 2039e9, 1, 150e9, 1, 25e9, 1, f"{_NVIDIA}/a100"),
        Chip("h100", 989.4e12, 494.7e12, 80 * 10**9, 3350e9, 1, 225e9, 1, 50e9, 1, f"{_NVIDIA}/h100"),
        Chip("h200", 989.4e12, 494.7e12, 141 * 10**9, 4800e9, 1, 225e9, 1, 50e9, 1, f"{_NVIDIA}/h200"),
    )
}
