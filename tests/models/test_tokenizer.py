"""Tokenizers of any folder: prompts equal `transformers`' rendering, eos ids are complete, streaming loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from memjax.errors import InputError, WeightsError
from memjax.ids import bytes_hash, text_hash
from memjax.models.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
TEMPLATES = json.loads((GOLDENS / "templates.json").read_text(encoding="utf-8"))["templates"]
CHATML = (GOLDENS / "templates" / "smollm2.jinja").read_text(encoding="utf-8")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = "naïve café 你好 🙂🇬🇧 1234 👩‍👩‍👧 \ttab\n\nend "


def backend(bos: bool = False) -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose tokens are often parts of a character; it starts texts with <s> where `bos`."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["the theme of the thing"] * 9, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def write(folder: Path, bos: bool = False, **files: Any) -> Path:
    """A tokenizer folder; files are given by their stem."""
    (folder / "tokenizer.json").write_text(backend(bos).to_str(), encoding="utf-8")
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("golden", TEMPLATES, ids=lambda golden: golden["name"])
def test_prompts_equal_transformers_rendering(golden: dict[str, Any]) -> None:
    template = (GOLDENS / "templates" / f"{golden['name']}.jinja").read_text(encoding="utf-8")
    tokenizer = Tokenizer(backend().to_str().encode(), template=template, special=golden["special"])
    rendered = 0
    for case in golden["cases"]:
        arguments = (case["messages"], case["add_generation_prompt"])
        if case["rendered"] is None:
            with pytest.raises(InputError, match="chat template refuses this conversation"):
                tokenizer.apply_chat(*arguments, **case.get("variables", {}))
        else:
            assert tokenizer.apply_chat(*arguments, **case.get("variables", {})) == case["rendered"]
            rendered += 1
    assert rendered >= 5


def test_nothing_is_added_and_decoding_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, bos=True, tokenizer_config={"bos_token": "<s>"}))
    ids = tokenizer.encode(TEXT)
    assert 0 not in ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode("") == []
    assert tokenizer.vocab_size == backend().get_vocab_size() > 256 + len(SPECIAL)


def test_special_tokens_are_dropped_or_kept(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    ids = tokenizer.encode("<|im_start|>the<|im_end|>")
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, keep_special=True) == "<|im_start|>the<|im_end|>"


@pytest.mark.parametrize("text", [TEXT, "", "the", "🙂", "the <|im_end|>🙂 thing"])
def test_streamed_pieces_join_to_the_text(text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    ids, stream = tokenizer.encode(text), tokenizer.stream_decoder()
    pieces = [stream.push(index) for index in ids]
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""
    assert "".join(pieces) == tokenizer.decode(ids)


def test_streaming_an_unfinished_character_keeps_it_for_the_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    ids, stream = tokenizer.encode("the🙂")[:-1], tokenizer.stream_decoder()
    assert "".join(stream.push(index) for index in ids) == "the"
    assert stream.flush() == tokenizer.decode(ids)[3:] != ""
    assert stream.flush() == ""


def test_streaming_keeps_the_spaces_of_sentencepiece() -> None:
    made = tokenizers.SentencePieceBPETokenizer()
    made.train_from_iterator(["the cat sat on the mat"] * 9, vocab_size=40, show_progress=False)
    tokenizer = Tokenizer(made.to_str().encode())
    ids, stream = tokenizer.encode("the cat on the mat"), tokenizer.stream_decoder()
    assert "".join(stream.push(index) for index in ids) + stream.flush() == "the cat on the mat"


def test_eos_ids_come_from_every_file_and_the_template(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        generation_config={"eos_token_id": [9, 1]},
        config={"eos_token_id": 8},
        tokenizer_config={"eos_token": {"content": "</s>"}, "chat_template": CHATML},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == (9, 1, 8, 3)  # 3 is <|im_end|>, which only the template tells
    assert (tokenizer.id, tokenizer.template_id) == (
        bytes_hash((folder / "tokenizer.json").read_bytes()),
        text_hash(CHATML),
    )


@pytest.mark.parametrize("template", ["{{ bos_token }}", "{{ raise_exception('never') }}", "{{ messages[1].content }} x"])
def test_templates_that_tell_no_end_add_none(template: str, tmp_path: Path) -> None:
    config = {"chat_template": template, "eos_token": "</s>", "bos_token": "<s>"}
    assert Tokenizer.from_folder(write(tmp_path, tokenizer_config=config)).eos_ids == (1,)


@pytest.mark.parametrize("bos", [True, False])
def test_a_base_without_template_gets_the_plain_one(bos: bool, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path, bos=bos, tokenizer_config={"bos_token": "<s>"}))
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    start = "<s>" if bos else ""
    assert tokenizer.apply_chat(turns) == f"{start}Who?\nMe.\n"
    assert tokenizer.encode_chat(turns)[:1] == ([0] if bos else tokenizer.encode("W"))
    assert (tokenizer.prefix_ids, tokenizer.template_id, tokenizer.bos_id) == ((0,) if bos else (), "", 0)


def test_where_the_template_is_found(tmp_path: Path) -> None:
    def rendered(**config: Any) -> str:
        return Tokenizer.from_folder(write(tmp_path, **config)).apply_chat([{"role": "user", "content": "x"}])

    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "list"}]
    assert rendered(chat_template={"chat_template": "own json"}, tokenizer_config={}) == "own json"
    assert rendered(tokenizer_config={"chat_template": named}) == "list"
    assert rendered(tokenizer_config={"chat_template": "config"}) == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert rendered(tokenizer_config={"chat_template": "config"}) == "jinja"


def test_older_special_tokens_file(tmp_path: Path) -> None:
    folder = write(tmp_path, special_tokens_map={"eos_token": "</s>", "bos_token": {"content": "<s>"}})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "cannot be read"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "refuses"),
        ("{{ messages[0].content + missing.name }}", "refuses"),
        ("{{ messages[0].content + 1 }}", "refuses"),
    ],
)
def test_bad_templates_are_one_line_errors(template: str, message: str) -> None:
    tokenizer = Tokenizer(backend().to_str().encode(), template=template)
    with pytest.raises(InputError, match=message) as raised:
        tokenizer.apply_chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(raised.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(folder)


def test_a_folder_of_older_files_is_converted(tmp_path: Path) -> None:
    reference = backend()
    reference.model.save(str(tmp_path))  # vocab.json and merges.txt
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(TEXT) == reference.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WeightsError, match=r"has no tokenizer\.json and transformers cannot make one") as raised:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(raised.value)
