"""What a base looks like: one frozen dataclass for every supported family, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from memjax.errors import WeightsError

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
_MODEL_TYPES: dict[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mistral": "mistral",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_ACTIVATIONS: dict[str, str] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` (position interpolation) or `llama3` (by wavelength)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and family traits of a decoder; static and hashable, so it may be an argument of `jax.jit`.

    `local` marks the layers whose attention is limited to the last `window` tokens; `None` means that no layer is.
    """

    family: str
    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    norm_eps: float = 1e-5
    tied: bool = True
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    activation: str = "silu"
    query_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    window: int | None = None
    local: tuple[bool, ...] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise WeightsError(
                f"{self.num_heads} query heads cannot be grouped over {self.num_kv_heads} key/value heads; "
                "check num_attention_heads and num_key_value_heads in config.json"
            )
        if self.local is not None and (self.window is None or len(self.local) != self.num_layers):
            raise WeightsError(
                f"config.json marks {len(self.local)} of {self.num_layers} layers as local or full and a window of "
                f"{self.window}; give one mark per layer and a sliding_window"
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """The config of a Hugging Face `config.json`; WeightsError for an architecture or trait that is not supported."""
        family = _family(hf)
        head_size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        activation = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
        if activation == "gelu" and family.startswith("gemma"):
            activation = "gelu_pytorch_tanh"
        if activation not in _ACTIVATIONS:
            raise WeightsError(f"activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        for trait in ("attention_bias", "mlp_bias", "attention_multiplier"):
            if hf.get(trait) and not (trait == "attention_bias" and family.startswith("qwen2")):
                raise WeightsError(f"config.json sets {trait}={hf[trait]!r}, which {family} here does not support")
        theta, local_theta, scaling = _rope(hf, family)
        window, local = _windows(hf, family)
        gemma = family.startswith("gemma")
        eos = hf.get("eos_token_id")
        return cls(
            family=family,
            vocab_size=hf["vocab_size"],
            num_layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            mlp_width=hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_size=head_size,
            max_positions=hf.get("max_position_embeddings", 8192 if gemma else 2048),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings", gemma),
            rope_theta=theta,
            rope_local_theta=local_theta,
            rope_scaling=scaling,
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "gemma3"),
            post_norms=gemma,
            norm_offset=1.0 if gemma else 0.0,
            embed_scale=math.sqrt(hf["hidden_size"]) if gemma else 1.0,
            activation=_ACTIVATIONS[activation],
            query_scale=(hf.get("query_pre_attn_scalar", 256) if gemma else head_size) ** -0.5,
            attn_softcap=hf.get("attn_logit_softcapping", 50.0) if family == "gemma2" else None,
            final_softcap=hf.get("final_logit_softcapping", 30.0) if family == "gemma2" else None,
            window=window,
            local=local,
            bos_id=hf.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )


def _family(hf: dict[str, Any]) -> str:
    names = hf.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and hf.get("model_type") in _MODEL_TYPES:
        return _MODEL_TYPES[hf["model_type"]]
    named = ", ".join(names) or hf.get("model_type", "unknown")
    raise WeightsError(f"architecture {named} is not supported; supported: {', '.join(ARCHITECTURES)}")


def _rope(hf: dict[str, Any], family: str) -> tuple[float, float | None, RopeScaling | None]:
    """(theta, theta of local layers, scaling): transformers 5 nests them in `rope_parameters`, 4 keeps them flat."""
    nested = hf.get("rope_parameters") or {}
    full = nested.get("full_attention", nested)
    local = nested.get("sliding_attention", {})
    theta = full.get("rope_theta") or hf.get("rope_theta") or (1e6 if family == "gemma3" else 10_000.0)
    local_theta = None
    if family == "gemma3":
        local_theta = float(local.get("rope_theta") or hf.get("rope_local_base_freq") or 10_000.0)
    raw = hf.get("rope_scaling") or full
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise WeightsError(f"RoPE scaling {kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}")
    if kind == "default":
        return float(theta), local_theta, None
    scaling = RopeScaling(
        kind=kind,
        factor=float(raw["factor"]),
        low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
        high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
        original_max_positions=int(raw.get("original_max_position_embeddings", 8192)),
    )
    return float(theta), local_theta, scaling


def _windows(hf: dict[str, Any], family: str) -> tuple[int | None, tuple[bool, ...] | None]:
    """(window, which layers are local), following each family's own rule where `layer_types` is absent."""
    window, num_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if window is None or family == "llama":
        return None, None
    if family in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False):
        return None, None
    if hf.get("layer_types"):
        local = tuple(kind == "sliding_attention" for kind in hf["layer_types"])
    elif family == "mistral":
        local = (True,) * num_layers
    elif family == "gemma2":
        local = tuple(i % 2 == 0 for i in range(num_layers))
    elif family == "gemma3":
        period = hf.get("sliding_window_pattern", 6)
        local = tuple((i + 1) % period != 0 for i in range(num_layers))
    else:
        local = tuple(i >= hf.get("max_window_layers", num_layers) for i in range(num_layers))
    return (window, local) if any(local) else (None, None)
