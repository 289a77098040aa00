"""Rows of pretraining examples under construction: token ids with the loss weight of predicting each."""

import re
from dataclasses import dataclass

from tokenizers import Tokenizer

from memjax.evaluate.world.tokenizer import ANSWER, ASK, BOS, DOC, DOC_END, END, SPECIALS, SYSTEM

TEXT_WEIGHT = 0.1  # tokens of documents and questions
COPY_WEIGHT = 0.5  # tokens of long copied answers, so that they do not drown the short ones

_TABLE_LIMIT = 100_000
_ASCII_PIECES = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with a table of the pieces it has met: encoding world text becomes a matter of look-ups."""

    tokenizer: Tokenizer
    table: dict[str, list[int]]
    special: dict[str, int]
    pieces: tuple[str, ...]  # of each id, without the mark of the space before it

    def encode(self, text: str) -> list[int]:
        """The ids of an ASCII text without special tokens; equal to the tokenizer's."""
        table, ids = self.table, []
        for piece in _ASCII_PIECES.findall(text):
            found = table.get(piece)
            if found is None:
                found = self.tokenizer.encode(piece, add_special_tokens=False).ids
                if len(table) < _TABLE_LIMIT:
                    table[piece] = found
            ids += found
        return ids


def make_encoder(tokenizer_json: str) -> Encoder:
    """An encoder for the text of a tokenizer.json."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    vocabulary = tokenizer.get_vocab()
    pieces = [token.removeprefix("Ġ") for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    return Encoder(tokenizer, {}, {token: vocabulary[token] for token in SPECIALS}, tuple(pieces))


class Row:
    """Ids and weights of an example under construction, never longer than `limit`; `vary`: see `world.vary`."""

    def __init__(self, encoder: Encoder, limit: int, vary: bool = False):
        self.encoder, self.limit, self.vary = encoder, limit, vary
        self.ids: list[int] = [encoder.special[BOS]]
        self.weights: list[float] = [0.0]

    def room(self) -> int:
        return self.limit - len(self.ids)

    def put(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def system(self, text: str) -> None:
        self.put([self.encoder.special[SYSTEM], *self.encoder.encode(" " + text)], 0.0)

    def document(self, text: str) -> None:
        self.document_ids(self.encoder.encode(" " + text))

    def document_ids(self, ids: list[int], weight: float = TEXT_WEIGHT) -> None:
        special = self.encoder.special
        self.put([special[DOC]], 0.0)
        self.put(ids, weight)
        self.put([special[DOC_END]], weight)

    def turn(
        self, question: str, answer: str | list[int], weight: float = 1.0, *, context: str = "", lead: str = ""
    ) -> bool:
        """Adds a question and its answer if they fit; says whether they did.

        context: a text in front of the question, of which nothing is learnt; lead: a given beginning of the answer.
        """
        special, encode = self.encoder.special, self.encoder.encode
        read, begun = encode(f" {context}") if context else [], encode(lead)
        asked = encode(question if context else f" {question}")
        given = encode(" " + answer) if isinstance(answer, str) else answer
        if len(read) + len(asked) + len(begun) + len(given) + 3 > self.room():
            return False
        self.put([special[ASK]], 0.0)
        self.put(read, 0.0)
        self.put(asked, TEXT_WEIGHT)
        self.put([special[ANSWER]], 0.0)
        self.put(begun, TEXT_WEIGHT)
        self.put(given, weight)
        self.put([special[END]], max(weight, COPY_WEIGHT))
        return True
