"""A GGUF file as a Hugging Face folder: weights dequantised and put back in order, the rest from its metadata.

Every other part of memjax sees only such folders, so a GGUF base and its id behave like any other. Tensors that the
file holds unquantised keep their type, quantised ones become bfloat16.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from memjax.errors import WeightsError
from memjax.models.config import ModelConfig
from memjax.models.weights import names
from memjax.models.weights.gguf_tokenizer import tokenizer_files
from memjax.models.weights.hf import SINGLE, save_tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
UNQUANTISED: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F64": np.dtype(np.float64),
}
# (low_freq_factor, high_freq_factor, original_max_position_embeddings) of every published llama3 scaling
LLAMA3_SCALINGS = ((1.0, 4.0, 8192),)


class GGUF:
    """A GGUF file, memory-mapped: `metadata` values, `names`, `get(name)` as float32 [out, in] like Hugging Face's."""

    def __init__(self, path: str | Path) -> None:
        import gguf

        self.path = Path(path)
        try:
            reader = gguf.GGUFReader(self.path)
        except FileNotFoundError:
            raise WeightsError(f"{path} does not exist") from None
        except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
            raise WeightsError(f"{path} cannot be read as GGUF ({error}); fetch it again") from None
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """Every metadata value as a Python value."""
        return {key: field.contents() for key, field in self._fields.items()}

    @property
    def names(self) -> list[str]:
        """All tensor names, in file order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in NumPy's order; GGUF counts axes from the fastest."""
        return tuple(int(size) for size in self._tensors[name].shape[::-1])

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which the tensor is kept after conversion."""
        return UNQUANTISED.get(self._tensors[name].tensor_type.name, BFLOAT16)

    def get(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32."""
        import gguf

        tensor = self._tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise WeightsError(f"{name} in {self.path} is quantised as {kind}, which gguf cannot undo") from None


def convert(path: str | Path, folder: str | Path, on_tensor: Callable[[int, int], None] | None = None) -> None:
    """Writes the GGUF file at `path` into an existing `folder` as a Hugging Face folder.

    on_tensor(done, total) is called before each tensor. Raises WeightsError for an architecture, a tokenizer or a
    quantisation that is not supported and for tensors that are missing or unexpected.
    """
    file, folder = GGUF(path), Path(folder)
    hf_config = hf_config_of(file)
    config = ModelConfig.from_hf(hf_config)
    placements = names.match(
        names.gguf_table(config), file.names, config.num_layers, where=str(path), ignored=names.GGUF_IGNORED
    )
    documents = tokenizer_files(file.metadata, str(path))
    documents |= {"config.json": hf_config, "generation_config.json": _generation_config(hf_config)}
    for name, document in documents.items():
        text = json.dumps(document, ensure_ascii=False, indent=None if name == "tokenizer.json" else 1)
        (folder / name).write_text(text, encoding="utf-8")

    def make(index: int, place: names.Placement) -> np.ndarray:
        if on_tensor is not None:
            on_tensor(index, len(placements))
        return restore(file.get(place.source), place.transform, config)

    save_tensors(
        folder / SINGLE,
        (
            (place.target, file.dtype(place.source), file.shape(place.source), functools.partial(make, index, place))
            for index, place in enumerate(placements)
        ),
    )


def restore(array: np.ndarray, transform: str, config: ModelConfig) -> np.ndarray:
    """Undoes what llama.cpp's converter did to a tensor: `keep`, `minus_one`, `unpermute_q`, `unpermute_k`.

    llama.cpp rotates neighbouring pairs where Hugging Face rotates halves, so its q and k rows [heads * H, D] come as
    (head, H/2, 2) where Hugging Face has (head, 2, H/2).
    """
    if transform == "keep":
        return array
    if transform == "minus_one":
        return array - 1
    heads = {"unpermute_q": config.num_heads, "unpermute_k": config.num_kv_heads}[transform]
    split = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def hf_config_of(file: GGUF) -> dict[str, Any]:
    """Hugging Face's config.json for a GGUF file, from its metadata.

    WeightsError if the architecture is not supported or the metadata lacks what the config needs.
    """
    meta = file.metadata
    arch = meta.get("general.architecture", "unknown")
    if arch not in names.GGUF_ARCHITECTURES:
        supported = ", ".join(names.GGUF_ARCHITECTURES)
        raise WeightsError(f"{file.path} is of architecture {arch}, which is not supported; supported: {supported}")

    def value(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    keys = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    absent = [f"{arch}.{key}" for key in keys if value(key) is None]
    if absent or "token_embd.weight" not in file.names:
        raise WeightsError(f"{file.path} lacks {', '.join(absent) or 'token_embd.weight'}; it is not a complete model")
    width, heads = int(value("embedding_length")), int(value("attention.head_count"))
    config: dict[str, Any] = {
        "architectures": [names.GGUF_ARCHITECTURES[arch]],
        "model_type": "gemma3_text" if arch == "gemma3" else arch,
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": width,
        "intermediate_size": int(value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "head_dim": int(value("attention.key_length") or value("rope.dimension_count") or width // heads),
        "max_position_embeddings": int(value("context_length")),
        "rms_norm_eps": _short(value("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": _short(value("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.names,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(meta),
        "torch_dtype": "bfloat16",
    }
    if arch.startswith("gemma"):
        config |= _gemma_traits(arch, config, value)
    else:
        config["hidden_act"] = "silu"
    scaling = _rope_scaling(file, config, value)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _gemma_traits(arch: str, config: dict[str, Any], value: Callable[..., Any]) -> dict[str, Any]:
    # GGUF does not say how queries are scaled: llama.cpp divides by the head size except in the largest of each family.
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[arch]
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    traits: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": int(value("attention.sliding_window", {"gemma2": 4096, "gemma3": 1024}[arch])),
    }
    if arch == "gemma2":
        traits["attn_logit_softcapping"] = _short(value("attn_logit_softcapping", 50.0))
        traits["final_logit_softcapping"] = _short(value("final_logit_softcapping", 30.0))
    else:
        traits["rope_local_base_freq"] = _short(value("rope.freq_base_swa", 10_000.0))
        pattern = value("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):
            traits["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
        else:
            traits["sliding_window_pattern"] = int(pattern)
    return traits


def _rope_scaling(file: GGUF, config: dict[str, Any], value: Callable[..., Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.names:
        return _llama3_scaling(file.get("rope_freqs.weight"), config, file.path)
    kind = value("rope.scaling.type") or "none"
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": _short(value("rope.scaling.factor", 1.0))}


def _llama3_scaling(factors: np.ndarray, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The llama3 scaling whose per-frequency divisors [H/2] are `factors`, the only trace of it in a GGUF file."""
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** exponents
    factor = float(np.round(factors.max(), 4))
    for low, high, window in LLAMA3_SCALINGS:
        smooth = np.clip((window / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": window,
            }
    raise WeightsError(f"the rope_freqs of {path} are no llama3 scaling that memjax knows; use its Hugging Face folder")


def _eos_ids(meta: dict[str, Any]) -> list[int] | int | None:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [int(meta[f"tokenizer.ggml.{key}"]) for key in keys if meta.get(f"tokenizer.ggml.{key}") is not None]
    unique = list(dict.fromkeys(found))
    return unique[0] if len(unique) == 1 else unique or None


def _generation_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    return {key: hf_config[key] for key in ("bos_token_id", "eos_token_id") if hf_config[key] is not None}


def _short(number: float) -> float:
    """A float32 of the file as the decimal that was meant: 9.999999747378752e-06 is 1e-05."""
    return float(np.format_float_positional(np.float32(number), unique=True))
