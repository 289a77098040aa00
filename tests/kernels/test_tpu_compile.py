"""Every kernel compiles for real chips and real shapes, without a TPU: libtpu's compiler (`pip install memjax[tpu]`).

The ids stand in tpu_compile_ids.txt, `kernel/model/chip`. libtpu allows one process at a time: run this file with -n 0.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from memjax.kernels.segment_attention import Segment, attend
from memjax.kernels.segment_attention import block_sizes as attention_sizes
from memjax.kernels.slot_lora import block_sizes as slot_sizes
from memjax.kernels.slot_lora import slot_delta
from memjax.kernels.vmem import VMEM_BUDGET

IDS = (Path(__file__).parent / "tpu_compile_ids.txt").read_text().split()
# libtpu wants to know on which kind of host it runs, and would ask a metadata server that is not there.
HOST = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
CHIPS = {"v5e": ("v5e:2x4", "TPU_V5E"), "v5p": ("v5p:2x2x1", "TPU_V5P"), "v6e": ("v6e:2x2", "TPU_V6E")}
LAYERS, BATCH, PREFIX, TAIL, BLOCK, SLOTS, RANK = 2, 32, 2048, 512, 16, 256, 8


class Shape(NamedTuple):
    """The published sizes of a model: N, K, H, width, MLP width, soft cap and window of its attention."""

    heads: int
    groups: int
    size: int
    width: int
    mlp_width: int
    softcap: float | None = None
    window: int | None = None


MODELS = {
    "llama-3.1-8b": Shape(32, 8, 128, 4096, 14336),
    "qwen3-8b": Shape(32, 8, 128, 4096, 12288),
    "gemma-2-2b": Shape(8, 4, 256, 2304, 9216, 50.0, 4096),
}


def attention(model, length, chip, kernels="pallas"):
    """(compiled program, bytes of the segments of a layer) of a layer's attention: shared prefix, own cache, own tokens."""
    spec = on(chip)
    q = spec((BATCH, length, model.heads, model.size), jnp.bfloat16)
    kv = lambda *outer: spec((*outer, model.groups, model.size), jnp.bfloat16)
    prefix, cache, own = kv(LAYERS, 1, PREFIX), kv(LAYERS, BATCH, TAIL), kv(BATCH, length)
    places = [spec(shape, jnp.int32) for shape in ((1, PREFIX), (BATCH, TAIL), (BATCH, length))]

    def layer_attention(q, prefix, cache, own, places, layer):
        stacked = [Segment(*prefix, places[0], layer=layer), Segment(*cache, places[1], layer=layer)]
        told = {"scale": 0.1, "softcap": model.softcap, "window": model.window}
        return attend(q, places[2], [*stacked, Segment(*own, places[2])], **told, kernels=kernels)

    program = jax.jit(layer_attention).lower(q, (prefix,) * 2, (cache,) * 2, (own,) * 2, places, spec((), jnp.int32))
    return program.compile(), 4 * model.groups * model.size * (PREFIX + BATCH * TAIL)


def slots(model, chip, kernels="pallas"):
    """(compiled program, bytes of the slots of a layer) of the deltas of four sites at one token per row."""
    spec = on(chip)
    inner = model.heads * model.size
    sites = [(model.width, inner), (model.width, model.groups * model.size), (model.width, model.mlp_width)]
    sites.append((model.mlp_width, model.width))
    arrays = [
        (
            spec((BATCH, 1, i), jnp.bfloat16),
            spec((LAYERS, SLOTS, RANK, i), jnp.bfloat16),
            spec((LAYERS, SLOTS, RANK, f), jnp.bfloat16),
        )
        for i, f in sites
    ]

    def deltas(arrays, scale, slot_ids, layer):
        return [slot_delta(*site, scale, slot_ids, layer=layer, kernels=kernels) for site in arrays]

    told = spec((SLOTS,), jnp.float32), spec((BATCH,), jnp.int32), spec((), jnp.int32)
    return jax.jit(deltas).lower(arrays, *told).compile(), sum(2 * SLOTS * RANK * (i + f) for i, f in sites)


KERNELS = {
    "attention_decode": lambda model, *args: attention(model, 1, *args),
    "attention_block": lambda model, *args: attention(model, BLOCK, *args),
    "slot_lora": slots,
}


@functools.cache
def topology(chip):
    return topologies.get_topology_desc(CHIPS[chip][0], "tpu")


def on(chip):
    """What makes the description of an array that lies on the first chip."""
    place = jax.sharding.SingleDeviceSharding(topology(chip).devices[0])
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)


@pytest.fixture
def compiler(monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install memjax[tpu]")
    for name, value in HOST.items():
        if name not in os.environ:
            monkeypatch.setenv(name, value)


def test_the_list_names_every_kernel_model_and_chip():
    assert sorted(IDS) == sorted(f"{k}/{m}/{c}" for k in KERNELS for m in MODELS for c in CHIPS)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", IDS)
def test_compiles_without_a_copy_of_what_it_reads(name, compiler):
    kernel, model, chip = name.split("/")
    program, held = KERNELS[kernel](MODELS[model], chip)
    calls = program.as_text().count('custom_call_target="tpu_custom_call"')
    # The tokens' own keys, fewer than 16 of a row, are XLA's.
    assert calls == {"attention_decode": 2, "attention_block": 3, "slot_lora": 4}[kernel]
    # Of 16 tokens the partial results of three segments, in float32, are most of what is held for a while.
    assert program.memory_analysis().temp_size_in_bytes < held * (0.75 if kernel == "attention_block" else 0.25)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("kernel", ["attention_decode", "slot_lora"])
def test_the_compiler_expects_xla_to_move_more(kernel, compiler):
    model = MODELS["llama-3.1-8b"]
    moved = [KERNELS[kernel](model, "v5e", kernels)[0].cost_analysis()["bytes accessed"] for kernels in ("pallas", "xla")]
    assert moved[0] < moved[1] / 1.5


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_vector_memory_is_enough(model, chip):
    info = pltpu.get_tpu_info_for_chip(getattr(pltpu.ChipVersion, CHIPS[chip][1]), 1)
    taken = []
    for length in (1, BLOCK):
        for held, shared in ((PREFIX, True), (TAIL, False)):
            shape = attention_sizes.Shape(
                BATCH, length, model.heads, model.groups, held, model.size, jnp.bfloat16, jnp.bfloat16, shared
            )
            taken.append(attention_sizes.vmem_bytes(shape, attention_sizes.block_sizes(shape)))
    for size_in, size_out in ((model.width, model.mlp_width), (model.mlp_width, model.width)):
        shape = slot_sizes.Shape(1, size_in, size_out, RANK, jnp.bfloat16, jnp.bfloat16)
        taken.append(slot_sizes.vmem_bytes(shape, slot_sizes.block_size(shape)))
    assert max(taken) <= VMEM_BUDGET < info.vmem_capacity_bytes
