"""RULER under eviction: a context is read once, every policy cuts it to every share, the question reads what is left.

kvpress' protocol (arXiv 2605.25475, section 4 and its evaluation): the question comes after the cut unless it is said to
stand inside, later tokens go on from the text's true length, and what is generated is not evicted. Two tasks of the test
world stand beside RULER's, for bases that do not know its prompts: `needle` (`niah.py`) and `one_hop` (`qa.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from memjax import ids
from memjax.errors import ConfigError
from memjax.evaluate import niah, ruler
from memjax.evaluate.metrics import exact_match
from memjax.evaluate.qa import ANSWER_TOKENS, SPLIT, Scores, first_line, world_items
from memjax.evaluate.report import summarize
from memjax.evaluate.ruler_run import as_query
from memjax.evaluate.subjects import Query, query_tokens
from memjax.evict.compact import Budget, Kept
from memjax.evict.kvzip import KVzip, RepeatPrompt
from memjax.evict.learned import NOTHING, Learned
from memjax.evict.once import Dense, cut, read_dense
from memjax.evict.policies import LEARNED_POLICIES, POLICIES, Policy, policy_named
from memjax.kernels.segment_attention import Segment
from memjax.memory.latent import Rule
from memjax.memory.trees import named
from memjax.models.base import Base
from memjax.models.generate import Prefix, Sampling, bucket, check_window, common_prefix, generate, side_by_side
from memjax.write.prompts import UNLIKE, prompt_style

ROWS = 16  # contexts whose answers are decoded at once
HELD = 1 << 31  # bytes of keys, values and queries of whole contexts held at once
SOLVED = 0.85  # what a base must reach with its full cache, for a task to say anything about eviction
FULL = "full"
WORLD_TASKS = ("needle", "one_hop")
# What a learned policy has to beat (section 10 of the paper's tables), and which policies are learned.
HEURISTICS = ("streaming", "h2o", "snapkv", "tova", "pyramidkv", "adakv", "keydiff", "expected_attention")
LEARNED = ("indexmem", "indexer")
# Who evicts like a policy with a latent memory but without one: it is given the memory's bytes as tokens, for comparison.
BARE = {"indexmem": "indexer", "snapkv+latent": "snapkv"}
GAIN_AT = (0.75, 0.9)  # shares removed at which memory and tokens of as many bytes are compared
GAP = 0.05  # the least that eviction must cost a task, for a share of the loss to mean something


class Column(NamedTuple):
    """A policy at a share removed; more: keeps as many tokens more as take the bytes of the latent memory's state."""

    policy: Policy | KVzip
    share: float
    more: bool = False


@dataclass(frozen=True)
class EvictRuler:
    """policies, and the shares of the context that each removes; inside: the question is part of what is compressed;
    solved: a task counts for the means if the full cache reaches this; held: bytes of whole contexts at once; learned: what
    learned policies read."""

    policies: tuple[Policy | KVzip, ...]
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9)
    inside: bool = False
    solved: float = SOLVED
    held: int = HELD
    learned: Learned = NOTHING

    def told(self) -> dict[str, Any]:
        """What settings say of it, plain values: the policies and shares, and what was learned by its hash."""
        learned = {
            kind: ids.files_hash({name: ids.tensor_hash(np.asarray(x)) for name, x in named(params).items()})
            for kind, params in (("indexer", self.learned.indexer), ("latent", self.learned.memory))
            if params is not None
        }
        return {"policies": [policy.name for policy in self.policies], "shares": list(self.shares), **learned}

    @property
    def rivals(self) -> dict[str, Policy]:
        """{"policy+tokens": policy} for each policy that stands beside itself with a latent memory."""
        named = {policy.name: policy for policy in self.policies if isinstance(policy, Policy)}
        return {f"{bare}+tokens": named[bare] for own, bare in BARE.items() if own in named and bare in named}

    @property
    def columns(self) -> dict[str, Column]:
        """{"policy/share": what that is}."""
        made = {column(p.name, share): Column(p, share) for p in self.policies for share in self.shares}
        more = {column(name, s): Column(p, s, True) for name, p in self.rivals.items() for s in self.shares if s}
        return made | more


def column(policy: str, share: float) -> str:
    """What keys call a policy at a share removed, for example `snapkv/0.5`."""
    return f"{policy}/{share:g}"


def budget_of(share: float) -> Budget:
    """What is kept where `share` is removed, by its decimal digits."""
    return Budget(share=round(1 - share, 9))


def kept_of(config: EvictRuler, wanted: Column, length: int, base: Base) -> Budget:
    """What a column keeps of a context of `length`."""
    budget = budget_of(wanted.share)
    if not wanted.more:
        return budget
    return Budget(tokens=min(int(budget.of(length)) + math.ceil(state_tokens(config.learned.rule, base)), length))


def policies_of(text: str, indexer: bool = False, latent: bool = False) -> tuple[Policy | KVzip, ...]:
    """The policies named with commas, or `all`; also kvzip, which has no bounded cache.

    `all` are the learned ones too, as far as what they read is there: an indexer, a latent memory.

    ConfigError for a repeated name, InputError for an unknown one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return (*POLICIES, KVzip(), *(p for p in LEARNED_POLICIES if p.judged <= indexer and p.remembers <= latent))
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--policies {text}: name at least one policy and each only once, or write all")
    return tuple(KVzip() if name == KVzip.name else policy_named(name) for name in names)


def shares_of(text: str) -> tuple[float, ...]:
    """Shares removed, with commas, each in [0, 1) and larger than the one before. ConfigError."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] < 1:
        raise ConfigError(f"--shares {text}: write growing shares that are removed, for example 0,.25,.5,.75,.9")
    return shares


@dataclass(frozen=True)
class Item:
    """A query about a context, what is right, and how long an answer may get."""

    query: Query
    answers: tuple[str, ...]
    new_tokens: int


def items_of(base: Base, task: str, length: int, count: int, sources: ruler.Sources, seed: int) -> list[Item]:
    """`count` items of a task, whose prompt and answer take at most `length` tokens; documents of `one_hop` have 200.

    ConfigError for an unknown task or a length that is too small for it, DataError where a source is missing.
    """
    encoded = lambda text: len(base.tokenizer.encode(text))
    if task == "one_hop":
        asked = [item for item in world_items(seed, count) if item.kind == task]
        return [Item(item.query, (item.answer,), ANSWER_TOKENS) for item in asked]
    if task == "needle":
        room = length - ANSWER_TOKENS - len(_tokens(base, Query(niah.NEEDLE_QUESTION, ".")))
        lines = niah.line_counts(encoded, 3 * room // 4, room)
        # Deciles take turns, so a step of one with each item meets them all; numbers are those of the test split.
        drawn = [niah.needle(lines, index, seed=niah.SEED + seed, split=SPLIT) for index in range(count)]
        return [Item(Query(n.question, n.context), (n.answer,), ANSWER_TOKENS) for n in drawn]
    if task not in ruler.TASKS:
        raise ConfigError(f"task {task!r} is unknown; use {', '.join((*ruler.TASKS, *WORLD_TASKS))}")
    samples = ruler.samples(task, length, count, encoded, sources, seed=ruler.SEED + seed)
    return [Item(as_query(sample), sample.answers, sample.new_tokens) for sample in samples]


def fitting_tasks(base: Base, tasks: Sequence[str], length: int, sources: ruler.Sources) -> tuple[str, ...]:
    """Those of the tasks that fit into `length` tokens; ConfigError where none does."""
    fit = []
    for task in tasks:
        try:
            items_of(base, task, length, 1, sources, 0)
        except ConfigError:
            continue
        fit.append(task)
    if not fit:
        raise ConfigError(f"--length {length} is too small for any of {', '.join(tasks)}; raise it")
    return tuple(fit)


def right(task: str, text: str, answers: Sequence[str]) -> float:
    """The score of one answer: RULER's string match, or exact match on the world's tasks."""
    return exact_match(first_line(text), answers) if task in WORLD_TASKS else ruler.score(task, text, answers)


def _tokens(base: Base, query: Query) -> list[int]:
    return query_tokens(base, prompt_style(base.tokenizer.prompt_style), query)


def divided(base: Base, query: Query, inside: bool) -> tuple[list[int], list[int]]:
    """(the tokens that are compressed, the rest): together the prompt of the uncompressed task, token for token.

    The first part is what the prompt shares with prompts that ask something else (or, with the question inside, that go
    on behind it): no token of the question, or of what follows it, can have been read before the cut.
    """
    whole = _tokens(base, query)
    asked = [f"{query.question} {other}" for other in UNLIKE] if inside else UNLIKE
    others = [_tokens(base, replace(query, question=other, prefix="")) for other in asked]
    seam = common_prefix([whole, *others])
    return whole[:seam], whole[seam:]


def answers(
    base: Base, drawn: Sequence[Item], config: EvictRuler, progress: Callable[[int], None] = lambda done: None
) -> dict[str, list[str]]:
    """{`full`, "policy/share": the greedy answer to each item}; progress is told how many items are answered.

    Each context is read once, alone, and cut by its own length; the answers of several are decoded together. InputError,
    before anything is read, where one does not fit the base's window.
    """
    parts = [divided(base, item.query, config.inside) for item in drawn]
    for (context, rest), item in zip(parts, drawn, strict=True):
        check_window(base.model, len(context) + len(rest), item.new_tokens)
    made: dict[str, list[str]] = {name: [] for name in (FULL, *config.columns)}
    wanted = [policy.queries for policy in config.policies if isinstance(policy, Policy)]
    queries = None if None in wanted else max((count for count in wanted if count is not None), default=0)
    rows = _rows(base, max(len(context) for context, _ in parts), queries, config.held)
    for begin in range(0, len(parts), rows):
        contexts = [context for context, _ in parts[begin : begin + rows]]
        rests = [rest for _, rest in parts[begin : begin + rows]]
        read = [read_dense(base.model, base.params, [context], queries, learned=config.learned) for context in contexts]
        cutters = [_cutter(base, config, *given) for given in zip(drawn[begin : begin + rows], contexts, read, strict=True)]
        rests = [*rests, *[rests[-1]] * (rows - len(rests))]  # the last batch runs the same program

        def answered(prefixes: Sequence[Prefix], first: int = begin, rests: Sequence[list[int]] = rests) -> list[str]:
            prefix = side_by_side([*prefixes, *[prefixes[-1]] * (rows - len(prefixes))])
            sampling = Sampling(max(item.new_tokens for item in drawn[first : first + rows]))
            tokens = generate(base.model, base.params, rests, base.tokenizer.eos_ids, sampling, prefix=prefix)
            return [base.tokenizer.decode(new).strip() for new in tokens[: len(prefixes)]]

        full = answered([Prefix(Segment(d.cache.k, d.cache.v, d.cache.position), d.length[0]) for d in read])
        made[FULL] += full
        for name, asked in config.columns.items():
            if asked.share == 0:  # nothing is evicted, whatever the policy: this is the full cache, and its program
                made[name] += full
                continue
            budgets = [kept_of(config, asked, len(context), base) for context in contexts]
            cuts = [cut_one(asked.policy, budget) for cut_one, budget in zip(cutters, budgets, strict=True)]
            made[name] += answered([kept.prefix(config.learned) for kept in cuts])
        progress(min(begin + rows, len(parts)))
    return made


def _cutter(
    base: Base, config: EvictRuler, item: Item, context: list[int], dense: Dense
) -> Callable[[Policy | KVzip, Budget], Kept]:
    """How one context is cut; what a policy has to read for it is read once, for all shares."""
    scores = {}
    for policy in config.policies:
        if isinstance(policy, KVzip):
            others = [_tokens(base, replace(item.query, context=other)) for other in UNLIKE]
            header = common_prefix([context, *others])
            prompt = RepeatPrompt.of(base.tokenizer)
            scores[policy.name] = policy.score(base.model, base.params, dense, context, prompt, header)

    def cut_one(policy: Policy | KVzip, budget: Budget) -> Kept:
        if isinstance(policy, KVzip):
            return policy.cut(dense, scores[policy.name], budget)
        return cut(base.model, dense, policy, budget, learned=config.learned)

    return cut_one


def _rows(base: Base, longest: int, queries: int | None, held: int) -> int:
    """How many whole contexts are held at once: a power of two."""
    config, itemsize = base.config, base.params["embed"].dtype.itemsize
    size = config.num_layers * config.head_size * itemsize
    each = bucket(longest) * 2 * config.num_kv_heads * size
    each += min(longest, longest if queries is None else queries) * 2 * config.num_heads * size
    return max(1, min(ROWS, 1 << (max(held // each, 1).bit_length() - 1)))


def item_scores(
    base: Base,
    config: EvictRuler,
    tasks: Sequence[str],
    length: int,
    count: int,
    sources: ruler.Sources,
    seed: int,
    progress: Callable[..., None] = lambda what, done, total: None,
) -> Scores:
    """{"task/full", "task/policy/share": score of each item}, in 0 … 1, of `count` items per task."""
    drawn = {task: items_of(base, task, length, count, sources, seed) for task in tasks}
    made: Scores = {}
    for task, items in drawn.items():
        texts = answers(base, items, config, partial(progress, task, total=count))
        for name, said in texts.items():
            made[f"{task}/{name}"] = [right(task, text, item.answers) for text, item in zip(said, items, strict=True)]
    return made


def numbers_of(runs: Sequence[Scores], config: EvictRuler, tasks: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """(flat numbers of one run per seed, the tasks that count): means and intervals per task and, as `mean/…`, over all
    items of the tasks that the full cache solves; what a policy's places take of the full cache's, as `places/…`.

    No `mean/…` where no task is solved. With a learned policy and all of HEURISTICS among the policies also the share of
    the loss that it makes good, see `gap_closed`.
    """
    solved = [task for task in tasks if np.mean([np.mean(run[f"{task}/{FULL}"]) for run in runs]) >= config.solved]
    names = (FULL, *config.columns)
    if solved:
        means = [{f"mean/{name}": [x for task in solved for x in run[f"{task}/{name}"]] for name in names} for run in runs]
        runs = [{**run, **mean, **latent_gain(mean, config)} for run, mean in zip(runs, means, strict=True)]
    numbers = {**summarize(runs), "solved_tasks": float(len(solved))}
    held = {policy.name for policy in config.policies}
    learned = next((name for name in LEARNED if name in held), None)
    if learned and held.issuperset(HEURISTICS):
        for share in config.shares:
            numbers |= gap_closed(numbers, learned, share, solved)
    return numbers, solved


def latent_gain(mean: Mapping[str, Sequence[float]], config: EvictRuler) -> Scores:
    """{latent_gain_equal_bytes: what each item, at each of GAIN_AT, scores more with the first policy's latent memory than
    with the tokens whose bytes that takes}; of the second policy as `latent_gain_equal_bytes/snapkv`, and so on."""
    made: Scores = {}
    for own, bare in BARE.items():
        if f"{bare}+tokens" not in config.rivals:
            continue
        pairs = [(f"mean/{column(own, s)}", f"mean/{column(f'{bare}+tokens', s)}") for s in config.shares if s in GAIN_AT]
        gains = [a - b for one, other in pairs for a, b in zip(mean[one], mean[other], strict=True)]
        if gains:
            made["latent_gain_equal_bytes" + (f"/{bare}" if own != LEARNED[0] else "")] = gains
    return made


def gap_closed(numbers: Mapping[str, float], learned: str, share: float, tasks: Sequence[str]) -> dict[str, float]:
    """{gap_closed_50, gap_points_50, gap_tasks_50} at a share removed of .5: of the points that each task's best heuristic
    loses against the full cache, the part that the learned policy does not lose, and the points it gains on them.

    Over tasks where at least GAP is lost, sums over sums; nothing where there is no such task.
    """
    rows = []
    for task in tasks:
        best = max(numbers[f"{task}/{column(name, share)}"] for name in HEURISTICS)
        if numbers[f"{task}/{FULL}"] - best >= GAP:
            rows.append((numbers[f"{task}/{FULL}"], best, numbers[f"{task}/{column(learned, share)}"]))
    if not rows:
        return {}
    full, best, own = np.sum(rows, axis=0)
    at = f"{100 * share:g}"
    return {
        f"gap_closed_{at}": float((own - best) / (full - best)),
        f"gap_points_{at}": float(100 * (own - best) / len(rows)),
        f"gap_tasks_{at}": float(len(rows)),
    }


def places(config: EvictRuler, length: int, base: Base) -> dict[str, float]:
    """{"places/policy/share": the places that a layer allocates, over those of a full cache} for a context of `length`.

    Where heads or layers share a budget out unevenly all get the most that one may need: fewer tokens, not fewer bytes.
    Index keys and a latent memory's state count as the keys and values whose bytes they take.
    """
    made = {}
    for name, asked in config.columns.items():
        policy, share, _ = asked
        if isinstance(policy, KVzip):
            made[f"places/{name}"] = 1.0
            continue
        budgets = policy.budgets(kept_of(config, asked, length, base).of(length), length, base.config.num_layers)
        held = float(min(policy.slots(int(budgets.max()), base.config.num_kv_heads), length))
        if policy.judged:
            held *= 1 + math.prod(config.learned.index_shape or (0,)) / (
                2 * base.config.num_kv_heads * base.config.head_size
            )
        if policy.remembers and share:
            held += state_tokens(config.learned.rule, base)
        made[f"places/{name}"] = held / length
    return made


def state_tokens(rule: Rule | None, base: Base) -> float:
    """The tokens whose keys and values take as many numbers as a latent memory's state does."""
    if rule is None:
        return 0.0
    size = base.config.head_size
    return rule.places * (size * (2 if rule.merge == "slots" else 1) + 1) / (2 * size)


def table(
    config: EvictRuler, numbers: Mapping[str, float], solved: Sequence[str], tasks: Sequence[str], about: str = ""
) -> Table:
    """Policies against shares removed: the mean over the tasks that count, named below beside those left out.

    about: what the title begins with, such as the base and its tasks.
    """
    asked = "inside" if config.inside else "outside"
    begun = f"{about}: " if about else ""
    title = f"{begun}mean score of {len(solved)} of {len(tasks)} tasks by share of the context removed, "
    title += f"the question {asked} of it"
    left = [f"{task} {numbers[f'{task}/{FULL}']:.2f}" for task in tasks if task not in solved]
    counted = [f"{task} {numbers[f'{task}/{FULL}']:.2f}" for task in solved]
    caption = f"Scored (full cache at least {config.solved:g}): {', '.join(counted) or 'none'}."
    caption += f" Not scored: {', '.join(left)}." if left else ""
    wide = [
        p.name
        for p in config.policies
        if any(numbers[f"places/{column(p.name, s)}"] > 1.1 * (1 - s) for s in config.shares)
    ]
    caption += f" Fewer tokens, but not as many fewer bytes: {', '.join(wide)}." if wide else ""
    shown = Table(
        "policy", *(f"{share:g}" for share in config.shares), title=title, caption=caption, caption_justify="left"
    )
    if not solved:
        shown.add_row("no task is solved; such a base may know --tasks needle,one_hop, of the test world")
    if solved:
        for name in (*(policy.name for policy in config.policies), *config.rivals):
            means = [numbers.get(f"mean/{column(name, share)}", numbers[f"mean/{FULL}"]) for share in config.shares]
            shown.add_row(name, *(f"{mean:.3f}" for mean in means))
    return shown


def picture(path: Path, config: EvictRuler, numbers: Mapping[str, float], title: str) -> Path:
    """Draws the mean score against the share removed, a line for each policy, into the PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, policy in enumerate(config.policies):
        keys = [f"mean/{column(policy.name, share)}" for share in config.shares]
        means = np.asarray([numbers[key] for key in keys])
        below = np.maximum([m - numbers[f"{k}_low"] for m, k in zip(means, keys, strict=True)], 0)
        above = np.maximum([numbers[f"{k}_high"] - m for m, k in zip(means, keys, strict=True)], 0)
        # Aside by a little each, so that intervals do not hide one another.
        at = 100 * np.asarray(config.shares) + 0.35 * (place - (len(config.policies) - 1) / 2)
        line = f"{'osv^Dx'[place % 6]}{'-' if place < 10 else '--'}"
        around = np.asarray([below, above])
        axes.errorbar(at, means, around, None, line, elinewidth=0.5, capsize=2, label=policy.name, lw=1, ms=4)
    axes.axhline(numbers[f"mean/{FULL}"], linestyle=":", color="gray", label="full cache")
    axes.set_xticks([100 * share for share in config.shares], [f"{100 * share:g}" for share in config.shares])
    axes.set_xlabel("percent of the context removed")
    axes.set_ylabel("score")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path)
    return path
