"""Makes doc_to_lora.npz: a tiny Doc-to-LoRA hypernetwork under the published names, and what it makes of random features.

Run once where torch is installed; it is not needed to run the tests:

    python tests/goldens/make_doc_to_lora.py

Written from the paper's listing and its description (arXiv 2602.15902), with torch's own layers and not with memjax. Two
networks: `layers/` reads one feature map per layer for two modules, `early/` one map for all layers and one module. Saved
for each: every tensor under its published name behind `layers/weights/` or `early/weights/`, features [L, N, D] or [N, D]
of one chunk, and A/MODULE [L, r, I], B/MODULE [L, r, F].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
SEED, TOKENS = 3, 11
LAYERS, WIDTH, INNER = 3, 32, 48  # of the base
RANK, D, HEADS, KV, SIZE = 2, 16, 4, 2, 8
MODULES = {"down_proj": (INNER, WIDTH), "up_proj": (WIDTH, INNER)}


class Gated(nn.Module):
    def __init__(self, size_in, hidden, size_out):
        super().__init__()
        self.gate_proj = nn.Linear(size_in, hidden, bias=False)
        self.up_proj = nn.Linear(size_in, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size_out, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(D, HEADS * SIZE, bias=False)
        self.k_proj = nn.Linear(D, KV * SIZE, bias=False)
        self.v_proj = nn.Linear(D, KV * SIZE, bias=False)
        self.o_proj = nn.Linear(HEADS * SIZE, D, bias=False)

    def forward(self, latents, context):
        q = self.q_proj(latents).unflatten(-1, (HEADS, SIZE)).transpose(0, 1)
        k, v = (x.unflatten(-1, (KV, SIZE)).transpose(0, 1) for x in (self.k_proj(context), self.v_proj(context)))
        k, v = (x.repeat_interleave(HEADS // KV, dim=0) for x in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        norm = lambda: nn.RMSNorm(D, eps=1e-6)
        self.input_latents_layernorm, self.input_context_layernorm = norm(), norm()
        self.post_attention_layernorm, self.pre_ff_layernorm, self.post_ff_layernorm = norm(), norm(), norm()
        self.self_attn = Attention()
        self.mlp = Gated(D, 4 * D, D)

    def forward(self, latents, context):
        read = self.self_attn(self.input_latents_layernorm(latents), self.input_context_layernorm(context))
        latents = latents + self.post_attention_layernorm(read)
        return latents + self.post_ff_layernorm(self.mlp(self.pre_ff_layernorm(latents)))


class Resampler(nn.Module):
    def __init__(self, latents, blocks):
        super().__init__()
        self.latents_q = nn.Parameter(torch.randn(latents, D))
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.layernorm = nn.RMSNorm(D, eps=1e-6)

    def forward(self, context):
        latents = self.latents_q
        for layer in self.layers:
            latents = layer(latents, context)
        return self.layernorm(latents)


class PerLayer(nn.Module):
    """A linear map per layer; the bias is stored with axes of one for modules and ranks."""

    def __init__(self, size_in, size_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(LAYERS, size_in, size_out) * size_in**-0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(LAYERS, 1, 1, size_out))

    def forward(self, x):  # [L, M, r, size_in]
        return torch.einsum("lmrd,ldk->lmrk", x, self.weight) + self.bias


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(D), PerLayer(D, 4 * D), nn.SiLU(), PerLayer(4 * D, D), nn.LayerNorm(D))

    def forward(self, x):
        return x + self.layers(x)


class Perceiver(nn.Module):
    def __init__(self, latents, blocks, emitted):
        super().__init__()
        self.modality_projection = Gated(WIDTH, 4 * WIDTH, D)
        self.encoder, self.decoder = Resampler(latents, blocks), Resampler(emitted, 1)

    def forward(self, features):
        return self.decoder(self.encoder(self.modality_projection(features)))


class Network(nn.Module):
    def __init__(self, modules, early, latents, blocks):
        super().__init__()
        self.modules_, self.early = sorted(modules), early
        self.aggregator = nn.ModuleDict(
            {"perceiver": Perceiver(latents, blocks, len(modules) * RANK * (LAYERS if early else 1))}
        )
        self.layers = nn.Sequential(Residual())
        emitted = max(sum(MODULES[m]) for m in modules)
        shape = (LAYERS, D, emitted) if len(modules) == 1 else (LAYERS, len(modules), D, emitted)
        self.head = nn.ParameterDict({"weight": torch.randn(shape)})
        draw = lambda which: nn.ParameterDict({m: torch.randn(LAYERS, RANK, MODULES[m][which]) for m in modules})
        scale = lambda: nn.ParameterDict({m: 1 + 0.3 * torch.randn(1, LAYERS, RANK, 1) for m in modules})
        self.bias_A, self.bias_B, self.scaler_A, self.scaler_B = draw(0), draw(1), scale(), scale()

    def forward(self, features):
        perceiver = self.aggregator["perceiver"]
        if self.early:
            e = perceiver(features)
        else:
            e = torch.cat([perceiver(features[layer]) for layer in range(LAYERS)])
        e = self.layers(e.reshape(LAYERS, len(self.modules_), RANK, D))
        e = e / torch.linalg.vector_norm(e, dim=-1, keepdim=True)
        head = self.head["weight"].reshape(LAYERS, len(self.modules_), D, -1)
        made = {}
        for m, module in enumerate(self.modules_):
            y = torch.einsum("lrd,ldp->lrp", e[:, m], head[:, m])
            size_in, size_out = MODULES[module]
            made[f"A/{module}"] = y[..., :size_in] * self.scaler_A[module][0]
            made[f"B/{module}"] = y[..., size_in : size_in + size_out] * self.scaler_B[module][0]
        return made


def main() -> None:
    torch.manual_seed(SEED)
    saved = {"versions": np.asarray(f"torch {torch.__version__}, seed {SEED}")}
    for name, network, shape in (
        ("layers", Network(list(MODULES), False, latents=3, blocks=2), (LAYERS, TOKENS, WIDTH)),
        ("early", Network(["down_proj"], True, latents=5, blocks=1), (TOKENS, WIDTH)),
    ):
        for parameter in network.parameters():
            if parameter.ndim == 1:  # norms that are not one, biases that are not zero
                parameter.data += 0.1 * torch.randn_like(parameter)
        features = torch.randn(shape)
        with torch.no_grad():
            made = network(features)
        saved[f"{name}/features"] = features.numpy()
        saved |= {f"{name}/{key}": value.numpy() for key, value in made.items()}
        saved |= {f"{name}/weights/{key}": value.numpy() for key, value in network.state_dict().items()}
    np.savez_compressed(HERE / "doc_to_lora.npz", **saved)


if __name__ == "__main__":
    main()
