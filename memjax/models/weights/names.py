"""Which tensor is which: one table from Hugging Face names to our parameter tree, one from GGUF names to those.

A table is a tuple of rules. `match` pairs it with the tensors that a file holds: every tensor is used once and every
rule is met once (once per layer where the source has a `{layer}`), or loading stops with both lists.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from memjax.errors import WeightsError
from memjax.models.config import ModelConfig

SITE_MODULES: dict[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

# Buffers that old checkpoints carry and that are computed from the config here.
IGNORED: tuple[re.Pattern[str], ...] = (re.compile(r"(.+\.)?rotary_emb(_local)?\.inv_freq"),)
TIED_HEAD = "lm_head.weight"  # allowed beside a tied embedding, where it must be the same matrix

GGUF_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
GGUF_IGNORED: tuple[re.Pattern[str], ...] = (re.compile(r"rope_freqs\.weight"),)  # read into the config instead


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table: the tensor `source` goes to `target` by `transform`.

    In the Hugging Face table a target is a dotted path of our tree and the transform is keep | transpose ([out, in]
    to [in, out]). In the GGUF table a target is a Hugging Face name and the transform is keep | unpermute_q |
    unpermute_k | minus_one.
    """

    source: str
    target: str
    transform: str = "keep"

    @property
    def layered(self) -> bool:
        """Whether the rule stands for one tensor per layer."""
        return "{layer}" in self.source


@dataclasses.dataclass(frozen=True)
class Placement:
    """A rule met by a tensor: `layer` is None for tensors outside the stack."""

    source: str
    target: str
    transform: str
    layer: int | None


def hf_table(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules for a model of this config under Hugging Face's names."""
    layer = "model.layers.{layer}."
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norms:
        norms = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attn_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "post_mlp_norm",
        }
    rules = [Rule("model.embed_tokens.weight", "embed"), Rule("model.norm.weight", "final_norm")]
    rules += [Rule(f"{layer}{module}.weight", f"layers.{site}", "transpose") for site, module in SITE_MODULES.items()]
    rules += [Rule(f"{layer}{module}.weight", f"layers.{ours}") for module, ours in norms.items()]
    if config.qkv_bias:
        rules += [Rule(f"{layer}{SITE_MODULES[site]}.bias", f"layers.{site}_bias") for site in "qkv"]
    if config.qk_norm:
        rules += [Rule(f"{layer}self_attn.{side}_norm.weight", f"layers.{side}_norm") for side in "qk"]
    if not config.tied:
        rules.append(Rule(TIED_HEAD, "head", "transpose"))
    return tuple(rules)


def gguf_table(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules that turn a GGUF file's tensors into Hugging Face's, for a model of this config.

    llama.cpp stores the q and k rows of the llama architecture with the two halves of each head interleaved, and
    Gemma's norms as w + 1 (convert_hf_to_gguf.py, `LlamaModel.permute` and `Gemma2Model.modify_tensors`).
    """
    ours = {rule.target: rule.source for rule in hf_table(config)}
    block, norm = "blk.{layer}.", "minus_one" if config.norm_offset else "keep"
    permuted = config.family in ("llama", "mistral")
    transforms = {"q": "unpermute_q", "k": "unpermute_k"} if permuted else {}
    sites = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    norms = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
    if config.post_norms:
        norms |= {"post_attn_norm": "post_attention_norm", "post_mlp_norm": "post_ffw_norm"}
    if config.qk_norm:
        norms |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    rules = [Rule("token_embd.weight", ours["embed"]), Rule("output_norm.weight", ours["final_norm"], norm)]
    rules += [
        Rule(f"{block}{name}.weight", ours[f"layers.{site}"], transforms.get(site, "keep")) for site, name in sites.items()
    ]
    rules += [Rule(f"{block}{name}.weight", ours[f"layers.{leaf}"], norm) for leaf, name in norms.items()]
    if config.qkv_bias:
        rules += [Rule(f"{block}{sites[site]}.bias", ours[f"layers.{site}_bias"]) for site in "qkv"]
    if not config.tied:
        rules.append(Rule("output.weight", ours["head"]))
    return tuple(rules)


def match(
    table: Iterable[Rule],
    sources: Collection[str],
    num_layers: int,
    *,
    where: str,
    ignored: Iterable[re.Pattern[str]] = (),
) -> list[Placement]:
    """The placements that fill every rule of `table` from the tensors named in `sources`, in table order.

    WeightsError naming the missing and the unexpected tensors of `where`.
    """
    placements: dict[str, Placement] = {}
    for rule in table:
        for layer in range(num_layers) if rule.layered else (None,):
            name, target = (text.replace("{layer}", str(layer)) for text in (rule.source, rule.target))
            placements[name] = Placement(name, target, rule.transform, layer)
    unexpected = [
        name for name in sources if name not in placements and not any(pattern.fullmatch(name) for pattern in ignored)
    ]
    held = set(sources)
    missing = [name for name in placements if name not in held]
    if missing or unexpected:
        raise WeightsError(f"{where} does not fit its config: {both_lists(missing, unexpected)}")
    return list(placements.values())


def check_targets(placements: Iterable[Placement], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """WeightsError unless every leaf of the tree `shapes` {dotted path: shape} is filled exactly once by `placements`.

    This guards the tables themselves: a rule that is forgotten or doubled is found at the first load of that family.
    """
    wanted = {
        (path, layer)
        for path, shape in shapes.items()
        for layer in (range(shape[0]) if path.startswith("layers.") else (None,))
    }
    filled = [(place.target, place.layer) for place in placements]
    doubled = {target for target in filled if filled.count(target) > 1} if len(filled) != len(set(filled)) else set()
    missing, unexpected = wanted - set(filled), set(filled) - wanted | doubled
    if missing or unexpected:
        label = sorted(_label(*target) for target in missing), sorted(_label(*target) for target in unexpected)
        raise WeightsError(f"the weight table does not fit the model's parameters: {both_lists(*label)}")


def both_lists(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """`missing: a, b; unexpected: none`, each cut after eight names."""
    return f"missing: {_names(missing)}; unexpected: {_names(unexpected)}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted path: leaf} of nested dicts."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from {dotted path: leaf}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *rooms, last = path.split(".")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[last] = leaf
    return tree


def _names(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _label(path: str, layer: int | None) -> str:
    return path if layer is None else f"{path}[{layer}]"
