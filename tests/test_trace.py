"""Reading traces: the operations of compiled programs, on every platform, and the time in collectives."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from research import trace
from research.trace import Event


def test_the_time_of_an_operation_excludes_those_within_it():
    events = [Event("while", "a", 0, 10), Event("dot", "a", 1, 4), Event("dot", "a", 5, 6), Event("add", "b", 2, 12)]
    assert trace.self_seconds(events) == {"while": 6, "dot": 4, "add": 10}
    assert trace.busy_seconds([*events, Event("add", "b", 20, 21)]) == 13


def _write_trace(folder, *events):
    (folder / "vm.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


def test_a_matrix_product_on_a_cpu_counts_until_its_end_in_another_thread(tmp_path):
    operation = {"ph": "X", "pid": 1, "tid": 1, "dur": 1}
    dot = operation | {"name": "dot.1", "args": {"hlo_op": "dot.1"}}
    loop = operation | {"name": "while", "args": {"hlo_op": "while"}}
    ends = [operation | {"name": f"end: {name}", "tid": 2, "ts": ts} for name, ts in (("dot.1", 100), ("dot.1", 250))]
    ends.append(ends[0] | {"name": "end: while", "ts": 300})
    _write_trace(tmp_path, dot | {"ts": 0}, dot | {"ts": 200}, loop | {"ts": 0, "tid": 3}, *ends)
    seconds = trace.self_seconds(trace.read(tmp_path))
    assert seconds["dot.1"] == pytest.approx(101e-6 + 51e-6)
    assert seconds["while"] == pytest.approx(1e-6)  # its operations are counted


def test_the_operations_of_a_tpu_are_those_of_one_line(tmp_path):
    names = [("process_name", None, "/device:TPU:0"), ("thread_name", 1, "XLA Ops"), ("thread_name", 2, "Steps")]
    metadata = [{"ph": "M", "pid": 7, "name": name, "args": {"name": n}, "tid": tid} for name, tid, n in names]
    events = [{"ph": "X", "pid": 7, "tid": tid, "name": "%fusion.3 = f32[2]", "ts": 0, "dur": 5} for tid in (1, 2)]
    _write_trace(tmp_path, *metadata, *events)
    assert trace.self_seconds(trace.read(tmp_path)) == {"fusion.3": pytest.approx(5e-6)}


def test_a_kernel_of_a_gpu_counts_as_its_instruction(tmp_path):
    kernel = {"ph": "X", "pid": 1, "tid": 1, "name": "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)"}
    _write_trace(tmp_path, kernel | {"ts": 0, "dur": 5, "args": {"hlo_op": "all-reduce-start.1"}})
    assert trace.self_seconds(trace.read(tmp_path)) == {"all-reduce-start.1": pytest.approx(5e-6)}


def test_collectives_are_known_by_their_opcode_or_name():
    program = """
  %psum.7 = f32[2]{0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT all-gather-start.1 = (f32[2]{0}, f32[4]{0}) all-gather-start(%psum.7), dimensions={0}
  %fusion.1 = f32[] fusion(%all-reduce, %y), kind=kCustom, calls=%fused
  %dot.2 = f32[2] dot(%psum.7, %y), metadata={op_name="jit(f)/all-reduce(x)"}"""
    names = ("psum.7", "all-gather-start.1", "all-reduce-scatter.3", "fusion.1", "dot.2")
    events = [Event(name, "a", 10.0**i, 2 * 10.0**i) for i, name in enumerate(names)]
    assert trace.collective_seconds(events, program) == 111


def test_a_traced_psum_is_a_collective(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(x):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(jnp.tanh(x @ x), "data"), x)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    x = jax.device_put(jnp.ones((64, 32)), jax.NamedSharding(mesh, P("data")))
    program = jax.jit(mapped).lower(x).compile()
    trace.start(tmp_path)
    jax.block_until_ready(program(x))
    jax.profiler.stop_trace()
    events = trace.read(tmp_path)
    collectives = [event for event in events if event.name.startswith("psum")]
    assert len(collectives) == 2 * 3  # devices, iterations
    assert trace.collective_seconds(events, program.as_text()) == pytest.approx(
        sum(event.end - event.start for event in collectives)
    )
