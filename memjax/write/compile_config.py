"""The recipe of context compilation: what is trained, on what, for how long (arXiv 2602.21221 section 4 and its table)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from memjax.errors import ConfigError
from memjax.memory.adapter import SITES
from memjax.memory.layout import LAYOUTS, Layout

Scope = Literal["context+buffer", "buffer"]
Through = Literal["adapter", "slots", "inputs"]
Place = Literal["behind", "within"]
Kind = Literal["adamw", "muon"]


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """The recipe of one compilation; as it stands the paper's, see `recipe` for what `memjax write` does.

    ratio: context tokens per slot; scope: where the disposable adapter acts ("buffer": on the slots alone, so that the
    context is read once by the base and not per step); layout: see `memory.buffer`; written: "behind" the context, all of
    which every slot sees, or each "within" it, at the end of its share, seeing what stands before (Activation Beacon's way,
    arXiv 2401.03462). Every step holds `windows` continuations of the context, each `window` tokens after a cue of `cue`,
    and `queries` general prompts, drawn from `general`, with what the base answers; their losses weigh `recon` and
    1 - `recon`. query_teacher: whether the base saw the context when it answered those. loss: "topk", the divergence from
    the teacher over its `top_k` likeliest classes and one for the rest; "kl", over the whole vocabulary, as with a top_k of
    0; "mse", the squared difference of the logits of those classes, which also counts shifts that change nothing (what is
    held out is measured in nats all the same). optimizer: see `train.optimizer`; Muon takes the adapter's factors, whatever
    else is trained stays with AdamW. `slots_rate` is the learning rate of the slots as a multiple of the
    adapter's. Every `eval_every` steps the tasks held out are read; the best slots by their losses are kept, and after
    `patience` readings without a better one it ends. probes: questions about the text that gates are calibrated with, and
    nothing is trained on.

    asks: questions about the context in a step, from those that the base asks itself before (`asked`, `turned`, `cloze`,
    `alike`, `strangers`, `reworded`, `trust` as in `write.distill`); their loss weighs `asked_share`, the two others the
    rest of it. 0: none.

    through: what is trained. "adapter", the paper's: an adapter and the slots' inputs; "slots": the slots' keys and values
    themselves, beginning with those of the untrained pass (Cartridges, arXiv 2506.06266); "inputs": the slots' inputs
    alone, which never see the context (prompt tuning). coupled: the adapter stays on in the reader while training, and is
    missing when the buffer is read.

    A text that the base cannot read at once is compiled in chunks of about `chunk` tokens (0: as many as fit), into one
    buffer of the layout compact, whatever the layout of texts that are read whole. chunks: "sequential", each chunk is
    read, written and questioned behind the slots of those before it, which are trained no more (AutoCompressor's way, arXiv
    2305.14788); "independent", none sees another.

    distractors: of other buffers 1 to so many are read beside the slots in a share `beside` of the steps, so that these
    learn to be read among several; 0: none.
    """

    ratio: float = 16.0
    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("q", "k", "v", "o")
    scope: Scope = "context+buffer"
    layout: Layout = "in_place"
    written: Place = "behind"
    cue: int = 16
    window: int = 64
    windows: int = 8
    queries: int = 8
    general: int = 240
    answer_tokens: int = 16
    query_teacher: Literal["none", "context"] = "none"
    recon: float = 0.5
    loss: Literal["topk", "kl", "mse"] = "topk"
    top_k: int = 32
    held_out: float = 0.1
    steps: int = 300
    optimizer: Kind = "adamw"
    learning_rate: float = 1e-3
    slots_rate: float = 10.0
    warmup: int = 20
    eval_every: int = 50
    patience: int = 4
    probes: int = 24
    asks: int = 0
    asked_share: float = 0.5
    asked: int = 24
    turned: int = 48
    cloze: int = 8
    alike: int = 0
    strangers: int = 0
    reworded: int = 0
    trust: float = 0.7
    through: Through = "adapter"
    coupled: bool = False
    chunk: int = 0
    chunks: Literal["sequential", "independent"] = "sequential"
    distractors: int = 0
    beside: float = 0.25
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope not in ("context+buffer", "buffer") or self.layout not in LAYOUTS:
            raise ConfigError(f"scope {self.scope!r} or layout {self.layout!r} is unknown; see CompileConfig")
        if self.written not in ("behind", "within"):
            raise ConfigError(f"slots are written behind or within the context, not {self.written!r}")
        if self.written == "within" and self.scope != "buffer":
            raise ConfigError("slots within the context are for scope buffer: with an adapter on it, it would see them")
        if self.ratio < 1 or not 0 <= self.recon <= 1 or not 0 < self.held_out < 1:
            raise ConfigError("compiling wants ratio >= 1, recon from 0 to 1 and held_out between 0 and 1")
        if min(self.windows, self.queries, self.steps, self.window, self.cue) < 1:
            raise ConfigError("compiling wants at least one window, one query, one step, and a cue")
        if not 0 <= self.asked_share <= 1 or self.asks < 0:
            raise ConfigError("compiling wants asked_share from 0 to 1 and asks of 0 or more")
        if self.optimizer not in ("adamw", "muon"):
            raise ConfigError(f"optimizer {self.optimizer!r} is unknown; use adamw or muon")
        if self.loss not in ("topk", "kl", "mse"):
            raise ConfigError(f"loss {self.loss!r} is unknown; use topk, kl or mse")
        if self.chunks not in ("sequential", "independent") or self.chunk < 0:
            raise ConfigError("compiling wants chunks sequential or independent, and a chunk of 0 tokens or more")
        if self.distractors < 0 or not 0 < self.beside <= 1:
            raise ConfigError("compiling wants 0 or more distractors, and beside above 0 and up to 1")
        if self.through not in ("adapter", "slots", "inputs") or (self.coupled and self.through != "adapter"):
            raise ConfigError(f"compiling through {self.through!r} is unknown, or has no adapter to be coupled")

    @property
    def classes(self) -> int:
        """How many of the teacher's classes are kept; 0 for the whole vocabulary."""
        return 0 if self.loss == "kl" else self.top_k


def recipe(effort: str = "default", ratio: float = 16.0, style: str = "chat", window: int | None = None) -> CompileConfig:
    """The recipe of an effort, `fast`, `default` or `thorough`, for a prompt style; it adds questions to the paper's.

    Slots are written within the text, by an adapter on them alone, in few steps by Muon. A base of the plain style asks all
    questions itself, so many that hardly a fact of the text goes without. Measured in configs/compile.md. window: of a base
    with a sliding one, whose layers would not see slots that are spread over a text; they then lie side by side.
    """
    layout: Layout = "spread" if window is None else "compact"
    own = CompileConfig(
        ratio=ratio, windows=2, queries=6, asks=16, recon=0.4, scope="buffer", layout=layout, written="within"
    )
    own = dataclasses.replace(own, rank=16, alpha=32.0, sites=SITES, optimizer="muon", slots_rate=2.0)
    if style != "plain":
        steps = {"fast": 25, "thorough": 150}.get(effort, 50)
        own = dataclasses.replace(own, steps=steps, learning_rate=1e-2, warmup=5, eval_every=max(5, steps // 4))
        return dataclasses.replace(own, asked=120, turned=120)
    steps = {"fast": 100, "thorough": 600}.get(effort, 300)
    count, reworded, alike = (800, 400, 20) if effort == "fast" else (3200, 1600, 30)
    asked = dataclasses.replace(own, asked=count, reworded=reworded, alike=alike, turned=0, cloze=0, trust=0.0)
    return dataclasses.replace(asked, steps=steps, learning_rate=2e-2)
