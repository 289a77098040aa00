"""A parameter tree written as a Hugging Face folder is read back as it was, for every family's names."""

import json

import jax
import numpy as np
import pytest

from memjax.errors import WeightsError
from memjax.models.config import ModelConfig
from memjax.models.decoder import init_params
from memjax.models.weights import load_folder
from memjax.models.weights.export import hf_tensors, save_folder

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_saved_folder_is_read_back_as_it_was(tmp_path, architecture):
    hf = {**SHAPE, "architectures": [architecture], "model_type": FAMILIES[architecture], "sliding_window": None}
    if architecture.startswith("Gemma"):
        hf |= {"sliding_window": 32, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8}
    config = ModelConfig.from_hf(hf)
    params = jax.tree.map(lambda x: x + 0.5, init_params(config, jax.random.key(1)))
    save_folder(tmp_path, config, params, {"config.json": json.dumps(hf)})
    loaded = load_folder(tmp_path)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)


def test_a_tree_of_another_shape_is_refused(tmp_path):
    config = ModelConfig.from_hf({**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    params = init_params(config, jax.random.key(1))
    del params["layers"]["q"]
    with pytest.raises(WeightsError, match=r"layers\.q"):
        list(hf_tensors(config, params))
