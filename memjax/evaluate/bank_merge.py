"""What it costs to read from several memories at once: a vote, a mixture of next tokens, one adapter made of all."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from memjax.bank.merge import WAYS as MERGES
from memjax.bank.merge import merge
from memjax.bank.store import Bank, open_bank
from memjax.errors import DataError
from memjax.evaluate.bank import Bench, Scores, kept, share_names
from memjax.evaluate.corpora import Item
from memjax.models.generate import Sampling
from memjax.serve.compose import APART, compose

DOCUMENTS = 8
GROUPS = (2, 4, 8)
WAYS = ("own", *APART, *MERGES)


def run_merge(bench: Bench, seed: int) -> Scores:
    """{merge/WAY/N: whether each test question is answered right} from N memories of which one knows the answer.

    own: from that one alone; vote, mix: `serve.compose`; ties, sum: one adapter of `bank.merge`, of the rank of its parts.
    The first documents of the seed's main bank, in groups of N; groups of another size are namespaces of it.
    """
    texts = bench.corpus.texts(seed)
    names = list(texts)[:DOCUMENTS]
    items = [item for item in bench.corpus.items(seed) if item.name in names]
    if not (bench.folder / "bank").exists():
        raise DataError(f"{bench.folder} holds no bank yet; run the part main first, or both")
    made: Scores = {}
    with open_bank(bench.folder / "bank") as bank:
        ids = {name: bank.get(name).id for name in names}
        for size in (size for size in GROUPS if size <= len(names)):
            groups = [names[i : i + size] for i in range(0, len(names) - size + 1, size)]
            space = f"merge-{size}"
            share_names(bench, bank, [name for group in groups for name in group], texts, space)
            asked = [(item, group) for group in groups for item in items if item.name in group]
            for way in WAYS:
                make = functools.partial(_ask, bench, bank, space, way, asked)
                said = kept(bench, f"answers-merge-{way}-{size}", ids, make)
                made[f"merge/{way}/{size}"] = bench.corpus.right(said, [item for item, _ in asked])
    return made


def _ask(bench: Bench, bank: Bank, space: str, way: str, asked: Sequence[tuple[Item, list[str]]]) -> list[str]:
    engine = bench.engine(bank, 1, "retrieval", space)
    sampling = Sampling(max_tokens=bench.config.answer_tokens)
    said = []
    for number, (item, group) in enumerate(asked, start=1):
        if way in APART:
            said.append(compose(engine, item.question, group, way, sampling).text)
        else:
            memory = item.name
            if way in MERGES:
                memory = f"{way} {group[0]}"
                if bank.find(memory, space) is None:
                    merge(bank, bench.base.config, group, memory, way=way, namespace=space)
            said.append(engine.ask(item.question, memory=memory, sampling=sampling).text)
        bench.progress(f"{way} of {len(group)}", number, len(asked))
    return said
