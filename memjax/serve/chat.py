"""A conversation with a bank: every turn may read from another memory, and the history is always the base's own cache.

A turn probes its candidates over the base's cache of all that was said before. When the answer is there, the base reads it
again without the memory that gave it, so no memory leaks into the next turn, and what the next turn adapts is what
adapters were trained over (arXiv 2605.28889 section 7). Only what is new is read: the prefix of the last turn stays.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence

from memjax.errors import InputError
from memjax.models.generate import Sampling
from memjax.serve.engine import Answer, Engine
from memjax.write.prompts import Message, PromptStyle, ask_tokens

MAX_TOKENS = 96  # of an answer


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question, its answer, and the memory it was read from (None: the base)."""

    question: str
    answer: str
    memory: str | None


def messages(style: PromptStyle, turns: Sequence[Turn]) -> list[Message]:
    """Turns as a base is shown them, in the style's own words."""
    made: list[Message] = []
    for turn in turns:
        made.append({"role": "user", "content": style.asks.format(question=turn.question)})
        made.append({"role": "assistant", "content": f"{style.lead} {turn.answer}".strip()})
    return made


class Chat:
    """A conversation over an engine. Its turns are all that it keeps; the engine keeps the base's cache of them.

    memory: read every turn from this one, without a gate; None leaves the choice to the engine, turn by turn. It may be
    changed between turns. dropped: turns that no longer fit the base's window and are not in the prompt.
    """

    def __init__(self, engine: Engine, *, memory: str | None = None, gate: bool = True) -> None:
        self.engine, self.memory, self.gate = engine, memory, gate
        self.id = secrets.token_hex(8)
        self.turns: list[Turn] = []
        self.dropped = 0

    def ask(
        self,
        question: str,
        *,
        sampling: Sampling = Sampling(max_tokens=MAX_TOKENS),
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """The answer to the next question, with all that was said before in view.

        The oldest turns leave the prompt where it would exceed the base's window. InputError where the question alone
        does; then, and where a memory cannot be read, the conversation stays as it was.
        """
        dropped = self._fit(question, sampling.max_tokens)
        answer = self.engine.ask(
            question,
            memory=self.memory,
            gate=self.gate,
            history=self.messages(dropped),
            conversation=self.id,
            sampling=sampling,
            on_text=on_text,
        )
        self.dropped = dropped
        self.turns.append(Turn(question, answer.text, answer.choice.memory))
        self.engine.remember(self.messages(dropped), self.id)
        return answer

    def reset(self) -> None:
        """Forget all that was said, the base's cache of it too."""
        self.engine.prefixes.drop(self.id)
        self.turns, self.dropped = [], 0

    def messages(self, dropped: int = 0) -> list[Message]:
        """What was said, but for the first `dropped` turns, as the base is shown it: in the style's own words."""
        return messages(self.engine.style, self.turns[dropped:])

    def _fit(self, question: str, room: int) -> int:
        """How many of the oldest turns must go so that the prompt and an answer fit the window."""
        base, style = self.engine.base, self.engine.style
        for dropped in range(self.dropped, len(self.turns) + 1):
            tokens = len(ask_tokens(base.tokenizer, style, question, self.messages(dropped)))
            if tokens + room <= base.config.max_positions:
                return dropped
        raise InputError(
            f"the question has {tokens} tokens and {room} more are asked for, but the base reads at most "
            f"{base.config.max_positions}; shorten it"
        )
