"""Questions about one text that a bounded cache holds: it is read once, in blocks, and only the budget of it stays."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memjax.errors import InputError
from memjax.evict.bounded import Reading, read, read_on, stream_from
from memjax.evict.compact import Budget
from memjax.evict.learned import NOTHING, Learned
from memjax.evict.policies import Policy
from memjax.models.base import Base
from memjax.models.generate import Sampling, check_window, common_prefix
from memjax.serve.chat import MAX_TOKENS, Turn, messages
from memjax.serve.engine import collect_text
from memjax.write.prompts import UNLIKE, PromptStyle, check_question, read_tokens


@dataclasses.dataclass(frozen=True)
class TextAnswer:
    """An answer, and what it was read from: tokens of the whole prompt, those a head still kept of it (mean), and the bytes
    of the bounded cache. seconds: {prefill, first_token, total} of this question."""

    text: str
    prompt_tokens: int
    new_tokens: int
    kept_tokens: float
    cache_bytes: int
    seconds: dict[str, float]


class TextChat:
    """A conversation about a text, with the base alone; not safe for several threads.

    What was said competes with the text for the budget. A question is read by a copy of the cache: what its prompt ends
    with is not part of the next one. Positions are the text's own, so all that is read must fit the base's window.
    """

    def __init__(
        self, base: Base, style: PromptStyle, text: str, policy: Policy, budget: Budget, learned: Learned = NOTHING
    ) -> None:
        """Reads the text. InputError where it does not fit the base's positions."""
        self.base, self.style, self.text, self.policy, self.learned = base, style, text, policy, learned
        self.turns: list[Turn] = []
        self._read = self._sure()
        # The whole budget from the first, so that one program reads the text and all that follows.
        room = max(base.config.max_positions - len(self._read), 0)
        self._reading = read(base.model, base.params, [self._read], policy, budget, learned=learned, room=room)
        self._first = (self._read, self._copy())

    def ask(
        self,
        question: str,
        *,
        sampling: Sampling = Sampling(max_tokens=MAX_TOKENS),
        on_text: Callable[[str], None] | None = None,
        every: int = 8,
    ) -> TextAnswer:
        """The answer to the next question. InputError where it is empty or does not fit the base's positions any more."""
        began = time.perf_counter()
        base, tokenizer = self.base, self.base.tokenizer
        check_question(question)
        tokens = read_tokens(tokenizer, self.style, self.text, question, messages(self.style, self.turns))
        if tokens[: len(self._read)] != self._read:
            raise InputError(f"the question's beginning {question[:12]!r} melts into the text; begin it with a plain word")
        check_window(base.model, len(tokens), sampling.max_tokens)
        rest = [tokens[len(self._read) :]]
        asked = read_on(base.model, base.params, self._copy(), rest, self.policy, learned=self.learned)
        jax.block_until_ready(asked.hidden)
        seconds = {"prefill": time.perf_counter() - began}
        kept, held = float(asked.kept.tokens()[0]), asked.kept.bytes
        run = (base.model, base.params, asked, tokenizer.eos_ids, sampling)
        pieces = stream_from(*run, policy=self.policy, learned=self.learned, every=every)
        text, made = collect_text(tokenizer, pieces, seconds, began, on_text)
        seconds["total"] = time.perf_counter() - began
        self.turns.append(Turn(question, text, None))
        self._remember()
        return TextAnswer(text, len(tokens), made, kept, held, seconds)

    def reset(self) -> None:
        """Forget all that was said, not the text."""
        self.turns = []
        self._read, self._reading = self._first
        self._first = (self._read, self._copy())

    def _sure(self) -> list[int]:
        """What every prompt begins with, whatever is asked next."""
        said = messages(self.style, self.turns)
        prompts = [read_tokens(self.base.tokenizer, self.style, self.text, asked, said) for asked in UNLIKE]
        return prompts[0][: common_prefix(prompts)]

    def _remember(self) -> None:
        """Let the cache take the last turn in."""
        sure = self._sure()
        if len(self._read) < len(sure) < self.base.config.max_positions and sure[: len(self._read)] == self._read:
            rest = [sure[len(self._read) :]]
            self._reading = read_on(
                self.base.model, self.base.params, self._reading, rest, self.policy, learned=self.learned
            )
            self._read = sure

    def _copy(self) -> Reading:
        """The reading, with a cache of its own to be donated."""
        return dataclasses.replace(self._reading, kept=jax.tree.map(jnp.copy, self._reading.kept))
