"""The attention kernel on a mesh: every device reads its own rows and heads, and the result is that of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.kernels.segment_attention import Segment, attend
from memjax.kernels.segment_attention.sharded import axes_of
from memjax.sharding import MeshConfig, build_mesh

LAYERS, ROWS, HEADS, GROUPS, SIZE, PREFIX, TAIL = 2, 8, 8, 4, 128, 32, 40


def arrays(groups=GROUPS):
    """Queries and three segments: a prefix that all rows share and a cache, both of all layers, and the tokens' own."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    keys = lambda *outer: (draw(*outer, groups, SIZE), draw(*outer, groups, SIZE))
    held = jnp.asarray(rng.integers(0, TAIL, (ROWS, 1)))
    place = jnp.where(jnp.arange(TAIL) < held, PREFIX + jnp.arange(TAIL), -1)
    at = (PREFIX + held).astype(jnp.int32)
    given = keys(LAYERS, 1, PREFIX), keys(LAYERS, ROWS, TAIL), keys(ROWS, 1)
    return draw(ROWS, 1, HEADS, SIZE), at, given, (jnp.arange(PREFIX)[None], place, at), jnp.int32(1)


def read(q, at, keys, places, layer, kernels):
    segments = [Segment(*kv, place, layer=layer) for kv, place in zip(keys[:2], places[:2], strict=True)]
    return attend(q, at, [*segments, Segment(*keys[2], places[2])], scale=0.1, window=50, softcap=20.0, kernels=kernels)


READ = jax.jit(read, static_argnums=5)


def placed(q, at, keys, places, layer, sizes):
    mesh = build_mesh(MeshConfig(*sizes))
    rows = ("data", "fsdp")
    heads = "tensor" if keys[0][0].shape[-2] % sizes[2] == 0 else None
    on = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    prefix = [on(x, None, None, None, heads) for x in keys[0]]
    cache = [on(x, None, rows, None, heads) for x in keys[1]]
    own = [on(x, rows, None, heads) for x in keys[2]]
    told = on(places[0]), on(places[1], rows), on(places[2], rows)
    return on(q, rows, None, "tensor"), on(at, rows), (prefix, cache, own), told, layer


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_sharded_equals_unsharded_and_nothing_is_sent(sizes):
    given = arrays()
    wanted = READ(*given, "xla")
    on = placed(*given, sizes)
    program = READ.lower(*on, "interpret").compile()
    for one, other in zip(program(*on), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-6)
    assert not re.search(r"all-(gather|reduce|to-all)\S*\(|collective-permute\S*\(", program.as_text())


def test_heads_that_do_not_divide_are_refused_by_name_and_left_to_xla():
    mesh = build_mesh(MeshConfig(1, 2, 4))
    with pytest.raises(NotImplementedError, match="2 key/value heads do not divide over 4 devices"):
        axes_of(mesh, ROWS, 2)
    assert axes_of(mesh, ROWS, 4) == ("fsdp", "tensor")
    assert axes_of(mesh, 3, 4) == (None, "tensor")  # rows that do not divide are read by every device
    given = arrays(groups=2)
    on = placed(*given, (1, 2, 4))
    for one, other in zip(READ(*on, "interpret"), READ(*given, "xla"), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-6)
