"""GGUF files made here in llama.cpp's layout give back the Hugging Face folder that they came from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from memjax.errors import WeightsError
from memjax.models.config import ModelConfig, RopeScaling
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights import load_folder
from memjax.models.weights.gguf import GGUF, convert
from memjax.models.weights.gguf_tokenizer import implied_merges, tokenizer_files
from memjax.models.weights.names import flatten
from tests.models import golden

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
TEXTS = [
    "The ferry leaves at 07:45, gate 12345.",
    "  two  spaces\n\n\tand a tab ",
    "naïve café 你好 🙂 don't I'LL",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


def gguf_name(name: str, gemma: bool) -> str:
    norms = {"post_attention_layernorm": "ffn_norm"}
    if gemma:
        norms = {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    name = name.replace("model.layers.", "blk.")
    for old, new in (HF_TO_GGUF | norms).items():
        stem, _, kind = name.rpartition(".")
        if stem == old or stem.endswith("." + old):
            return stem.removesuffix(old) + new + "." + kind
    raise AssertionError(name)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: convert_hf_to_gguf.py, LlamaModel.permute."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    name: str,
    arch: str,
    rope_freqs: np.ndarray | None = None,
    rope_theta: float | None = None,
    quantise: bool = False,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A GGUF file of the golden `name`, as llama.cpp's converter lays it out; the golden's config.json."""
    data = golden.read(name)
    config = json.loads(str(data["config"]))
    gemma = arch.startswith("gemma")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(rope_theta or ropes.get("full_attention", ropes)["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if gemma:
        writer.add_sliding_window(config["sliding_window"])
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{arch}.{key}", value)
    characters = [chr(code) for code in range(ord("!"), ord("!") + config["vocab_size"] - 4)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<pad>", "<s>", "</s>", *characters, "!!"])
    writer.add_token_types([3, 3, 3] + [1] * (len(characters) + 1))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    for key, array in golden.weights_of(data).items():
        if arch == "llama" and "q_proj" in key:
            array = permute(array, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in key:
            array = permute(array, config["num_key_value_heads"])
        if gemma and "norm" in key:
            array = array + 1
        target = gguf_name(key, gemma)
        if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert(path, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama_grouped_tied", "llama"),
        ("llama_untied", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3", "gemma3"),
    ],
)
def test_conversion_gives_back_weights_and_config(name: str, arch: str, tmp_path: Path) -> None:
    hf_config = write_gguf(tmp_path / "x.gguf", name, arch)
    loaded = load_folder(converted(tmp_path / "x.gguf", tmp_path / "out"))
    assert loaded.config == ModelConfig.from_hf(hf_config)
    original = load_folder(golden.write_folder(tmp_path / "hf", golden.read(name)))
    for path, leaf in flatten(original.params).items():
        # A Gemma norm went through w + 1 in float32; everything else is the same bits.
        atol = 1e-7 if arch == "gemma3" and "norm" in path else 0
        np.testing.assert_allclose(flatten(loaded.params)[path], leaf, rtol=0, atol=atol, err_msg=path)
    if arch != "gemma3":
        assert loaded.base_id == original.base_id


def test_quantised_tensors_become_bfloat16(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", "llama_grouped_tied", "llama", quantise=True)
    loaded = load_folder(converted(tmp_path / "x.gguf", tmp_path / "out"))
    original = load_folder(golden.write_folder(tmp_path / "hf", golden.read("llama_grouped_tied")))
    assert loaded.params["embed"].dtype == ml_dtypes.bfloat16
    for path, leaf in flatten(original.params).items():
        np.testing.assert_allclose(flatten(loaded.params)[path].astype(np.float32), leaf, rtol=0.01, atol=0.02)


def llama3_factors(theta: float, head_size: int) -> np.ndarray:
    """What convert_hf_to_gguf.py writes for a llama3 scaling by 32, low 1, high 4, window 8192."""
    factors = []
    for wavelength in 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size):
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / 32.0 + smooth))
    return np.asarray(factors, np.float32)


def test_llama3_rope_scaling_is_read_from_its_factors(tmp_path: Path) -> None:
    factors = llama3_factors(5e5, 8)
    assert factors[0] == 1 < factors[2] < factors[3] == 32  # all three branches
    write_gguf(tmp_path / "x.gguf", "llama_grouped_tied", "llama", factors, rope_theta=5e5)
    loaded = load_folder(converted(tmp_path / "x.gguf", tmp_path / "out"))
    assert loaded.config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    factors[2] *= 1.1
    write_gguf(tmp_path / "y.gguf", "llama_grouped_tied", "llama", factors, rope_theta=5e5)
    with pytest.raises(WeightsError, match="no llama3 scaling that memjax knows"):
        converted(tmp_path / "y.gguf", tmp_path / "out2")


def test_linear_rope_scaling(tmp_path: Path) -> None:
    extra = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "x.gguf", "gemma3", "gemma3", extra=extra)
    scaling = load_folder(converted(tmp_path / "x.gguf", tmp_path / "out")).config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


def test_conversion_reports_its_progress(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", "qwen2", "qwen2")
    seen: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    convert(tmp_path / "x.gguf", tmp_path / "out", lambda done, total: seen.append((done, total)))
    total = len(golden.weights_of(golden.read("qwen2")))
    assert seen == [(index, total) for index in range(total)]


def test_refusals_name_the_file_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(WeightsError, match=r"x\.gguf does not exist"):
        GGUF(path)
    path.write_bytes(b"not a GGUF file" * 10)
    with pytest.raises(WeightsError, match=r"x\.gguf cannot be read as GGUF"):
        GGUF(path)
    write_gguf(path, "qwen2", "mamba")
    with pytest.raises(WeightsError, match="architecture mamba, which is not supported; supported: llama, qwen2"):
        convert(path, tmp_path)
    write_gguf(path, "qwen2", "llama")  # biases that a llama has not
    with pytest.raises(WeightsError, match=r"missing: none; unexpected: blk\.0\.attn_k\.bias"):
        convert(path, tmp_path)


def bytes_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def trained(pre_tokenizer: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer with two control tokens, trained on the texts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=bytes_alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def metadata_of(backend: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """The tokenizer as a GGUF file stores it."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ bos_token }}",
    }


def rebuilt(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    for name, document in tokenizer_files(metadata, "x.gguf").items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def split_on(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer", "normalizer"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), None),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            None,
        ),
        ("qwen2", split_on(LETTERS + r"\p{N}" + REST), normalizers.NFC()),
        ("llama-bpe", split_on(LETTERS + r"\p{N}{1,3}" + REST), None),
    ],
)
def test_byte_level_tokenizer_is_rebuilt(pre: str, pre_tokenizer: Any, normalizer: Any, tmp_path: Path) -> None:
    reference = trained(pre_tokenizer, normalizer)
    tokenizer = rebuilt(metadata_of(reference, pre), tmp_path)
    for text in [*TEXTS, "cafe\u0301 1234567"]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        if normalizer is None:
            assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.prefix_ids) == (0, (1,), ())


def test_tokenizer_says_whether_it_starts_with_bos(tmp_path: Path) -> None:
    metadata = metadata_of(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2")
    assert rebuilt(metadata | {"tokenizer.ggml.add_bos_token": True}, tmp_path).prefix_ids == (0,)


def test_rows_that_only_pad_the_embedding_are_no_tokens(tmp_path: Path) -> None:
    metadata = metadata_of(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{size}]"]
    metadata["tokenizer.ggml.token_type"] += [5]
    assert rebuilt(metadata, tmp_path).vocab_size == size


def test_tokenizers_that_cannot_be_rebuilt_are_refused() -> None:
    metadata = metadata_of(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)), "default")
    with pytest.raises(WeightsError, match="pre-tokenizer 'default'; supported: gpt-2, smollm"):
        tokenizer_files(metadata, "x.gguf")
    broken = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["Z Q"]}
    with pytest.raises(WeightsError, match=r"x\.gguf has a tokenizer whose parts do not fit: .*ZQ"):
        tokenizer_files(metadata | broken, "x.gguf")
    with pytest.raises(WeightsError, match="of kind 't5'"):
        tokenizer_files(metadata | {"tokenizer.ggml.model": "t5"}, "x.gguf")
    with pytest.raises(WeightsError, match="holds no tokenizer"):
        tokenizer_files({}, "x.gguf")


def sentencepiece(text: str, tokens: list[str], rank: dict[str, float]) -> list[int]:
    """SentencePiece's BPE by its definition: join the best-ranked neighbours, leftmost first; bytes where unknown."""
    pieces = list(text)
    while True:
        joined = [(-rank[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in rank]
        if not joined:
            break
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids: list[int] = []
    for piece in pieces:
        names = [piece] if piece in rank else [f"<0x{byte:02X}>" for byte in piece.encode()]
        ids += [tokens.index(name) for name in names]
    return ids


SPM_PIECES = [*"etharyfslv▁", "th", "er", "▁th", "▁the", "fe", "ry", "▁fe", "rry", "▁ferry"]
SPM_PIECES += ["ve", "ves", "ea", "lea", "leaves", "▁leaves", "at", "▁at"]


def spm_metadata(arch: str, spaces: str, **extra: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary as a GGUF file stores it; `spaces` is how it spells a token of two spaces."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), spaces, *SPM_PIECES]
    types = [3, 3, 3, 2] + [6] * 256 + [4] + [1] * len(SPM_PIECES)
    return {
        "general.architecture": arch,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [float(-index) for index in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


SPM_TEXTS = ["the ferry leaves at 7", "the  ferry", "▁the", "leaves 你好 🙂 é", "at\nthe", " the", "rrry"]


@pytest.mark.parametrize("text", SPM_TEXTS)
def test_gemma_tokenizer_is_rebuilt(text: str, tmp_path: Path) -> None:
    metadata = spm_metadata("gemma3", "  ", scores=[0.0] * (261 + len(SPM_PIECES)), add_space_prefix=False)
    tokenizer = rebuilt(metadata, tmp_path)
    tokens = ["▁▁" if token == "  " else token for token in metadata["tokenizer.ggml.tokens"]]
    rank = {token: -tokens.index(token) for token in [*SPM_PIECES, "▁▁"]}
    assert tokenizer.encode(text) == sentencepiece(text.replace(" ", "▁"), tokens, rank)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    assert tokenizer.prefix_ids == (2,)


@pytest.mark.parametrize("text", SPM_TEXTS)
def test_llama_sentencepiece_tokenizer_is_rebuilt(text: str, tmp_path: Path) -> None:
    metadata = spm_metadata("llama", "▁▁")
    # Scores, not positions, order the merges here: let "ry" come before "er".
    scores = metadata["tokenizer.ggml.scores"]
    tokens = metadata["tokenizer.ggml.tokens"]
    scores[tokens.index("ry")] = -0.5
    tokenizer = rebuilt(metadata, tmp_path)
    rank = {token: scores[tokens.index(token)] for token in [*SPM_PIECES, "▁▁"]}
    assert tokenizer.encode(text) == sentencepiece("▁" + text.replace(" ", "▁"), tokens, rank)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_implied_merges_are_those_of_transformers() -> None:
    convert_slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    vocab = {token: index for index, token in enumerate(SPM_PIECES)}
    rank = {token: -float(index) for token, index in vocab.items()}
    assert [tuple(merge) for merge in implied_merges(vocab, rank)] == convert_slow.generate_merges(vocab, rank)
