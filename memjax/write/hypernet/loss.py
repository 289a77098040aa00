"""What a hypernetwork is trained on: the frozen base, with the adapters it emits, says what the teacher says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Slots
from memjax.models.decoder import Model, Params, forward, unembed
from memjax.write.hypernet.encode import combine, context_features
from memjax.write.hypernet.network import HyperConfig, chunk_factors

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reader:
    """What the loss reads beside the batch, and is not trained: the frozen base, the weight of L1, chunks in a row."""

    params: Params
    l1: jax.Array
    model: Model = dataclasses.field(metadata={"static": True})
    config: HyperConfig = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(default=False, metadata={"static": True})


def write_documents(reader: Reader, trained: Params, batch: Batch) -> Slots:
    """The adapters of a batch's documents, group after group, as slots; batch as in `batches.make_batch`."""
    groups, rows, width = batch["tokens"].shape
    flat = lambda name: batch[name].reshape(groups * rows, width)
    features = context_features(
        reader.config, reader.model, reader.params, flat("tokens"), flat("positions"), flat("owner")
    )  # fmt: skip
    slots = reader.slots
    factors = chunk_factors(reader.config, reader.model.config, trained, features, flat("owner"), slots)
    # Group by group, for a group's chunks lie on one device.
    apart = jax.tree.map(lambda x: x.reshape(x.shape[0], groups, rows * slots, *x.shape[2:]), factors)
    places = Slots(1, 1, 0)  # type: ignore[arg-type]  # where groups stand in what is combined
    made = jax.vmap(partial(combine, reader.config, trained), in_axes=(1, 0), out_axes=places)(apart, batch["index"])
    join = lambda x, at: x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])
    a, b = ({site: join(x, 1) for site, x in factors.items()} for factors in (made.a, made.b))
    return Slots(a, b, join(made.scale, 0))


def read_answers(reader: Reader, slots: Slots, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(loss [U, Q] of each question, whether its whole answer is right bool [U, Q]) of the base with the adapters.

    The loss is the mean over the answer's tokens of - sum over the teacher's classes of exp(logp) log q, with q over the
    whole vocabulary: of the 16 largest probabilities neither renormalised nor completed this is their KL but for a
    constant and the tail, and of a single class cross-entropy (arXiv 2602.15902, section 3). What is read with the adapter
    off is read once and has no gradient; logits are taken where answer tokens are predicted, and nowhere else.
    """
    groups, questions = batch["document"].shape
    flat = lambda name: batch[name].reshape(groups * questions, *batch[name].shape[2:])
    documents = slots.scale.shape[0] // groups
    ids = jnp.maximum(batch["document"], 0) + jnp.arange(groups, dtype=jnp.int32)[:, None] * documents
    before = []
    if "before" in batch:
        places = flat("before_places")
        read = forward(reader.model, reader.params, flat("before"), places, taps=("k", "v")).taps
        before = [Segment(jax.lax.stop_gradient(read["k"]), jax.lax.stop_gradient(read["v"]), places)]
    out = forward(
        reader.model,
        reader.params,
        flat("inputs"),
        flat("places"),
        segments=before,
        slots=slots,
        slot_ids=ids.reshape(-1),
        remat=reader.remat,
    )
    hidden = jnp.take_along_axis(out.hidden, flat("at")[..., None], axis=1)
    logits = unembed(reader.model, reader.params, hidden)
    target, weight = flat("target"), flat("weight")
    logq = jnp.take_along_axis(logits, target, axis=-1) - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    each = -(jnp.exp(flat("logp")) * logq).sum(axis=-1)
    mean = (each * weight).sum(axis=-1) / jnp.maximum(weight.sum(axis=-1), 1.0)
    right = ((logits.argmax(-1) == target[..., 0]) | (weight == 0)).all(axis=-1)
    return mean.reshape(groups, questions), right.reshape(groups, questions)


def document_mean(each: jax.Array, document: jax.Array, documents: int) -> tuple[jax.Array, jax.Array]:
    """(mean over documents of the mean over each one's questions, how many documents ask anything), float32.

    each float32, document int32 [U, Q]: losses of questions, and whose they are in their group, -1 for none.
    """
    owned = (document[..., None] == jnp.arange(documents)).astype(jnp.float32)  # [U, Q, G]
    asked = owned.sum(axis=1)
    per_document = jnp.einsum("uq,uqg->ug", each, owned) / jnp.maximum(asked, 1.0)
    count = (asked > 0).sum().astype(jnp.float32)
    return per_document.sum() / jnp.maximum(count, 1.0), count


def l1_of(slots: Slots, used: jax.Array, chunks: jax.Array, rank: int) -> jax.Array:
    """The mean over sites of mean |A| + mean |B| of the combined adapters, bias rows included, per document used.

    used bool, chunks int32 [G]. The mean runs over the rank of the longest document used, as in the reference, not over
    the zero rows that make shapes equal.
    """
    used = used.astype(jnp.float32)
    longest = (jnp.where(used > 0, chunks, 0).max() + 1) * rank
    count = jnp.maximum(used.sum(), 1.0)
    total = jnp.float32(0.0)
    for site in slots.a:
        for rows in (slots.a[site], slots.b[site]):
            layers, _, _, size = rows.shape
            total += (jnp.abs(rows) * used[None, :, None, None]).sum() / (layers * longest * size)
    return total / (len(slots.a) * count)


def hyper_loss(reader: Reader, trained: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The answers' loss per document + l1 times `l1_of`; metrics: both, `right` (the share of exact answers that are),
    and `weight`, the documents, by which microbatches are weighed.
    """
    slots = write_documents(reader, trained, batch)
    each, right = read_answers(reader, slots, batch)
    documents = batch["index"].shape[1]
    answers, count = document_mean(each, batch["document"], documents)
    asked = (batch["document"][..., None] == jnp.arange(documents)).any(axis=1)
    small = l1_of(slots, asked.reshape(-1), (batch["index"] >= 0).sum(axis=-1).reshape(-1), reader.config.rank)
    exact = batch["exact"] & (batch["document"] >= 0)
    share = (right & exact).sum() / jnp.maximum(exact.sum(), 1)
    return answers + reader.l1 * small, {"answers": answers, "l1": small, "right": share, "weight": count}
