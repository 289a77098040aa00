"""A training job of one or several processes: `python hosts_job.py OUT RESULT KILL_AT`; see `memjax.distributed`.

Process 1 kills itself with SIGKILL right after step KILL_AT (0: nobody does). The mesh is all devices, rows on one half of
the axes and parameters on the other, and every process loads the rows that its devices need.
"""

import os
import signal
import sys

import jax
import numpy as np

from memjax.distributed import joined
from memjax.sharding import MeshConfig, build_mesh, fetch, row_share
from memjax.train.data import DataConfig, Generated, packed
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig
from tests.train.job import example, loss

STEPS = 8


def main() -> None:
    out, result, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with joined() as first:
        mesh = build_mesh(MeshConfig(data=2, fsdp=0))
        rng = np.random.default_rng(3)
        shapes = {"embed": (32, 16), "places": (16, 16), "head": (16, 32)}
        whole = jax.NamedSharding(mesh, jax.P())
        start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        params = {name: jax.make_array_from_callback(x.shape, whole, lambda i, x=x: x[i]) for name, x in start.items()}
        host, hosts = row_share(mesh)
        data = DataConfig(batch=4, length=16, window=3, seed=5)
        batches = packed(Generated(example, 200, seed=1), data, host=host, hosts=hosts)

        def on_log(step, line):
            if step == kill_at and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        fitted = fit(
            loss,
            params,
            batches,
            FitConfig(
                steps=STEPS, log_every=1, save_every=2, plot=False, optimizer=OptimizerConfig(learning_rate=1e-2, warmup=2)
            ),
            out=out,
            resume=True,
            on_log=on_log,
            progress=False,
            batch_sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp"))),
        )
        trained = fetch(fitted.params)
    if first:
        np.savez(result, **trained)


if __name__ == "__main__":
    main()
