"""A base from wherever it is: a model folder, a file or a name, or the checkpoints of a run that trains one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from memjax.errors import WeightsError
from memjax.ids import base_id
from memjax.models.base import DEFAULT_BASE, Base, default_dtype
from memjax.models.base import load as load_weights
from memjax.models.config import ModelConfig
from memjax.models.decoder import abstract_params, make_model, param_shardings
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights.export import hf_tensors
from memjax.models.weights.hf import read_config
from memjax.sharding import RULES, Rules, fetch, put
from memjax.train.checkpoint import FOLDER, find_step, is_complete, restore


def load(
    path_or_name: str | Path = DEFAULT_BASE,
    dtype: jnp.dtype | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
) -> Base:
    """The base of this path or name; a run's folder, or one of its checkpoints, means the newest complete checkpoint.

    A run's folder holds config.json and the tokenizer beside checkpoints/, as `memjax train base` leaves it. On a mesh the
    parameters lie where `memjax.sharding` says, by `rules`, and so does all that is read and trained with them. The id is
    that of the same weights in a model folder. dtype as in `models.base.load`. Raises FetchError, WeightsError or
    TrainingError where nothing fits.
    """
    path = Path(path_or_name).expanduser()
    run = path.parent.parent if path.parent.name == FOLDER and is_complete(path) else path
    if not (run / FOLDER).is_dir():
        return load_weights(path_or_name, dtype, mesh=mesh, rules=rules)
    step = find_step(path)
    try:
        config = ModelConfig.from_hf(read_config(run))
    except KeyError as error:
        raise WeightsError(f"{run / 'config.json'} lacks {error.args[0]!r}") from None
    abstract = abstract_params(config)
    if mesh is None:
        params = restore(step)
    else:
        places = param_shardings(config, mesh, rules)
        aims = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), abstract, places)
        params = restore(step, target=aims)
    wanted, found = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (abstract, params))
    if wanted != found:
        raise WeightsError(f"{step} does not hold the parameters that {run / 'config.json'} describes; it is another run's")
    identity = base_id(hf_tensors(config, fetch(params)))
    model = make_model(config)
    params = jax.tree.map(lambda x: x.astype(dtype or default_dtype()), params)
    return Base(model.config, model.graphdef, params, Tokenizer.from_folder(run), identity, str(path_or_name))


def place(base: Base, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Base:
    """The same base with its parameters on a mesh."""
    return dataclasses.replace(base, params=put(base.params, param_shardings(base.config, mesh, rules)))
