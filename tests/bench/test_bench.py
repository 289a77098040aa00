"""The measurements, on a shape of no size: that the ratios are of what they say they are."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from memjax.bench.attention import shared_segment
from memjax.bench.compile import first_token, masked_loss, random_step, step_speedup
from memjax.bench.decode import shared_prefix, unused_same_program
from memjax.bench.evict import decode_time, indexer_overhead, prefill_memory, random_kept
from memjax.bench.internalize import pass_cost
from memjax.bench.lora import adapters
from memjax.bench.timing import SMOLLM2_SHAPE, in_turn
from memjax.cli.bench import bench
from memjax.errors import ConfigError
from memjax.evict.bounded import TAIL
from memjax.write.compile import compile_loss
from memjax.write.hypernet.encode import combine
from memjax.write.hypernet.network import HyperConfig, init_hyper

TINY = dataclasses.replace(SMOLLM2_SHAPE, num_layers=2, width=32, mlp_width=48, num_heads=2, num_kv_heads=1, vocab_size=64)


@pytest.mark.slow
def test_a_shared_prefix_is_counted_once():
    numbers = shared_prefix(TINY, rows=8, prefix=512, times=1)
    keys = 2 * TINY.num_layers * 512 * TINY.num_kv_heads * TINY.head_size * 4
    assert numbers["shared_prefix_bytes/copied"] - numbers["shared_prefix_bytes/shared"] > 7 * keys
    assert numbers["shared_prefix_bytes_ratio"] < 1
    assert numbers["shared_prefix_time_ratio"] == pytest.approx(
        numbers["shared_prefix_seconds/shared"] / numbers["shared_prefix_seconds/copied"]
    )


def test_memory_that_is_not_used_is_no_other_program():
    assert unused_same_program(TINY) == {"unused_same_program": 1.0}


@pytest.mark.slow
def test_every_row_reads_an_adapter_of_its_own():
    numbers = adapters(TINY, rows=2, resident=5, rank=2, held=8, times=1)
    assert {"adapters_2_of_5_ratio", "adapters_2_of_2_ratio", "adapters_5_over_2_ratio"} < set(numbers)
    assert all(np.isfinite(value) and value > 0 for value in numbers.values())


def test_a_bounded_prefill_allocates_by_its_budget_and_a_full_one_by_the_text():
    sizes = {tokens: prefill_memory(TINY, rows=2, tokens=tokens, budget=32, block=32) for tokens in (512, 1024)}
    small, large = sizes[512], sizes[1024]
    assert small["peak_bytes/bounded"] == large["peak_bytes/bounded"]
    keys = 2 * TINY.num_layers * 2 * 512 * TINY.num_kv_heads * TINY.head_size * 4
    assert large["peak_bytes/full"] - small["peak_bytes/full"] >= keys
    assert large["peak_ratio"] == large["peak_bytes/bounded"] / large["peak_bytes/full"]
    assert large["peak_ratio"] < small["peak_ratio"] < 1
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(random_kept(TINY, 2, 32, 512, jax.random.key(0))))
    assert small["peak_bytes/bounded"] > held


@pytest.mark.slow
def test_a_bounded_step_is_charged_with_taking_tokens_in():
    numbers = decode_time(TINY, rows=2, tokens=512, budget=32, times=1)
    step = numbers["decode_seconds/bounded"] - numbers["take_in_seconds"] / TAIL
    assert 0 < step < numbers["decode_seconds/bounded"]
    assert numbers["decode_ratio"] == pytest.approx(numbers["decode_seconds/bounded"] / numbers["decode_seconds/full"])


@pytest.mark.slow
def test_an_indexers_part_of_prefill_is_a_share_of_it():
    numbers = indexer_overhead(TINY, rows=2, tokens=64, budget=16, times=1, block=32)
    with_it, without = numbers["prefill_seconds/indexer"], numbers["prefill_seconds/streaming"]
    assert numbers["indexer_overhead"] == pytest.approx(with_it / without - 1)


def test_one_masked_sequence_and_two_passes_are_the_same_step():
    config = dataclasses.replace(TINY, num_layers=1)
    compiler, trained, tasks = random_step(config, 64, 16.0, 2, 12, 0)
    trained["b"] = jax.tree.map(lambda x: x + 0.1, trained["b"])
    trained["slots"] = trained["slots"] + 0.05
    key = jax.random.key(0)
    got, wanted = (
        jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True))(compiler, trained, tasks, key)
        for loss in (masked_loss, compile_loss)
    )
    np.testing.assert_allclose(got[0][0], wanted[0][0], rtol=1e-4)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1.0, float(np.abs(other).max())))
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(got[1])) > 1e-3


@pytest.mark.slow
def test_a_buffer_is_compiled_and_read_faster_than_its_text():
    numbers = {**step_speedup(TINY, tokens=512, rows=2, task=16, times=1), **first_token(TINY, tokens=512, times=1)}
    assert numbers["step_speedup"] == pytest.approx(numbers["step_seconds/masked"] / numbers["step_seconds/cached"])
    read = numbers["first_token_seconds/buffer"] / numbers["first_token_seconds/prompt"]
    assert numbers["ttft_ratio"] == pytest.approx(read)


def test_a_pass_layer_by_layer_allocates_less_and_leaves_as_much():
    """Of four layers: the projection's hidden states are one layer's at a time."""
    deep = dataclasses.replace(TINY, num_layers=4, width=64)
    network = HyperConfig(width=16, heads=2, kv_heads=1, head_size=8, blocks=1, latents=4, rank=2)
    found = pass_cost(deep, (32, 128), chunk=32, times=1, network=network)
    assert found["peak_bytes/iterative-128"] < 0.6 * found["peak_bytes/batched-128"]
    for tokens, chunks in ((32, 1), (128, 4)):
        hyper = init_hyper(network, deep, jax.random.key(0))
        index = np.arange(chunks, dtype=np.int32)[None]
        a, b = ({"down": np.zeros((4, chunks, 2, size))} for size in (deep.mlp_width, deep.width))
        slots = combine(network, hyper, (a, b), index)
        assert found[f"adapter_bytes-{tokens}"] == 2 * (slots.a["down"].size + slots.b["down"].size)
        assert found[f"cache_bytes-{tokens}"] == 2 * 2 * 4 * deep.num_kv_heads * deep.head_size * tokens


def test_what_is_timed_is_told(monkeypatch):
    """Memory of all layers, seconds of some: the setting says of how many."""
    layers = {}
    for name in ("prefill_memory", "decode_time", "indexer_overhead"):
        made = lambda config, name=name, **told: layers.setdefault(name, config.num_layers) and {}
        monkeypatch.setattr(f"memjax.bench.evict.{name}", made)
    shown = json.loads(CliRunner().invoke(bench, ["evict", "--json"], catch_exceptions=False).output)
    assert layers == {"prefill_memory": 30, "decode_time": 8, "indexer_overhead": 8}
    assert (shown["setting"]["layers"], shown["setting"]["timed_layers"]) == (30, 8)
    layers.clear()
    CliRunner().invoke(bench, ["evict", "--json", "--layers", "2"], catch_exceptions=False)
    assert set(layers.values()) == {2}


def test_a_budget_that_evicts_nothing_is_refused():
    result = CliRunner().invoke(bench, ["evict", "--tokens", "64", "--budget", "64"])
    assert isinstance(result.exception, ConfigError)
    assert "evicts nothing" in str(result.exception)


def test_calls_alternate_after_two_of_each():
    made = []
    in_turn({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 2)
    assert "".join(made) == "aabb" + "abab"


def test_the_command_writes_its_setting(tmp_path):
    told = ["attention", "--rows", "2", "--prefix", "32", "--times", "1", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(bench, told, catch_exceptions=False)
    written = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(result.output) == written
    assert written["setting"]["rows"] == 2
    assert set(shared_segment(TINY, 2, 32, 1)) | {"seconds", "setting"} == set(written)
