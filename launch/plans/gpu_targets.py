"""Descriptions of GPUs for compiling with XLA:GPU on a machine without one: `GpuTargetConfigProto` in text format.

The values are those that the driver reports for these GPUs, as in NVIDIA's white papers on the A100 and the H100. The
field names are those of https://github.com/openxla/xla/blob/main/xla/stream_executor/device_description.proto.
"""

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_block}
  shared_memory_per_core: {shared_core}
  core_count: {cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {clock}
  l2_cache_size: {cache}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }}
}}
runtime_version {{ major: 12 minor: 8 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{name}"
"""


def _hopper(name: str, bandwidth: int, memory: int) -> str:
    return _TARGET.format(
        name=name,
        shared_block=232448,
        shared_core=233472,
        cores=132,
        fpus=128,
        clock=1.98,
        cache=50 * 2**20,
        bandwidth=bandwidth,
        memory=memory,
        major=9,
    )


TARGETS = {
    "a100": _TARGET.format(
        name="NVIDIA A100-SXM4-80GB",
        shared_block=166912,
        shared_core=167936,
        cores=108,
        fpus=64,
        clock=1.41,
        cache=40 * 2**20,
        bandwidth=2039 * 10**9,
        memory=80 * 10**9,
        major=8,
    ),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 3350 * 10**9, 80 * 10**9),
    "h200": _hopper("NVIDIA H200", 4800 * 10**9, 141 * 10**9),
}
