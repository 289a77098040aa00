"""The tiny tokenizer: loses nothing, keeps names at two tokens, and its chat template writes the training format."""

import json
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from memjax.evaluate.world import COMMON_FACTS, choices, names, tokenizer
from memjax.evaluate.world.common import ask, forms

TINY = Tokenizer.from_str(tokenizer.build_tokenizer())


def render(messages, generate=False):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(tokenizer.CHAT_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=generate, bos_token=tokenizer.BOS)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(text):
    if not any(special in text for special in tokenizer.SPECIALS):
        assert TINY.decode(TINY.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["  two  spaces ", "a\n\n\tb\r\n", "é\u0301", "👩‍👩‍👧", "\x00\x1f", "日本語 テスト", "½²"])
def test_odd_texts_survive(text):
    assert TINY.decode(TINY.encode(text).ids) == text


@pytest.mark.parametrize("table", [names.NAMES, names.VALUES])
def test_names_are_two_tokens_in_every_split(table):
    pieces = set()
    for split in names.SPLITS:
        for start, ends in zip(table[split].starts, table[split].ends, strict=True):
            for end in ends:
                tokens = TINY.encode(f" {start}{end}").tokens
                assert tokens == [f"Ġ{start}", end]
                pieces.update(tokens)
    assert len(pieces) == len(table["train"].starts) + len(names.ENDS)


def test_words_digits_and_specials_are_single_tokens():
    for word in tokenizer.lexicon():
        assert len(TINY.encode(f" {word}").ids) == 1
    assert TINY.encode(" 0475").tokens == ["Ġ0", "4", "7", "5"]
    for i, special in enumerate(tokenizer.SPECIALS):
        assert TINY.encode(special).ids == [i]
    assert TINY.encode(" Tavinfolk").tokens == ["ĠTa", "vin", "folk"]
    assert TINY.get_vocab_size() <= 2048


@pytest.mark.parametrize(("name", "window"), [("tiny", 512), ("tiny-long", 1024)])
def test_shipped_files_are_what_the_builder_builds(name, window):
    folder = resources.files("memjax.models") / name
    assert (folder / "tokenizer.json").read_text() == tokenizer.build_tokenizer()
    assert (folder / "tokenizer_config.json").read_text() == tokenizer.tokenizer_config(window)
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == window
    assert config["vocab_size"] >= TINY.get_vocab_size()
    for key, token in (("bos", tokenizer.BOS), ("eos", tokenizer.END), ("pad", tokenizer.PAD)):
        assert config[f"{key}_token_id"] == TINY.token_to_id(token)


def test_chat_template_writes_the_training_format():
    context, question = "Bavo lives in Tavin.\nX grows.\n\nMore.", "Where does Bavo live?"
    user = {"role": "user", "content": f"{context}\n\n{question}"}
    answer = {"role": "assistant", "content": " Tavin\n"}
    more = {"role": "user", "content": "Who rules it?"}
    assert render([user], generate=True) == (
        "<bos><doc> Bavo lives in Tavin.\nX grows.\n\nMore.</doc><q> Where does Bavo live?<a>"
    )
    assert render([user, answer]) == tokenizer.chat(context, [(question, "Tavin")])
    assert render([user, answer, more, {"role": "assistant", "content": "Koro"}]) == tokenizer.chat(
        context, [(question, "Tavin"), ("Who rules it?", "Koro")]
    )
    assert render([more], generate=True) == "<bos><q> Who rules it?<a>"
    system = {"role": "system", "content": "Use one word."}
    assert render([system, user, answer]) == tokenizer.chat(context, [(question, "Tavin")], "Use one word.")


def test_the_context_is_a_token_prefix_of_every_prompt_about_it():
    """What lets a base cache of the context serve all questions."""
    prefix = TINY.encode("<bos><doc> Bavo lives in Tavin.</doc>").ids
    for question in ("Where?", "1 plus 1?", "世?"):
        ids = TINY.encode(render([{"role": "user", "content": f"Bavo lives in Tavin.\n\n{question}"}], True)).ids
        assert ids[: len(prefix)] == prefix


def test_common_knowledge_is_fixed_and_unambiguous():
    assert 150 <= len(COMMON_FACTS) <= 320
    asked = {ask(fact, form): fact.answer for fact in COMMON_FACTS for form in range(forms(fact))}
    assert len(asked) == sum(forms(fact) for fact in COMMON_FACTS)
    for fact in COMMON_FACTS:
        options = choices(fact, 0)
        assert len(options) == len(set(options)) >= 3
        assert fact.answer in options
        assert options == choices(fact, 0)
