"""Training data from any texts: questions that the base asks itself, its answers, and its most likely tokens.

As in Doc-to-LoRA (arXiv 2602.15902, section 4) the answers are the base's own with the passage in its prompt, and what is
kept of each answer token is the `top_k` largest log-probabilities over the whole vocabulary; there a larger model asks the
questions, here the base does, or rules do where its style has no way to make it ask.

selfgen.json         base, template, recipe and the texts' hashes; a run that was stopped goes on where all of them agree
00000.jsonl, …       a line per question, as `Records` tells; each file is whole or missing
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memjax import ids
from memjax.config import to_dict
from memjax.errors import ConfigError, DataError, InputError
from memjax.memory.raw import json_bytes, parse_json
from memjax.models.base import Base
from memjax.models.generate import read_prefix
from memjax.write.distill import DistillConfig, make_questions
from memjax.write.prompts import PromptStyle, prompt_style
from memjax.write.questions import split_sentences
from memjax.write.reading import question_room, split_prompts
from memjax.write.tasks import scored
from memjax.write.teacher import TeachConfig, answer_questions, said_text

FORMAT = 1
ABOUT_FILE = "selfgen.json"


@dataclasses.dataclass(frozen=True)
class SelfgenConfig:
    """passage: tokens of a document at most, whole sentences; asked, turned: questions of a passage, which the base is told
    to write, and sentences turned around; answer_tokens, top_k: of an answer, its end included, as in training; shard:
    passages in one file, what is lost at most where a run is stopped.
    """

    passage: int = 200
    asked: int = 24
    turned: int = 12
    answer_tokens: int = 24
    top_k: int = 16
    shard: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.passage, self.answer_tokens, self.top_k, self.shard) < 1 or min(self.asked, self.turned) < 0:
            raise ConfigError("selfgen wants sizes of at least 1, and asked and turned of at least 0")
        if not self.asked + self.turned:
            raise ConfigError("asked and turned are both 0; ask at least one question about a passage")


def passages(base: Base, text: str, most: int) -> list[str]:
    """The text in runs of whole sentences of up to `most` tokens; a sentence longer than that is left out."""
    made: list[str] = []
    held: list[str] = []
    for sentence in split_sentences(text):
        size = len(base.tokenizer.encode(" ".join([*held, sentence])))
        if size <= most:
            held.append(sentence)
            continue
        if held:
            made.append(" ".join(held))
        held = [sentence] if len(base.tokenizer.encode(sentence)) <= most else []
    return [*made, " ".join(held)] if held else made


def ask_passage(base: Base, style: PromptStyle, text: str, config: SelfgenConfig, seed: int) -> list[dict[str, Any]]:
    """The records of one passage (see `Records`), none where the base has nothing to ask or to answer."""
    recipe = DistillConfig(asked=config.asked, turned=config.turned, cloze=0, continued=0, trust=0.0, seed=seed)
    asked = make_questions(base, text, style, recipe)  # without trust: answers are the base's own
    if not asked:
        return []
    split = split_prompts(base.tokenizer, style, text)
    prefix = read_prefix(base.model, base.params, [*split.header, *split.context])
    tails = [split.tail(question.text) for question in asked]
    knobs = TeachConfig(answer_tokens=config.answer_tokens, top_k=config.top_k)
    try:
        answers = answer_questions(base, asked, tails, prefix, style, knobs)
    except InputError:  # the base misreads all of it
        return []
    stops = set(base.tokenizer.eos_ids)
    ended = {i: tokens for i, tokens in answers.items() if tokens[-1] in stops}  # as in the paper, others are dropped
    if not ended:
        return []
    tasks = scored(base, [tails[i] for i in ended], list(ended.values()), prefix, config.top_k)
    records = []
    for row, (i, tokens) in enumerate(ended.items()):
        said = np.flatnonzero(np.asarray(tasks.weight[row]))
        target, logp = (np.asarray(x[row])[said] for x in (tasks.target, tasks.logp))
        records.append(
            {
                "text": text,
                "question": asked[i].text,
                "answer": said_text(base, tokens),
                "tokens": [int(t) for t in tokens],
                "target": target.tolist(),
                "logp": np.round(logp.astype(np.float64), 4).tolist(),
            }
        )
    return records


def selfgen(
    base: Base,
    texts: Mapping[str, str],
    config: SelfgenConfig,
    out: str | Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Records:
    """Write the records of all texts, {name: text}, into a folder, passage by passage; files that are there are kept.

    progress is told how many passages are done, and how many there are. InputError where the texts hold no sentence that
    fits; ConfigError where the folder was begun with another base, recipe or texts, or passages do not fit the window.
    """
    out, style = Path(out), prompt_style(base.tokenizer.prompt_style)
    room = question_room(base.config.max_positions)
    if config.passage + room > base.config.max_positions:
        raise ConfigError(
            f"passage={config.passage} and {room} tokens for a question exceed the base's window of "
            f"{base.config.max_positions}; give a smaller passage"
        )
    parts = [(name, part) for name, text in texts.items() for part in passages(base, text, config.passage)]
    if not parts:
        raise InputError("the texts hold no sentence to ask about; give files of prose, or a larger passage")
    about: dict[str, Any] = {
        "format": FORMAT,
        "base_id": base.id,
        "base_name": base.name,
        "template_id": base.tokenizer.template_id,
        "recipe": to_dict(config),
        "texts": {name: ids.text_hash(text) for name, text in texts.items()},
        "passages": len(parts),
        "files": -(-len(parts) // config.shard),
    }
    _begin(out, about)
    for number in range(about["files"]):
        path = out / shard_name(number)
        first = number * config.shard
        part = parts[first : first + config.shard]
        if not path.exists():
            lines = []
            for index, (name, text) in enumerate(part, first):
                for record in ask_passage(base, style, text, config, config.seed + index):
                    lines.append(json.dumps({"source": name, "passage": index, **record}, ensure_ascii=False))
                progress(index + 1, len(parts))
            _commit(path, "".join(f"{line}\n" for line in lines).encode())
        progress(first + len(part), len(parts))
    return Records(out, base)


def shard_name(number: int) -> str:
    """The name of a file of records."""
    return f"{number:05d}.jsonl"


class Records:
    """The records in a folder by number, for Grain (`train.data.order`): `records[i]` reads one line.

    A record holds `source`, `passage`, `text`, `question`, `answer`, `tokens` (the answer's n tokens, end included),
    `target` and `logp` (lists [n, k]). DataError for a folder that is not whole, ConfigError for one of another base.
    """

    def __init__(self, folder: str | Path, base: Base) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / ABOUT_FILE
        about = parse_json(path, _bytes(path))
        if about.get("format") != FORMAT:
            raise DataError(f"{path} is not one of memjax data selfgen; make the records again")
        if (about["base_id"], about["template_id"]) != (base.id, base.tokenizer.template_id):
            raise ConfigError(f"the records in {folder} were made by another base, {about['base_name']}; make your own")
        self.top_k: int = about["recipe"]["top_k"]
        self.passage: int = about["recipe"]["passage"]
        self._files = [self.folder / shard_name(number) for number in range(about["files"])]
        self._lines: list[list[int]] = []  # of each file, where its lines begin
        for file in self._files:
            data = _bytes(file)
            ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
            self._lines.append([0, *ends[:-1]] if ends else [])
        self._firsts = np.cumsum([0, *map(len, self._lines)]).tolist()

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._firsts, index) - 1
        with self._files[file].open("rb") as opened:
            opened.seek(self._lines[file][index - self._firsts[file]])
            return parse_json(self._files[file], opened.readline())


def _begin(out: Path, about: Mapping[str, Any]) -> None:
    path = out / ABOUT_FILE
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        _commit(path, json_bytes(about))
        return
    held = parse_json(path, _bytes(path))
    if odd := [name for name in about if held.get(name) != about[name]]:
        raise ConfigError(f"{out} was begun with other {', '.join(odd)}; go on with the same, or give another folder")


def _commit(path: Path, data: bytes) -> None:
    """The whole file or none of it."""
    begun = path.with_suffix(".part")
    begun.write_bytes(data)
    os.replace(begun, path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); let memjax data selfgen finish, or give the folder it wrote"
        ) from None


def texts_of(paths: Sequence[str | Path], read: Callable[[Path], str]) -> dict[str, str]:
    """{name: text} of files, and of all .txt and .md files within folders, in the order of their names."""
    found: dict[str, str] = {}
    for path in map(Path, paths):
        inside = sorted(p for end in ("*.txt", "*.md") for p in path.rglob(end)) if path.is_dir() else [path]
        found |= {str(p): read(p) for p in inside}
    if not found:
        raise InputError("the folders hold no .txt or .md file; name files of text")
    return found
