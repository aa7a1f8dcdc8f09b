"""FLOPs, against hand counts and XLA's own analysis where it is right (no loops)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from jaxlightning._flops import analyse_flops, count_flops, mark_parts, matmul_peak
from jaxlightning._hardware import device_peak


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def xla_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_dot_general_with_batch_dimensions():
    fn = lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b)
    a, b = spec(5, 3, 7), spec(5, 7, 2)
    assert count_flops(fn, a, b) == 2 * 5 * 3 * 7 * 2 == xla_flops(fn, a, b)


def test_accepts_jaxprs_closed_and_open():
    closed = jax.make_jaxpr(jnp.matmul)(spec(3, 4), spec(4, 5))
    assert count_flops(closed) == count_flops(closed.jaxpr) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_match_xla_forward_and_backward(stride, padding, groups):
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, feature_group_count=groups
        )

    x, w = spec(2, 4, 9, 9), spec(6, 4 // groups, 3, 3)
    forward = count_flops(conv, x, w)
    assert forward == xla_flops(conv, x, w)
    out = jax.eval_shape(conv, x, w)
    both = lambda x, w, g: jax.vjp(conv, x, w)[1](g)
    # Each multiply-add of the forward pass returns once in each of the backward ones.
    assert count_flops(both, x, w, out) == 2 * forward


def test_scan_counts_its_length_and_xla_does_not():
    def deep(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    x, ws = spec(8, 16), spec(12, 16, 16)
    one = 2 * 8 * 16 * 16
    assert count_flops(deep, x, ws) == 12 * one
    assert xla_flops(deep, x, ws) < 2 * one
    # Backward: two products a layer, but none for the input of the first.
    grads = jax.grad(lambda ws, x: deep(x, ws).sum())
    assert count_flops(grads, ws, x) == 12 * 3 * one


def test_fori_loop_with_static_bounds_is_exact():
    fn = lambda x: jax.lax.fori_loop(0, 10, lambda _, x: x @ x, x)
    report = analyse_flops(fn, spec(4, 4))
    assert report.total == 10 * 2 * 4**3
    assert report.unbounded_loops == 0


def test_while_loops_are_flagged_and_bounded_by_the_caller():
    fn = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
    report = analyse_flops(fn, spec(4, 4))
    assert (report.total, report.unbounded_loops) == (2 * 4**3, 1)
    assert count_flops(fn, spec(4, 4), while_trips=7) == 7 * 2 * 4**3
    idle = lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x)
    assert analyse_flops(idle, spec()).unbounded_loops == 0


def test_cond_counts_its_most_expensive_branch():
    def fn(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(fn, spec(4, 4)) == 2 * 2 * 4**3


def test_calls_are_entered():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def g(x):
        return x @ x

    g.defjvp(lambda x, dx: (g(*x), dx[0]))
    one = 2 * 4**3
    assert count_flops(lambda x: jax.jit(f)(x) + jax.jit(g)(x), spec(4, 4)) == 2 * one
    assert count_flops(jax.grad(lambda x: f(x).sum()), spec(4, 4)) == 2 * one


def test_dead_work_is_not_counted():
    def fn(x):
        def body(total, row):
            unused = row @ x
            return total + unused.shape[0], None

        return jax.lax.scan(body, 0, x.reshape(2, 2, 4))[0]

    assert count_flops(fn, spec(4, 4)) == 0


def test_recomputation_is_told_apart():
    def loss(w, x):
        layer = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))
        return layer(x).sum()

    w, x = spec(16, 16), spec(8, 16)
    plain = lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w).sum()
    report = analyse_flops(jax.value_and_grad(loss), w, x)
    assert report.recomputed > 0
    assert report.model == count_flops(jax.value_and_grad(plain), w, x)


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    p = jax.sharding.PartitionSpec
    local = lambda x, w: x @ w
    split = jax.shard_map(local, mesh=mesh, in_specs=(p("data"), p()), out_specs=p("data"))
    args = spec(8, 16), spec(16, 4)
    assert count_flops(split, *args) == count_flops(local, *args) == 2 * 8 * 16 * 4


def test_ragged_dot_counts_each_row_once():
    fn = jax.lax.ragged_dot
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert count_flops(fn, spec(6, 4), spec(3, 4, 5), sizes) == 2 * 6 * 4 * 5


def test_elementwise_on_request():
    fn = lambda x: jnp.tanh(x * x).sum()
    assert count_flops(fn, spec(3, 5)) == 0
    assert count_flops(fn, spec(3, 5), elementwise=True) == 3 * 15


class Block(eqx.Module):
    inner: eqx.nn.Linear

    def __call__(self, x):
        return jnp.tanh(self.inner(x))


class Net(eqx.Module):
    blocks: Block
    heads: list
    table: dict

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.blocks = eqx.filter_vmap(lambda k: Block(eqx.nn.Linear(8, 8, key=k)))(keys)
        self.heads = [eqx.nn.Linear(8, 2, key=key), eqx.nn.Linear(8, 3, key=key)]
        self.table = {"w": jnp.ones((3, 3))}

    def __call__(self, x):
        dynamic, static = eqx.partition(self.blocks, eqx.is_array)
        layer = jax.checkpoint(lambda x, d: (jax.vmap(eqx.combine(d, static))(x), None))
        x, _ = jax.lax.scan(layer, x, dynamic)
        a, b = (jax.vmap(head)(x) for head in self.heads)
        return a.sum() + (b @ self.table["w"]).sum()


def test_parts_are_booked_through_scan_remat_vmap_and_grad():
    net = Net(jax.random.key(0))
    marked = mark_parts(net)
    assert isinstance(marked.blocks, Block)
    # Two devices apart, the leaves are the same objects.
    pairs = zip(jax.tree.leaves(net), jax.tree.leaves(marked), strict=True)
    assert all(a is b for a, b in pairs)
    loss = lambda dynamic, x: eqx.combine(dynamic, marked)(x)
    report = analyse_flops(jax.grad(loss), eqx.filter(marked, eqx.is_inexact_array), spec(5, 8))
    layer, a, b, table = 2 * 5 * 8 * 8, 2 * 5 * 8 * 2, 2 * 5 * 8 * 3, 2 * 5 * 3 * 3
    assert report.total == sum(report.parts.values())
    # Forward, recomputed, and two backward products; the outputs of heads and table are dead.
    assert report.parts[".blocks.inner"] == 3 * 4 * layer
    assert report.recomputed == 3 * layer
    assert report.parts[".heads[0]"] == 2 * a
    assert report.parts[".heads[1]"] == 3 * b
    assert report.parts[""] == 2 * table


def test_matmul_peak_is_a_rate():
    assert 1e6 < matmul_peak(n=64, repeats=3) < 1e16
    assert matmul_peak(n=32, dtype=jnp.bfloat16, repeats=1) > 0


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H200", jnp.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", jnp.float32, 494.5e12),
        ("NVIDIA A100-SXM4-80GB", jnp.float16, 312e12),
        ("NVIDIA A10G", jnp.bfloat16, None),
        ("NVIDIA L40S", jnp.bfloat16, 362e12),
        ("TPU v5 lite", jnp.bfloat16, 197e12),
        ("TPU v5p", jnp.float32, 459e12),
        ("cpu", jnp.float32, None),
    ],
)
def test_published_peaks(kind, dtype, peak):
    assert device_peak(kind, dtype) == peak
