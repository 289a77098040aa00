"""What compiling and reading a buffer cost, against the plain ways: one masked sequence, and the text in the prompt."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.bench import timing
from memjax.bench.timing import SMOLLM2_SHAPE, in_turn
from memjax.kernels.segment_attention import Segment
from memjax.memory.adapter import Adapter, as_slots
from memjax.models.buffers import buffer_prefix
from memjax.models.config import ModelConfig
from memjax.models.decoder import embed, forward, init_params, make_model, unembed
from memjax.models.generate import Sampling, generate, read_prefix
from memjax.write.compile import Compiler, assemble, compile_loss, fresh_tree
from memjax.write.compile_config import CompileConfig
from memjax.write.distill import divergence
from memjax.write.pack_tasks import PackedTasks, pack_tasks
from memjax.write.tasks import Tasks

HEADER = 4  # tokens of the prompt before the context
KIND = "recon"  # what all tasks of a measured step count as


def step_speedup(
    config: ModelConfig = SMOLLM2_SHAPE,
    tokens: int = 1024,
    ratio: float = 16.0,
    rows: int = 8,
    task: int = 96,
    times: int = 9,
    seed: int = 0,
) -> dict[str, float]:
    """{step_speedup, step_seconds/masked, step_seconds/cached}: loss and gradients of one masked sequence over those of
    two passes with the context's cache, the adapter on the slots alone in both.

    tokens: of the context, which a slot stands for `ratio` of; a step has `rows` tasks of `task` tokens. The masked
    sequence holds the context once and all tasks behind it, which is the cheapest way to write it in one pass.
    """
    compiler, trained, tasks = random_step(config, tokens, ratio, rows, task, seed)
    key = jax.random.key(seed)
    losses = {"masked": masked_loss, "cached": compile_loss}
    steps = {name: jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True)) for name, loss in losses.items()}

    def call(name: str) -> Any:
        return lambda: steps[name](compiler, trained, tasks, key)

    took = in_turn({name: call(name) for name in steps}, times)
    made = {f"step_seconds/{name}": float(np.median(seconds)) for name, seconds in took.items()}
    return {"step_speedup": timing.ratio(took["masked"], took["cached"]), **made}


def masked_loss(
    compiler: Compiler, trained: Any, tasks: PackedTasks, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`write.compile.compile_loss` of one kind of tasks from one masked sequence [H | C | B | x y | x y ...] with the row
    gate on B (arXiv 2602.21221 section 3, as one pass): what two passes are measured against, and must equal."""
    del key
    model, params = compiler.model, compiler.params
    arrays: Any = jax.tree.map(jnp.asarray, tasks)
    slots = (compiler.begin + compiler.slots_rate * trained["slots"]).astype(params["embed"].dtype)
    count = slots.shape[0]
    words = jnp.concatenate([jnp.zeros(compiler.length, jnp.int32), compiler.context])  # the header's ids are zeros here
    inputs = jnp.concatenate([embed(model, params, words), slots, embed(model, params, arrays.inputs.reshape(-1))])
    offset = arrays.offset.reshape(-1)
    behind = jnp.where(offset >= 0, compiler.following + offset, -1)
    at = jnp.concatenate([jnp.arange(compiler.length), compiler.context_at, compiler.written_at, behind])
    # -1 padding, 0 header, 1 context, 2 slots, 3 and on: one task each, which sees no other and no context.
    kinds = np.repeat([0, 1, 2], [compiler.length, len(compiler.context), count])
    part = jnp.concatenate([jnp.asarray(kinds), jnp.where(offset >= 0, 3 + arrays.owner.reshape(-1), -1)])
    seen = (part[None] < 3) & ~((part[:, None] >= 3) & (part[None] == 1)) | (part[:, None] == part[None])
    visible = jnp.asarray(np.tri(len(part), dtype=bool)) & seen & (at >= 0)[None]
    out = forward(
        model,
        params,
        inputs[None],
        at[None],
        visible=visible[None],
        slots=as_slots(Adapter(trained["a"], trained["b"], compiler.scale)),
        adapter_mask=(part == 2)[None],
    )
    logits = unembed(model, params, out.hidden[0, -offset.shape[0] :][arrays.at])
    logq = jnp.take_along_axis(logits, arrays.target, axis=-1)
    kl = divergence(arrays.logp, logq - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    loss = jnp.where(arrays.share[KIND] > 0, kl * arrays.share[KIND], 0.0).sum()
    return loss, {f"kl_{KIND}": loss}


def random_step(
    config: ModelConfig, tokens: int, ratio: float, rows: int, task: int, seed: int
) -> tuple[Compiler, dict[str, Any], PackedTasks]:
    """A step of compiling a random text with a random base: (what it reads, what it trains, its tasks)."""
    rng = np.random.default_rng(seed)
    model, params = make_model(config), init_params(config, jax.random.key(seed))
    context = rng.integers(0, config.vocab_size, tokens)
    header = read_prefix(model, params, [0] * HEADER).segment
    whole = read_prefix(model, params, [*[0] * HEADER, *context.tolist()]).segment
    own = Segment(whole.k, whole.v, jnp.where(whole.position >= HEADER, whole.position, -1))
    recipe = CompileConfig(ratio=ratio, scope="buffer")
    compiler = assemble(model, params, header, jnp.asarray(context, jnp.int32), tokens, own, HEADER, recipe)
    offset = np.tile(np.arange(task, dtype=np.int32), (rows, 1))
    logits = rng.normal(size=(rows, task, recipe.top_k)).astype(np.float32)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)) - 0.1
    target = rng.integers(0, config.vocab_size, (rows, task, 1)) + np.arange(recipe.top_k)
    weight = (offset >= task // 3).astype(np.float32)
    inputs = rng.integers(0, config.vocab_size, (rows, task)).astype(np.int32)
    made = Tasks(inputs, offset, (target % config.vocab_size).astype(np.int32), logp, weight)
    return compiler, fresh_tree(compiler, recipe), pack_tasks({KIND: made})


def first_token(
    config: ModelConfig = SMOLLM2_SHAPE,
    tokens: int = 1024,
    ratio: float = 16.0,
    question: int = 32,
    times: int = 9,
    seed: int = 0,
) -> dict[str, float]:
    """{ttft_ratio, first_token_seconds/buffer, first_token_seconds/prompt}: the first token of an answer to `question`
    tokens behind a buffer, over the same behind `tokens` of context in the prompt.

    The header is read already, and the buffer too, as they are where a bank serves them; the slots' values are random.
    """
    rng = np.random.default_rng(seed)
    model, params = make_model(config), init_params(config, jax.random.key(seed))
    header = read_prefix(model, params, [0] * HEADER)
    slots = math.ceil(tokens / ratio)
    shape = (config.num_layers, 1, slots, config.num_kv_heads, config.head_size)
    k, v = (jnp.asarray(rng.normal(size=shape), params["embed"].dtype) for _ in range(2))
    segment = Segment(k, v, HEADER + jnp.arange(slots)[None])
    buffer = buffer_prefix(header.segment, segment, HEADER + slots)
    context, tail = (rng.integers(0, config.vocab_size, count).tolist() for count in (tokens, question))
    one = Sampling(max_tokens=1)
    took = in_turn(
        {
            "buffer": lambda: generate(model, params, [tail], [], one, prefix=buffer),
            "prompt": lambda: generate(model, params, [[*context, *tail]], [], one, prefix=header),
        },
        times,
    )
    made = {f"first_token_seconds/{name}": float(np.median(seconds)) for name, seconds in took.items()}
    return {"ttft_ratio": timing.ratio(took["buffer"], took["prompt"]), **made}
