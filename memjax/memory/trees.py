"""Trees of learned arrays as named tensors and back: what files of trained networks check before anything reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.errors import ArtefactError
from memjax.memory.raw import listed


def named(tree: Any) -> dict[str, Any]:
    """{path: leaf}, in the order of the tree's leaves; a path's parts stand behind one another with /."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """ArtefactError, naming the tensors, where a value is not finite."""
    if bad := [name for name, x in tensors.items() if not np.isfinite(x.astype(np.float32)).all()]:
        raise ArtefactError(f"{where} has values that are not finite in {listed(bad)}; train it again")


def fitted(tensors: Mapping[str, np.ndarray], abstract: Any, where: str) -> Any:
    """The tensors as a tree like `abstract`, float32; ArtefactError where names, shapes or values do not fit."""
    shapes = {name: leaf.shape for name, leaf in named(abstract).items()}
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or unexpected:
        raise ArtefactError(
            f"{where} does not fit its description: missing {listed(missing)}; unexpected {listed(unexpected)}"
        )
    wrong = [f"{n} is {list(tensors[n].shape)}, not {list(s)}" for n, s in shapes.items() if tensors[n].shape != s]
    if wrong:
        raise ArtefactError(f"{where} does not fit its description and this base: {listed(wrong)}")
    check_finite(tensors, where)
    leaves = [jnp.asarray(tensors[name], jnp.float32) for name in shapes]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
