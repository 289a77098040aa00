"""Writes a memory in one or several processes: `python -m tests.write.hosts_job HOW OUT`; see `memjax.distributed`.

The mesh is that of MEMJAX_MESH. The first process leaves what it wrote in OUT, an .npz, with what the probe tells.
"""

import os
import sys

import jax
import numpy as np

from memjax.bank.add import write_text
from memjax.distributed import joined
from memjax.evaluate.world import documents
from memjax.models.base import load
from memjax.sharding import fetch, mesh_from
from memjax.write.compile import CompileConfig
from memjax.write.distill import DistillConfig
from memjax.write.prompts import prompt_style

RECIPES = {
    "distill": DistillConfig(
        rank=4, asked=64, reworded=16, steps=6, rows=4, general=8, keep_batch=2, trust=0.0, learning_rate=1e-3, turned=0
    ),
    "compile": CompileConfig(
        rank=4,
        ratio=8.0,
        steps=6,
        asked=64,
        asks=4,
        asked_share=0.5,
        windows=2,
        queries=2,
        probes=4,
        written="within",
        scope="buffer",
        layout="spread",
    ),
}


def main() -> None:
    how, out = sys.argv[1:]
    with joined() as first:
        base = load("tiny", mesh=mesh_from(os.environ))
        style = prompt_style(base.tokenizer.prompt_style)
        text = documents("validation", 7, 1, 120)[0].text
        written, probes = write_text(base, text, style, RECIPES[how])
        arrays = fetch(dict(enumerate(jax.tree.leaves(written.artefact))))
    if first:
        told = [row["kl"] for part in ("held_out", "general") for row in probes[part]]
        np.savez(out, probes=told, **{str(name): x for name, x in arrays.items()})


if __name__ == "__main__":
    main()
