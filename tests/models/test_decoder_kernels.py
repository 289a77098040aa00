"""A whole model read through the kernels, interpreted, against the same model in plain XLA."""

import jax
import jax.numpy as jnp
import numpy as np

from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots, make_slots
from memjax.models.config import ModelConfig
from memjax.models.decoder import empty_cache, forward, init_params, make_model, site_shapes

CONFIG = ModelConfig(
    family="gemma2", vocab_size=50, num_layers=2, width=32, mlp_width=48, num_heads=2, num_kv_heads=1, head_size=128,
    max_positions=512, window=20, local=(True, False), attn_softcap=20.0,
)  # fmt: skip


def test_decoding_with_a_prefix_a_cache_and_slots_equals_plain_xla():
    model, params = make_model(CONFIG), init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    shapes = {site: shape for site, shape in site_shapes(CONFIG).items() if site in ("k", "down")}
    empty = make_slots(shapes, CONFIG.num_layers, 3, 2)
    fill = lambda tree: {s: rng.normal(size=x.shape).astype(np.float32) * [[[[0]], [[1]], [[1]]]] for s, x in tree.items()}
    slots = Slots(fill(empty.a), fill(empty.b), jnp.array([0.0, 0.1, -0.1]))
    k, v = rng.normal(size=(2, CONFIG.num_layers, 1, 40, 1, 128)).astype(np.float32)
    prefix = Segment(k, v, np.arange(40, dtype=np.int32)[None])

    told = {"segments": [prefix], "slots": slots, "slot_ids": jnp.array([2, 0])}
    ids, positions = jnp.array([[3, 4], [5, 6]]), jnp.array([[40, 41], [40, -1]])
    read = jax.jit(forward, static_argnums=0, static_argnames="taps")
    cache = read(model, params, ids, positions, empty_cache(CONFIG, 2, 24), **told).cache

    def decode(way):
        one = model._replace(kernels=way)
        return read(one, params, jnp.array([[7], [8]]), jnp.array([[42], [41]]), cache, taps=("lse",), **told)

    got, expected = (decode(way) for way in ("interpret", "xla"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
