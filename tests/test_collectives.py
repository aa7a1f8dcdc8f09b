"""Collectives as read from compiled programs, held against what was written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlightning.parallel._collectives import Array, collectives, total_bytes

SPLIT, WHOLE = P("data"), P()


def compiled(function, *shapes, in_spec=SPLIT, out_spec=WHOLE):
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
        for shape in shapes
    ]
    return jax.jit(mapped).lower(*arguments).compile()


def test_a_sum_over_devices():
    (found,) = collectives(compiled(lambda x: jax.lax.psum(x, "data"), (8, 3)))
    assert found.kind == "all-reduce"
    assert found.arrays == (Array("f32", (2, 3)),)
    assert (found.bytes, found.group, found.in_loop, found.times) == (24, 4, False, 1)
    assert found.moved == 24 * 2 * 3 / 4


def test_gathers_and_scatters():
    def function(x):
        whole = jax.lax.all_gather(x, "data", axis=0, tiled=True)
        return jax.lax.psum_scatter(whole * x.sum(), "data", scatter_dimension=0, tiled=True)

    gather, scatter = collectives(compiled(function, (8, 3), out_spec=P("data")))
    assert (gather.kind, gather.bytes) == ("all-gather", 96)
    assert (scatter.kind, scatter.bytes) == ("reduce-scatter", 24)
    assert gather.moved == scatter.moved == 72
    assert total_bytes([gather, scatter]) == 120
    assert total_bytes([gather, scatter], "all-gather") == 96


def test_a_tuple_counts_all_its_arrays():
    def function(x, y):
        return jax.lax.psum((x, y), "data")

    found = collectives(compiled(function, (8, 3), (4, 5), in_spec=P("data")))
    assert total_bytes(found) == 4 * (2 * 3 + 5)


@pytest.mark.parametrize("length", [5, 1000])
def test_what_is_in_a_loop_is_counted_as_often(length):
    def function(x):
        def body(carry, _):
            return carry + jax.lax.psum(jnp.tanh(x + carry), "data"), None

        return jax.lax.scan(body, jnp.zeros_like(x), None, length=length)[0]

    found = collectives(compiled(function, (8, 3)))
    (inside,) = [c for c in found if c.in_loop]
    assert inside.times == length
    assert total_bytes(found) == 24 * length


def test_loops_in_loops_and_of_unknown_length():
    def function(x):
        def inner(carry, _):
            return jax.lax.psum(jnp.tanh(x + carry), "data"), None

        def outer(carry, _):
            return jax.lax.scan(inner, carry, None, length=3)[0], None

        y = jax.lax.scan(outer, x, None, length=4)[0]
        grows = lambda y: jax.lax.psum(jnp.tanh(y), "data") * 2
        return jax.lax.while_loop(lambda y: y.sum() < 100, grows, y)

    found = collectives(compiled(function, (8, 3)))
    assert sorted(str(c.times) for c in found if c.in_loop) == ["12", "None"]


def test_asynchronous_ones_count_once():
    text = """HloModule m, is_scheduled=true

ENTRY %main.1 (p: f32[2,3]) -> f32[8,3] {
  %p = f32[2,3]{1,0} parameter(0)
  %s = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]
  %d = f32[8,3]{1,0} all-gather-done(%s)
  %r = f32[8,3]{1,0} all-reduce-start(%d), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %e = f32[8,3]{1,0} all-reduce-done(%r)
}
"""
    gather, reduce = collectives(text)
    assert (gather.arrays, gather.group) == ((Array("f32", (8, 3)),), 4)
    assert (reduce.bytes, reduce.group) == (96, 2)


def test_groups_by_the_axes_of_a_mesh():
    text = """HloModule m

ENTRY %main.1 (p: f32[2,3]) -> f32[32,3] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %g = f32[32,3]{1,0} all-gather(%p), replica_groups=GROUPS, dimensions={0}
}
"""
    for groups, size, span in (
        ("mesh['axis_0'=16,'axis_1'=64] {'axis_0'}", 16, 15 * 64 + 1),
        ("mesh['axis_0'=16,'axis_1'=64] {'axis_1'}", 64, 64),
        ("mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'a','b'}", 32, 32),
        ("mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'a'}", 4, 4),
        ("mesh['a'=4,'b'=8] {'b':(2)4}", 4, 4),
        ("mesh['a'=4,'b'=8] {'b':(1)2}", 2, 5),
        ("[4,8]<=[32]", 8, 8),
        ("[4,8]<=[8,4]T(1,0)", 8, 29),
        ("{{0,2,4},{1,3,5}}", 3, 5),
    ):
        (found,) = collectives(text.replace("GROUPS", groups))
        assert (found.group, found.span) == (size, span), groups


def test_bytes_of_small_numbers():
    assert Array("pred", (3,)).bytes == 3
    assert Array("bf16", (3,)).bytes == 6
    assert Array("s4", (3,)).bytes == 2
    assert Array("f8e4m3fn", (3,)).bytes == 3


def test_a_permute_counts_once_asynchronous_or_not():
    pairs = "source_target_pairs={{0,1},{1,0}}"
    text = f"""HloModule m

ENTRY %main.1 (p: f32[2,3]) -> f32[8,3] {{
  %p = f32[2,3]{{1,0}} parameter(0)
  %s = (f32[2,3]{{1,0}}, f32[2,3]{{1,0}}, u32[], u32[]) collective-permute-start(%p), {pairs}
  %d = f32[2,3]{{1,0}} collective-permute-done(%s)
  %n = f32[2,3]{{1,0}} collective-permute(%p), {pairs}
}}
"""
    assert [(c.kind, c.bytes) for c in collectives(text)] == [("collective-permute", 24)] * 2
