"""A base: the frozen language model with its tokenizer and identity, loaded by path or name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.models.config import ModelConfig
from memjax.models.decoder import Model, Params, make_model, param_shardings
from memjax.models.tokenizer import Tokenizer
from memjax.sharding import RULES, Rules, put

DEFAULT_BASE = "smollm2-135m"


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen language model. `id` is the hash of its weights; `name` is only what a person called it."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer
    id: str
    name: str

    @property
    def model(self) -> Model:
        """The static half, for `jax.jit`."""
        return Model(self.config, self.graphdef)


def default_dtype() -> jnp.dtype:
    """float32 on CPU, where bfloat16 matmuls are slow, and bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load(
    path_or_name: str | Path = DEFAULT_BASE,
    dtype: jnp.dtype | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
) -> Base:
    """The base at a path (Hugging Face folder or GGUF file), of a hub name, or embedded under a name.

    dtype: `default_dtype` unless given. On a mesh each device is handed its part of the parameters and never the whole,
    which may not fit it. Raises FetchError where nothing is found, WeightsError where the weights do not fit
    the config.
    """
    from memjax.models.fetch import resolve
    from memjax.models.weights import load_folder

    folder = resolve(path_or_name)
    loaded = load_folder(folder, dtype or default_dtype())
    model = make_model(loaded.config)
    if mesh is None:
        params = jax.tree.map(jnp.asarray, loaded.params)
    else:
        params = put(loaded.params, param_shardings(loaded.config, mesh, rules))
    return Base(model.config, model.graphdef, params, Tokenizer.from_folder(folder), loaded.base_id, str(path_or_name))
