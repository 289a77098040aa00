"""What a latent memory is trained on: that it gives back what attention lost with the tokens that a policy evicted.

Mean of |o_full - o_read|^2 over what evicting alone leaves, |o_full - o_kept|^2, which is one less the share of the loss
that is explained, layer by layer on frozen inputs (arXiv 2605.25475, section 4, equation 8, normalised).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax.evict.compact import layer_traits, split
from memjax.evict.indexer import index_keys
from memjax.evict.latent import absorb, state_of
from memjax.evict.learned import Learned
from memjax.evict.lesson import Lessons, study
from memjax.evict.policies import Policy, View
from memjax.kernels.segment_attention import Segment, attend
from memjax.memory.latent import Latent, Residual, Rule, read_latent
from memjax.models.decoder import Model, Params, rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evicting:
    """What the loss reads beside the batch and does not train: the frozen base, and the policy with what it reads.

    removed float32 [2]: the shares of each text that are removed are drawn between these. events: so many times, from the
    text's beginning to its end, a part of what is removed is written.
    """

    params: Params
    learned: Learned
    removed: jax.Array
    model: Model = dataclasses.field(metadata={"static": True})
    policy: Policy = dataclasses.field(metadata={"static": True})
    rule: Rule = dataclasses.field(metadata={"static": True})
    events: int = dataclasses.field(default=4, metadata={"static": True})


def latent_loss(
    evicting: Evicting, trained: Params, lessons: Lessons, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over layers of the share that is not explained; metrics: `explained`; `strength`, how much of the kept output's
    norm is added; `gate`, the mean of the gates' own part. A gate that closes, or a strength that fades, while nothing is
    explained, is the collapse that gated residuals are known for."""
    low, high = evicting.removed
    share = jax.random.uniform(key, (lessons["at"].shape[0],), minval=low, maxval=high)
    part, strength = explained(evicting, trained, lessons, share)
    left = (1 - part).mean()
    return left, {"explained": 1 - left, "strength": strength.mean(), "gate": jax.nn.sigmoid(trained["gate"]).mean()}


def explained(evicting: Evicting, trained: Params, lessons: Lessons, removed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the share of the attention output's loss that the memory explains, the norm of what it adds over the kept output's),
    float32 [L], at shares removed [B] of each text: 1 is all of it, 0 what evicting alone gives, below that it harms."""
    model, config = evicting.model, evicting.model.config
    read = study(model, evicting.params, lessons, ("x", "q_raw", "q"), ("q", "k", "v", "attn_out"))
    reach, frequency = layer_traits(config)
    at = lessons["at"]
    length = at.max(axis=1) + 1
    keep = jnp.maximum(jnp.floor((1 - removed) * length), 1).astype(jnp.int32)
    last = min(evicting.policy.queries or 1, at.shape[1])
    position = jnp.broadcast_to(at[:, None], (at.shape[0], config.num_kv_heads, at.shape[1]))
    own = lessons["owner"][:, :, None] == lessons["owner"][:, None]
    empty = jax.tree.map(lambda x: x[0], state_of(config, evicting.rule, at.shape[0]))

    def layer(_: None, xs: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        trained, indexer, text, behind, norm, reach, frequency, place = xs
        h = rms_norm(text["x"], norm, config)
        view = View(
            text["k"], text["v"], position, text["q"][:, -last:], text["q_raw"][:, -last:], at[:, -last:], length,
            keep, jnp.minimum(evicting.policy.queries or 0, jnp.maximum(keep // 2, 1)), reach, frequency, place,
            scale=config.query_scale, softcap=config.attn_softcap, learned=indexer,
            index=None if indexer is None else index_keys(indexer, h), h=h[:, -last:],
        )  # fmt: skip
        score = evicting.policy.score(view).astype(jnp.float32)
        per_head = jnp.broadcast_to(keep[:, None], position.shape[:2])
        kept = split(score, view.valid, per_head, at.shape[1]).kept
        segments = [
            Segment(text["k"], text["v"], jnp.where(kept, position, -1).swapaxes(1, 2)),
            Segment(behind["k"], behind["v"], lessons["places"], own),
        ]
        scale, softcap = config.query_scale, config.attn_softcap
        told = (behind["q"], lessons["places"], segments)
        out, lse = attend(*told, scale=scale, softcap=softcap, window=reach, kernels="xla")
        latent = _written(evicting, trained, empty, text, view.valid & ~kept, at, length)
        got = read_latent(Residual(latent, trained, evicting.rule), behind["q"], out, lse, scale=scale, softcap=softcap)
        asks = lessons["asks"][:, :, None, None]
        square = lambda x: jnp.where(asks, jnp.square(x), 0.0).sum()
        tiny = jnp.finfo(jnp.float32).tiny
        share = 1 - square(behind["attn_out"] - got) / jnp.maximum(square(behind["attn_out"] - out), tiny)
        # Told, not learned: no gradient, which a root has none of at zero.
        added, whole = jax.lax.stop_gradient((square(got - out), square(out)))
        return None, (share, jnp.sqrt(added / jnp.maximum(whole, tiny)))

    places = jnp.arange(config.num_layers, dtype=jnp.int32)
    indexer = evicting.learned.indexer if evicting.policy.judged else None
    norm = evicting.params["layers"]["attn_norm"]
    xs = (trained, indexer, read.text, read.behind, norm, jnp.asarray(reach), jnp.asarray(frequency), places)
    return jax.lax.scan(layer, None, xs)[1]


def _written(
    evicting: Evicting,
    trained: Params,
    latent: Latent,
    text: dict[str, jax.Array],
    lost: jax.Array,
    at: jax.Array,
    length: jax.Array,
) -> Latent:
    """The state of one layer after the text's events."""
    event = at * evicting.events // jnp.maximum(length, 1)[:, None]
    for number in range(evicting.events):
        now = lost & (event == number)[:, None]
        latent = absorb(evicting.rule, trained, latent, text["k"], text["v"], now, evicting.model.config.query_scale)
    return latent
