"""What is read from compiled programs: groups of devices in every notation, and costs with the loops counted."""

import jax
import jax.numpy as jnp
import pytest

from launch.plans import hlo
from launch.plans.hlo import Collective
from research.sharding import AXES


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1)),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("{}", tuple(range(8))),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(groups, first):
    text = f"""HloModule m, num_partitions=8

ENTRY %main (p: f32[6]) -> f32[6] {{
  %p = f32[6]{{0}} parameter(0)
  ROOT %r = f32[6]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}"""
    assert hlo.Program(text).collectives() == [Collective("all-reduce", 24, first, 1)]


def test_a_group_differs_along_mesh_axes():
    shape = dict(zip(AXES, (2, 4, 1, 2)))
    assert hlo.axes_of((0, 8), shape) == "data"
    assert hlo.axes_of((0, 2, 4, 6), shape) == "fsdp"
    assert hlo.axes_of((0, 2, 8, 10), shape) == "data+fsdp"


def test_every_turn_of_a_loop_is_counted_but_those_of_the_steps():
    """Steps whose number is an input, of 3 turns of 5 products each."""

    def turns(x, count, body):
        return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=count)[0]

    def steps(x, num_steps):
        return jax.lax.fori_loop(0, num_steps, lambda _, x: turns(x, 3, lambda x: turns(x, 5, lambda x: x @ x)), x)

    text = jax.jit(steps).lower(jnp.ones((64, 64)), jnp.int32(1)).compile().as_text()
    assert hlo.Program(text).cost()["flops"] == pytest.approx(3 * 5 * 2 * 64**3, rel=0.01)


def test_cublass_products_are_counted():
    """From the program of an LSTM's step on an H200, with jax 0.11.2: 8 products [256, 1024] @ [1024, 1024]."""
    text = """HloModule one, is_scheduled=true

ENTRY %main (a: f32[8,1024,256], b: f32[8,1024,1024]) -> f32[8,256,1024] {
  %a = f32[8,1024,256]{2,1,0} parameter(0)
  %b = f32[8,1024,1024]{2,1,0} parameter(1)
  %custom-call.1 = (f32[8,256,1024]{2,1,0}, s8[33554432]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],"lhs_contracting_dimensions":["1"],\
"rhs_batch_dimensions":["0"],"rhs_contracting_dimensions":["1"]},"epilogue":"DEFAULT"}}
  ROOT %get-tuple-element = f32[8,256,1024]{2,1,0} get-tuple-element(%custom-call.1), index=0
}
"""
    assert hlo.Program(text).cost()["flops"] == pytest.approx(2 * 8 * 256 * 1024 * 1024, rel=1e-6)


def test_cudnns_convolutions_are_counted():
    """Forward, and of the kernel: each 2 * pixels out * kernel; XLA:GPU writes them as calls."""
    text = """HloModule m, num_partitions=1

ENTRY %main (x: f32[8,32,32,3], w: f32[16,3,3,3], dy: f32[8,30,30,16]) -> f32[16,3,3,3] {
  %x = f32[8,32,32,3]{3,2,1,0} parameter(0)
  %w = f32[16,3,3,3]{3,2,1,0} parameter(1)
  %dy = f32[8,30,30,16]{3,2,1,0} parameter(2)
  %y = (f32[8,30,30,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward"
  %dw = (f32[16,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), window={size=3x3}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  ROOT %r = f32[16,3,3,3]{3,2,1,0} get-tuple-element(%dw), index=0
}"""
    assert hlo.Program(text).cost()["flops"] == pytest.approx(2 * 2 * (8 * 30 * 30 * 16) * (3 * 3 * 3), rel=1e-5)
