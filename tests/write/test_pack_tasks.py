"""Packed tasks: what each task gives alone, whatever lies beside it and however much room there is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.models.buffers import read_buffer
from memjax.models.decoder import forward, unembed
from memjax.write import compile as c
from memjax.write import pack_tasks as p
from memjax.write import tasks as t
from memjax.write.packing import first_fit
from memjax.write.prompts import prompt_style
from memjax.write.reading import split_prompts
from tests.support import small_base

STYLE = prompt_style("plain")
TEXT = "Tavin lives in Orvale. The harp of Halvic is old. Mira keeps the oven. " * 5
CONFIG = c.CompileConfig(
    ratio=8, rank=2, windows=2, queries=2, general=6, window=12, cue=4, answer_tokens=3, top_k=8, scope="buffer"
)


@pytest.fixture(scope="module")
def step():
    """(base, compiler, slots, tasks by kind)."""
    base = small_base()
    split = split_prompts(base.tokenizer, STYLE, TEXT)
    compiler = c.make_compiler(base, split, CONFIG)
    k, v = c.write_slots(compiler, c.fresh_tree(compiler, CONFIG))
    tasks, _ = t.make_tasks(base, split, CONFIG)
    return base, compiler, (k, v), {kind: some.take(np.arange(3)) for kind, some in tasks.items()}


def alone(base, compiler, slots, tasks, i):
    """The mean divergence of one task's answer tokens, read by itself with the logits of all its tokens."""
    buffer = c.make_buffer(compiler, *slots)
    segment, following = read_buffer(base.config, buffer)
    length = int((tasks.offset[i] >= 0).sum())
    ids, places = jnp.asarray(tasks.inputs[i, :length])[None], following + jnp.arange(length)[None]
    hidden = forward(base.model, base.params, ids, places, segments=[compiler.header, segment]).hidden
    logp = jax.nn.log_softmax(unembed(base.model, base.params, hidden)[0], axis=-1)
    each = []
    for at in np.flatnonzero(tasks.weight[i]):
        p_, q = np.exp(tasks.logp[i, at], dtype=np.float64), np.exp(np.asarray(logp[at, tasks.target[i, at]], np.float64))
        rest = (max(1 - p_.sum(), 1e-6), max(1 - q.sum(), 1e-6))
        each.append((p_ * np.log(p_ / q)).sum() + rest[0] * np.log(rest[0] / rest[1]))
    return np.mean(each)


def test_packed_losses_are_those_of_each_task_alone(step):
    base, compiler, slots, tasks = step
    packed = p.pack_tasks(tasks)
    assert len(packed.inputs) < sum(len(some.inputs) for some in tasks.values())
    loss, found = c._losses(compiler, *slots, packed)
    for kind, some in tasks.items():
        wanted = np.mean([alone(base, compiler, slots, some, i) for i in range(3)])
        assert float(found[f"kl_{kind}"]) == pytest.approx(wanted, rel=2e-3)
    assert float(loss) == pytest.approx(0.5 * sum(map(float, found.values())), rel=1e-5)


def test_more_room_changes_no_loss_and_no_gradient(step):
    _, compiler, (k, v), tasks = step
    least = p.room_for([tasks])
    more = p.Room(least.rows + 3, least.width + 32, least.answers + 7)
    read = jax.value_and_grad(lambda k, v, packed: c._losses(compiler, k, v, packed)[0], argnums=(0, 1))
    (one, grads), (other, same) = (read(k, v, p.pack_tasks(tasks, room)) for room in (least, more))
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    for got, wanted in zip(same, grads, strict=True):
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_room_holds_every_step_and_sequences_lie_whole_and_apart(step):
    tasks = step[3]
    few = {kind: some.take(np.arange(1)) for kind, some in tasks.items()}
    assert p.room_for([few, tasks]) == p.room_for([tasks]) >= p.room_for([few])
    packed = p.pack_tasks(few, p.room_for([tasks]))
    assert {kind: float(share.sum()) for kind, share in packed.share.items()} == pytest.approx({"recon": 1.0, "query": 1.0})
    lengths = [5, 9, 3, 9, 1]
    taken = set()
    for (row, begin, length), wanted in zip(first_fit(lengths, 10), lengths, strict=True):
        assert length == wanted
        assert begin + length <= 10
        cells = {(row, begin + i) for i in range(length)}
        assert not cells & taken
        taken |= cells
    assert len({row for row, _ in taken}) == 3
