"""What a base is shown: the message lists of the reader, the teacher and the question maker, for chat and plain bases."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from memjax.errors import InputError

if TYPE_CHECKING:
    from memjax.models.tokenizer import Tokenizer

Message = dict[str, str]
_PROBE = "answer"
SYSTEM = "Answer the question in a few words."
UNLIKE = ("Why?", "is it 7")  # two questions that begin with different tokens: what both prompts share, all share


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How contexts and questions are put to a base. `examples`: (passage, question, answer) turns before the context;
    `lead`: how every answer begins, in the examples and, already written, in the reader's own turn; `invite`: what makes
    the base ask a question about a context (none: it is shown a sentence and its answer, with examples); `general`: the
    file of prompts that have nothing to do with any text that a person writes; `abstain`: what the base was trained to say
    of what a text does not tell (none: it was not).

    With a lead and short examples a small base answers with the fact itself, so that the first token tells whether it
    knows it. A base says in its tokenizer_config.json (`"memjax_prompt"`) which style it was trained for; chat is the
    default.
    """

    name: str
    system: str | None
    examples: tuple[tuple[str, str, str], ...]
    asks: str = "{question}"
    lead: str = ""
    invite: str = ""
    repeat: str = "Please repeat the text."
    resume: str = "Continue the text from here: {cue}"
    general: str = "general.txt"
    abstain: str = ""


def prompt_style(name: str = "chat") -> PromptStyle:
    """The style called `name`: `chat` (a system line, and example turns for the teacher) or `plain` (neither)."""
    if name == "plain":
        return PromptStyle(
            "plain",
            None,
            (),
            invite="Ask a question about the text.",
            repeat="Repeat the text.",
            resume="Continue the text: {cue}",
            general="general_plain.txt",
            abstain="not stated",
        )
    turns = tuple((t["passage"], t["question"], t["answer"]) for t in example_data()["reading"][:3])
    return PromptStyle(name, SYSTEM, turns, asks="Question: {question}", lead="Answer:")


def example_data() -> dict[str, Any]:
    """The shipped example turns: `reading` (passage, question, answer) and `questions` (sentence, answer, question)."""
    return json.loads(resources.files("memjax.write").joinpath("question_examples.json").read_text("utf-8"))


def general_prompts(style: PromptStyle) -> list[str]:
    """The shipped general prompts of a style, which have nothing to do with any text that a person writes."""
    lines = resources.files("memjax.write").joinpath(style.general).read_text("utf-8").splitlines()
    return [line for line in lines if line.strip()]


def check_question(question: str) -> None:
    """InputError for a question of nothing but spaces: a base makes something of it, and a memory answers."""
    if not question.strip():
        raise InputError("the question is empty; ask something")


def ask_tokens(tokenizer: Tokenizer, style: PromptStyle, question: str, history: Sequence[Message] = ()) -> list[int]:
    """What the reader sees: the question alone; the memory must know the rest."""
    messages = [*_system(style), *history, _user(style.asks.format(question=question))]
    return [*tokenizer.encode_chat(messages), *tokenizer.encode(style.lead)]


def read_tokens(
    tokenizer: Tokenizer, style: PromptStyle, context: str, question: str, history: Sequence[Message] = ()
) -> list[int]:
    """What the teacher sees: example turns, then the context before the question, so that it can be encoded once.

    With a history of turns, user first, the context stands before the first of them.
    """
    messages = _system(style)
    for passage, asked, answer in style.examples:
        messages += [
            _user(f"{passage}\n\n{style.asks.format(question=asked)}"),
            {"role": "assistant", "content": f"{style.lead} {answer}".strip()},
        ]
    first, *later = [*history, _user(style.asks.format(question=question))]
    messages += [_user(f"{context}\n\n{first['content']}"), *later]
    return [*tokenizer.encode_chat(messages), *tokenizer.encode(style.lead)]


def answer_text(tokenizer: Tokenizer, style: PromptStyle, answer: str) -> str:
    """The answer as it follows the prompt: behind a space where the style's lead or the chat template puts one."""
    return f"{_answer_gap(tokenizer, style)}{answer}"


def abstain_tokens(tokenizer: Tokenizer, style: PromptStyle) -> list[int]:
    """How an answer begins that says that a text does not tell; empty where the style knows no such answer."""
    return tokenizer.encode(answer_text(tokenizer, style, style.abstain)) if style.abstain else []


def _answer_gap(tokenizer: Tokenizer, style: PromptStyle) -> str:
    if style.lead:
        return " "
    turns = [_user("?")]
    prompt = tokenizer.apply_chat(turns)
    whole = tokenizer.apply_chat([*turns, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
    found = re.match(rf"(\s*){_PROBE}", whole[len(prompt) :]) if whole.startswith(prompt) else None
    return found.group(1) if found else ""


def question_messages(sentence: str, answer: str) -> list[Message]:
    """What the base sees when it is to write a question whose answer is a span of a sentence, with example turns."""
    messages = [{"role": "system", "content": "Write a question about the sentence. The answer is given."}]
    for example in example_data()["questions"]:
        messages += [
            _user(_question_request(example["sentence"], example["answer"])),
            {"role": "assistant", "content": f"Question: {example['question']}"},
        ]
    return [*messages, _user(_question_request(sentence, answer))]


def _question_request(sentence: str, answer: str) -> str:
    return f"Sentence: {sentence}\nAnswer: {answer}"


def _system(style: PromptStyle) -> list[Message]:
    return [{"role": "system", "content": style.system}] if style.system else []


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
