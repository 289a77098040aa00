"""A small training job run as its own process: `python job.py OUT RESULT KILL_AT` (KILL_AT 0: run to the end).

It kills itself with SIGKILL right after step KILL_AT, so nothing can be tidied up. Packed data, noise from the step key
and frequent checkpoints make every part of the state matter.
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from memjax.train.data import DataConfig, Generated, next_token_targets, packed
from memjax.train.fit import FitConfig, fit
from memjax.train.optimizer import OptimizerConfig

STEPS = 24


def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"tokens": rng.integers(1, 32, size=int(rng.integers(3, 15))).astype(np.int32)}


def loss(params, batch, key):
    targets, weights = next_token_targets(batch["tokens"], batch["segments"])
    x = params["embed"][batch["tokens"]] + params["places"][batch["positions"]]
    x = jnp.tanh(x + 0.1 * jax.random.normal(key, x.shape)) @ params["head"]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(x), targets[..., None], -1)[..., 0]
    return (nll * weights).sum() / weights.sum(), {"weight": weights.sum()}


def main() -> None:
    out, result, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    k = jax.random.split(jax.random.key(3), 3)
    params = {
        "embed": jax.random.normal(k[0], (32, 16)),
        "places": jax.random.normal(k[1], (16, 16)),
        "head": jax.random.normal(k[2], (16, 32)),
    }
    config = FitConfig(
        steps=STEPS, log_every=1, save_every=2, plot=False, accumulate=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup=3, weight_decay=0.1),
    )  # fmt: skip

    def on_log(step, line):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    batches = packed(Generated(example, 200, seed=1), DataConfig(batch=4, length=16, window=3, seed=5))
    fitted = fit(loss, params, batches, config, out=out, resume=True, on_log=on_log, progress=False)
    np.savez(result, **{name: np.asarray(value) for name, value in fitted.params.items()})


if __name__ == "__main__":
    main()
