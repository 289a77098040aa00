"""The hypernetwork: the published sizes, and what is true of the reference (arXiv 2602.15902) is true of it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.errors import BaseMismatchError, ConfigError
from memjax.memory.adapter import as_slots
from memjax.models.config import ModelConfig
from memjax.models.decoder import forward, rms_norm
from memjax.models.generate import pad_prompts
from memjax.sharding import describe
from memjax.write.hypernet import network as n
from memjax.write.hypernet.encode import _combine, chunk_weights, combine, context_features, encode_chunks, read_chunks
from memjax.write.hypernet.network import HyperConfig, abstract_hyper, chunk_factors, hyper_counts, init_hyper
from tests.shapes import shape_of
from tests.support import small_base
from tests.write.hypernet import oracle
from tests.write.hypernet.support import BASE, CONFIG, EARLY, MISTRAL, QWEN, chunks_of, fresh, hyper, logits, moved

SMALL = ModelConfig("llama", 1472, 6, 256, 1024, 4, 4, 64, 512)


def size(config, base):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_hyper(config, base)))


def test_parameters_are_as_many_as_published():
    gemma = shape_of("gemma-2-2b")
    assert size(HyperConfig(), gemma) == 309_468_064
    assert size(HyperConfig(blocks=9), gemma) == 315_237_792
    assert size(HyperConfig(features="early", latents=208), gemma) == 309_672_864
    assert size(HyperConfig(rank=16), gemma) == 311_868_736
    assert round(size(HyperConfig(), MISTRAL) / 1e5) == 5684
    assert round(size(HyperConfig(), QWEN) / 1e5) == 4152
    small = HyperConfig(width=128, heads=4, kv_heads=1, head_size=32, blocks=4)
    assert round(size(small, SMALL) / 1e5) == 37
    assert round(size(dataclasses.replace(small, blocks=8), SMALL) / 1e5) == 46


def test_shapes_of_gemma_from_features_to_adapter():
    gemma, config = shape_of("gemma-2-2b"), HyperConfig()
    params = abstract_hyper(config, gemma)
    assert HyperConfig(features="early").read_layers(gemma) == 6
    features = jax.ShapeDtypeStruct((26, 3, 64, 2304), jnp.bfloat16)
    owner, index = jax.ShapeDtypeStruct((3, 64), jnp.int32), jax.ShapeDtypeStruct((2, 2), jnp.int32)

    def run(params, features, owner, index):
        factors = chunk_factors(config, gemma, params, features, owner)
        return factors, combine(config, params, factors, index)

    (a, b), slots = jax.eval_shape(run, params, features, owner, index)
    assert (a["down"].shape, b["down"].shape, a["down"].dtype) == ((26, 3, 8, 9216), (26, 3, 8, 2304), jnp.float32)
    assert slots.a["down"].shape == (26, 2, 24, 9216)
    assert round(config.scale, 4) == 45.2548


def test_every_parameter_has_a_place_on_a_mesh():
    config = HyperConfig(("down", "up"), gates=True)
    tree = abstract_hyper(config, shape_of("gemma-2-2b"))
    told = describe(tree, "hyper", {"fsdp": 2, "tensor": 4}, counts=hyper_counts(config))
    assert told["head"] == "26, 2, 512/fsdp, 11520/tensor"
    assert told["encoder/blocks/q"] == "8, 512/fsdp, 2048/tensor"
    assert told["sites/down/a_bias"] == "26, 8, 9216"
    assert len(told) == len(jax.tree.leaves(tree))


def test_initial_values_have_the_published_spread():
    params = init_hyper(CONFIG, BASE.config, jax.random.key(1))
    emitted, size_in = CONFIG.emitted(BASE.config), BASE.config.mlp_width
    assert np.std(params["head"]) == pytest.approx(0.5 / math.sqrt(16 + emitted * 2), rel=0.05)
    assert np.std(params["sites"]["down"]["a_bias"]) == pytest.approx(0.2 / math.sqrt(size_in * 2), rel=0.15)
    assert np.abs(params["mlp"]["up"]).max() == pytest.approx(math.sqrt(3 / 16), rel=0.05)
    assert np.abs(params["encoder"]["blocks"]["o"]).max() == pytest.approx(32**-0.5, rel=0.05)
    site = params["sites"]["down"]
    assert not np.any(site["b_scale"])
    assert not np.any(site["b_bias"])
    assert np.all(np.asarray(site["a_scale"]) == 1)


def test_a_fresh_network_changes_no_bit():
    adapter = encode_chunks(BASE, hyper(params=fresh(CONFIG)), chunks_of())
    assert adapter.rank == 6
    assert sorted(adapter.a) == sorted(CONFIG.sites)
    np.testing.assert_array_equal(logits(as_slots(adapter)), logits())


FEATURES = jax.jit(context_features, static_argnums=(0, 1))


def read(config, params, chunks, iterative=False, pad=64):
    ids, positions = pad_prompts(chunks, 2, pad)
    return read_chunks(BASE.model, config, BASE.params, params, ids, positions, iterative=iterative)


def near(left, right, atol=3e-5):
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [pytest.param(CONFIG, id="layers"), pytest.param(EARLY, id="early", marks=pytest.mark.slow)]
)
def test_layers_folded_and_one_by_one_are_the_same_numbers(config):
    params, chunks = moved(config), chunks_of(count=2)
    near(read(config, params, chunks), read(config, params, chunks, iterative=True))


@pytest.mark.parametrize(
    "config", [pytest.param(CONFIG, id="layers"), pytest.param(EARLY, id="early", marks=pytest.mark.slow)]
)
def test_the_numbers_are_those_of_an_implementation_with_loops(config):
    params, chunks = moved(config), chunks_of()
    ids, positions = pad_prompts(chunks, 2, 64)
    features = np.asarray(FEATURES(config, BASE.model, BASE.params, ids, positions), np.float64)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    made = read(config, params, chunks)
    for chunk in (0, 1):
        z = features[..., chunk, positions[chunk] >= 0, :]
        found = oracle.factors(config, config.sizes(BASE.config), exact, z, BASE.config.num_layers)
        near(jax.tree.map(lambda x, c=chunk: x[:, c], made), found, atol=1e-4)


def test_padding_changes_nothing():
    near(read(CONFIG, moved(CONFIG), chunks_of()), read(CONFIG, moved(CONFIG), chunks_of(), pad=96))


def test_a_row_of_padding_alone_is_finite():
    made = read(CONFIG, moved(CONFIG), chunks_of()[:1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(made))


def test_chunks_packed_into_one_row_are_read_apart():
    chunks, params = chunks_of(count=2), moved(CONFIG)
    ids, owner, positions = (np.full((1, 96), fill, np.int32) for fill in (0, -1, -1))
    at = 0
    for number, chunk in enumerate(chunks):
        here = slice(at, at + len(chunk))
        ids[0, here], owner[0, here], positions[0, here] = chunk, number, np.arange(len(chunk))
        at += len(chunk)

    @jax.jit
    def packed():
        features = context_features(CONFIG, BASE.model, BASE.params, ids, positions, owner)
        return chunk_factors(CONFIG, BASE.config, params, features, owner, 2)

    near(packed(), read(CONFIG, params, chunks))


def test_layers_read_what_enters_their_block_and_the_last_one_a_normed_state():
    base = small_base(norm_offset=1.0, post_norms=True, embed_scale=5.6)
    ids, positions = pad_prompts(chunks_of(), 2, 64)

    @jax.jit
    def found(params):
        seen = forward(base.model, params, ids, positions, taps=("x",)).taps["x"]
        normed = rms_norm(seen, params["final_norm"], base.config)
        return seen, normed, *(context_features(c, base.model, params, ids, positions) for c in (CONFIG, EARLY))

    valid = positions >= 0
    seen, normed, features, early = (np.asarray(x)[..., valid, :] for x in found(base.params))
    near(features[:-1], seen[:-1])
    near(features[-1], normed[-1])
    assert np.abs(features[-1] - seen[-1]).max() > 0.1
    near(early, normed[1])


def test_the_order_of_chunks_means_nothing_and_they_add_up():
    network, chunks = hyper(), chunks_of()
    both = logits(as_slots(encode_chunks(BASE, network, chunks)))
    np.testing.assert_allclose(logits(as_slots(encode_chunks(BASE, network, chunks[::-1]))), both, atol=1e-5)
    delta = lambda x: np.einsum("lrf,lri->lfi", x.b["down"], x.a["down"]) * float(x.scale)
    site = network.params["sites"]["down"]
    own = np.einsum("lrf,lri->lfi", site["b_bias"], site["a_bias"]) * CONFIG.scale
    apart = sum(delta(encode_chunks(BASE, network, [chunk])) for chunk in chunks)
    np.testing.assert_allclose(delta(encode_chunks(BASE, network, chunks)), apart - own, atol=1e-4, rtol=1e-4)
    assert np.abs(both - logits()).max() > 1e-2


def test_the_adapter_equals_merged_weights():
    adapter = encode_chunks(BASE, hyper(), chunks_of())
    layers = dict(BASE.params["layers"])
    for site in CONFIG.sites:
        layers[site] = layers[site] + adapter.scale * np.einsum("lri,lrf->lif", adapter.a[site], adapter.b[site])
    merged = logits(params={**BASE.params, "layers": layers})
    np.testing.assert_allclose(logits(as_slots(adapter)), merged, atol=1e-4)


def test_two_documents_in_one_batch_are_those_of_one_at_a_time():
    params = moved(CONFIG)
    texts = [chunks_of(), chunks_of("The ferry to Vask leaves at seven.")[:1]]
    parts = [read(CONFIG, params, text) for text in texts]
    factors = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
    slots = _combine(CONFIG, params, factors, np.asarray([[0, 1], [2, -1]]))
    assert slots.a["down"].shape[:3] == (3, 2, 6)
    assert not np.any(slots.a["down"][:, 1, 2:4])
    assert not np.any(slots.b["down"][:, 1, 2:4])
    together = logits(slots, np.asarray([0, 1]))
    alone = [as_slots(encode_chunks(BASE, hyper(), text)) for text in texts]
    for row in (0, 1):
        np.testing.assert_allclose(together[row], logits(alone[row])[row], atol=1e-5)


def test_weights_of_chunks_and_of_the_bias_multiply_a_alone():
    params, factors = moved(CONFIG), read(CONFIG, moved(CONFIG), chunks_of())
    index = np.asarray([[0, 1]])
    plain = _combine(CONFIG, params, factors, index)
    weighed = _combine(CONFIG, params, factors, index, np.asarray([[0.5, 2.0]]), bias=-1.0)
    near(weighed.b, plain.b)
    share = np.repeat([0.5, 2.0, -1.0], 2)[:, None]
    near(weighed.a["down"], plain.a["down"] * share)
    assert chunk_weights(4, "mean").tolist() == [0.25] * 4
    assert chunk_weights(4, "root").tolist() == [0.5] * 4


def test_gates_begin_as_the_plain_sum_and_may_leave_a_chunk_out():
    gated = dataclasses.replace(CONFIG, gates=True)
    assert size(gated, BASE.config) == size(CONFIG, BASE.config) + BASE.config.num_layers * (CONFIG.width + 1)
    begun = init_hyper(gated, BASE.config, jax.random.key(0))
    assert not np.any(begun["chunk_gate"])
    assert not np.any(begun["chunk_gate_bias"])
    params = moved(gated)
    e = np.random.default_rng(0).normal(size=(3, 2, 2, 16)).astype(np.float32)
    zeros = np.zeros(16, np.float32)
    assert n.chunk_share(e, zeros, 0.0).tolist() == [1.0] * 3
    found = n.chunk_share(e, params["chunk_gate"][0], params["chunk_gate_bias"][0])
    logit = e.mean(axis=(1, 2)) @ params["chunk_gate"][0] + params["chunk_gate_bias"][0]
    np.testing.assert_allclose(found, 2 / (1 + np.exp(-logit)), rtol=1e-5)
    plain, (a, b) = read(CONFIG, params, chunks_of()), read(gated, params, chunks_of())
    near(b, plain[1])
    shares = a["down"] / plain[0]["down"]
    assert np.ptp(shares, axis=(2, 3)).max() < 1e-3  # one for all rows of a chunk in a layer
    assert np.ptp(shares[:, :, 0, 0]) > 1e-3  # and another for each
    shut = {**params, "chunk_gate_bias": np.full_like(params["chunk_gate_bias"], -1e4)}
    assert not np.any(read(gated, shut, chunks_of())[0]["down"])


def test_the_update_grows_with_the_chunks_unless_it_is_levelled():
    network, (chunk, *_) = hyper(), chunks_of()
    delta = lambda x: np.einsum("lrf,lri->lfi", x.b["down"], x.a["down"]) * float(x.scale)
    site = network.params["sites"]["down"]
    own = np.einsum("lrf,lri->lfi", site["b_bias"], site["a_bias"]) * CONFIG.scale
    made = lambda count, weigh: delta(encode_chunks(BASE, network, [chunk] * count, weigh=weigh)) - own
    one = made(1, "level")
    near(one, made(1, "sum"))
    near(made(4, "sum"), 4 * one, atol=1e-3)
    near(made(4, "level"), one, atol=1e-3)
    unlike = delta(encode_chunks(BASE, network, chunks_of(count=4), weigh="level")) - own
    alone = [delta(encode_chunks(BASE, network, [c])) - own for c in chunks_of(count=4)]
    norm = lambda x: np.linalg.norm(x, axis=(-2, -1))
    np.testing.assert_allclose(norm(unlike), np.sqrt(np.mean(norm(np.stack(alone)) ** 2, axis=0)), rtol=1e-3)


def test_only_the_direction_of_an_embedding_counts():
    e = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_allclose(n.unit(10 * e), n.unit(e), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(n.unit(e), axis=-1), 1, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: n.unit(x).sum())(jnp.zeros(4))).all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="sites are"):
        HyperConfig(sites=("mlp",))
    with pytest.raises(ConfigError, match="cannot be grouped"):
        HyperConfig(heads=6)
    with pytest.raises(ConfigError, match="the base has 3 layers"):
        dataclasses.replace(EARLY, depth=9).read_layers(BASE.config)
    with pytest.raises(BaseMismatchError, match="f" * 64):
        encode_chunks(BASE, dataclasses.replace(hyper(), base_id="f" * 64), chunks_of())
