"""Every family against `transformers`: logits, and greedy generation through the cache past the sliding window."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models.config import ARCHITECTURES, ModelConfig
from memjax.models.decoder import forward, make_model, unembed
from memjax.models.generate import Sampling, generate
from memjax.models.weights import load_folder
from tests.models import golden

PROMPT = 12  # tokens that make_models.py continues
# What a golden must be able to tell apart: (golden, field of the config, a wrong value)
MUTANTS = [
    ("gemma2", "attn_softcap", None),
    ("gemma2", "final_softcap", None),
    ("gemma2", "norm_offset", 0.0),
    ("gemma2", "embed_scale", 1.0),
    ("gemma2", "query_scale", 0.25),
    ("gemma2", "local", (False, True, False, True)),
    ("gemma3", "rope_local_theta", 1e6),
    ("gemma3", "activation", "silu"),
    ("gemma3_linear_rope", "rope_scaling", None),
    ("llama3_rope", "rope_scaling", None),
    ("mistral", "window", 9),
    ("qwen2_window", "local", (True, False)),
    ("llama_untied", "norm_eps", 1e-3),
]


def logits_of(config: ModelConfig, params: dict, ids: np.ndarray) -> np.ndarray:
    model = make_model(config)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)

    # Optimised as where the package is used, not as other tests are: LLVM's plainest code rounds differently, to 2.4e-5.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def run(params, ids, positions):
        return unembed(model, params, forward(model, params, ids, positions).hidden)

    return np.asarray(run(params, ids, positions))


@pytest.mark.parametrize("name", golden.NAMES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    data = golden.read(name)
    loaded = load_folder(golden.write_folder(tmp_path, data), np.float32)
    logits = logits_of(loaded.config, loaded.params, data["ids"])
    np.testing.assert_allclose(logits, data["logits"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(logits.argmax(-1), data["logits"].argmax(-1))


@pytest.mark.parametrize("name", golden.NAMES)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    data = golden.read(name)
    loaded = load_folder(golden.write_folder(tmp_path, data), np.float32)
    params = jax.tree.map(jnp.asarray, loaded.params)
    prompts = [row[:PROMPT].tolist() for row in data["ids"]]
    tokens = generate(make_model(loaded.config), params, prompts, [], Sampling(max_tokens=data["greedy"].shape[1]))
    assert tokens == data["greedy"].tolist()


@pytest.mark.parametrize(("name", "field", "wrong"), MUTANTS)
def test_goldens_notice_a_wrong_trait(name: str, field: str, wrong: object, tmp_path: Path) -> None:
    data = golden.read(name)
    loaded = load_folder(golden.write_folder(tmp_path, data), np.float32)
    config = dataclasses.replace(loaded.config, **{field: wrong})
    assert np.abs(logits_of(config, loaded.params, data["ids"]) - data["logits"]).max() > 1e-3


def test_every_family_has_a_golden() -> None:
    configs = [json.loads(str(golden.read(name)["config"])) for name in golden.NAMES]
    assert {ModelConfig.from_hf(config).family for config in configs} == set(ARCHITECTURES.values())
