"""A trained tiny base in a larger shape: the same function at first, with room to learn more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ConfigError
from memjax.models.config import ModelConfig
from memjax.models.decoder import Params, init_params

_WRITES = ("o", "down")  # what adds to the residual stream
_FIXED = ("family", "vocab_size", "head_size", "rope_theta", "norm_eps", "tied")


def grow(params: Params, old: ModelConfig, new: ModelConfig, key: jax.Array) -> Params:
    """Parameters of the shape `new` that compute what `params` of the shape `old` do, up to the norms' epsilon.

    What is new reads at random and writes nothing: residual dimensions hold zero, heads and MLP units have zero output
    rows, layers (spread evenly among the old ones) have zero outputs. RMS norms see the same sum of squares over more
    dimensions, so their weights shrink by sqrt(old width / new width). After Net2Net (arXiv 1511.05641), with zeros in the
    place of copies. Leaves are float32. Raises ConfigError where `new` is not at least as large everywhere, differs in
    `head_size`, vocabulary or kind, or groups its heads otherwise.
    """
    for name in _FIXED:
        if getattr(old, name) != getattr(new, name):
            raise ConfigError(f"{name} is {getattr(new, name)}, but {getattr(old, name)} in the base to grow from")
    for name in ("num_layers", "width", "mlp_width", "num_heads", "num_kv_heads"):
        if getattr(new, name) < getattr(old, name):
            raise ConfigError(
                f"{name} is {getattr(new, name)}, less than the {getattr(old, name)} of the base to grow from"
            )
    if old.num_heads * new.num_kv_heads != new.num_heads * old.num_kv_heads:
        raise ConfigError("heads per kv head differ from the base to grow from; keep their ratio")
    shrink = (old.width / new.width) ** 0.5
    kept = np.round(np.linspace(0, new.num_layers - 1, old.num_layers)).astype(int)

    def grown(path: tuple[Any, ...], fresh: jax.Array, trained: Any) -> jax.Array:
        name = path[-1].key
        made, held = np.array(fresh, np.float32), np.asarray(trained, np.float32)
        if name in (*_WRITES, "embed"):
            made[:] = 0.0
        elif "norm" in name:
            made *= shrink
            held = held * shrink
        else:
            made *= held.std() / made.std()
        inside: tuple[Any, ...] = tuple(slice(size) for size in held.shape)
        made[(kept, *inside[1:]) if path[0].key == "layers" else inside] = held
        return jnp.asarray(made)

    return jax.tree_util.tree_map_with_path(grown, init_params(new, key), params)


def start_from(folder: str | Path, new: ModelConfig, key: jax.Array) -> Params:
    """The base in a Hugging Face folder, grown to the shape `new`."""
    from memjax.models.weights import load_folder

    loaded = load_folder(Path(folder), jnp.dtype(jnp.float32))
    return grow(loaded.params, loaded.config, new, key)
