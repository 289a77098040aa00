"""A base from wherever it is: a model folder, a file or a name, or the checkpoints of a run that trains one."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from memjax.errors import WeightsError
from memjax.ids import base_id
from memjax.models.base import DEFAULT_BASE, Base, default_dtype
from memjax.models.base import load as load_weights
from memjax.models.config import ModelConfig
from memjax.models.decoder import abstract_params, make_model
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights.export import hf_tensors
from memjax.models.weights.hf import read_config
from memjax.train.checkpoint import FOLDER, Rule, find_step, is_complete, restore


def load(
    path_or_name: str | Path = DEFAULT_BASE,
    dtype: jnp.dtype | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rule: Rule | None = None,
) -> Base:
    """The base of this path or name; a run's folder, or one of its checkpoints, means the newest complete checkpoint.

    A run's folder holds config.json and the tokenizer beside checkpoints/, as `memjax train base` leaves it. `mesh` and
    `rule` place the parameters of a checkpoint (see `restore`). The id is that of the same weights in a model folder.
    dtype as in `models.base.load`. Raises FetchError, WeightsError or TrainingError where nothing fits.
    """
    path = Path(path_or_name).expanduser()
    run = path.parent.parent if path.parent.name == FOLDER and is_complete(path) else path
    if not (run / FOLDER).is_dir():
        return load_weights(path_or_name, dtype)
    step = find_step(path)
    try:
        config = ModelConfig.from_hf(read_config(run))
    except KeyError as error:
        raise WeightsError(f"{run / 'config.json'} lacks {error.args[0]!r}") from None
    params = restore(step, mesh=mesh, shardings=rule)
    wanted, found = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (abstract_params(config), params))
    if wanted != found:
        raise WeightsError(f"{step} does not hold the parameters that {run / 'config.json'} describes; it is another run's")
    identity = base_id(hf_tensors(config, params))
    model = make_model(config)
    params = jax.tree.map(lambda x: x.astype(dtype or default_dtype()), params)
    return Base(model.config, model.graphdef, params, Tokenizer.from_folder(run), identity, str(path_or_name))
