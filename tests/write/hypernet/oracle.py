"""The hypernetwork of one chunk in NumPy, float64, with loops over heads, ranks and layers, from the paper's listing."""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, p):
    return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def rms(x, w):
    return w * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def layer_norm(x, w, b):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b


def block(config, p, ctx, lat):
    c, q = rms(ctx, p["context_norm"]), rms(lat, p["latent_norm"])
    size, shared = config.head_size, config.heads // config.kv_heads
    heads = []
    for h in range(config.heads):
        mine, theirs = slice(h * size, (h + 1) * size), slice(h // shared * size, (h // shared + 1) * size)
        scores = (q @ p["q"][:, mine]) @ (c @ p["k"][:, theirs]).T / np.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ (c @ p["v"][:, theirs]))
    lat = lat + rms(np.concatenate(heads, -1) @ p["o"], p["attn_out_norm"])
    return lat + rms(swiglu(rms(lat, p["mlp_norm"]), p), p["mlp_out_norm"])


def resample(config, p, ctx, blocks):
    lat = p["latents"]
    for i in range(blocks):
        lat = block(config, {name: x[i] for name, x in p["blocks"].items()}, ctx, lat)
    return rms(lat, p["out_norm"])


def factors(config, sizes, params, features, layers):
    """(a, b) as {site: [L, R, I or F]} of a chunk: features [L, N, D], or [N, D] where one map serves all layers."""
    sites = sorted(sizes)
    width = max(sum(size) for size in sizes.values())
    assert params["head"].shape[-1] == width
    a = {site: np.zeros((layers, config.rank, sizes[site][0])) for site in sites}
    b = {site: np.zeros((layers, config.rank, sizes[site][1])) for site in sites}
    for layer in range(layers):
        z = features if features.ndim == 2 else features[layer]
        lat = resample(config, params["encoder"], swiglu(z, params["project"]), config.blocks)
        out = resample(config, params["decoder"], lat, 1)
        for m, site in enumerate(sites):
            for r in range(config.rank):
                e = out[(layer * len(sites) + m) * config.rank + r if features.ndim == 2 else m * config.rank + r]
                p = params["mlp"]
                h = silu(layer_norm(e, p["in_norm"], p["in_norm_bias"]) @ p["up"][layer] + p["up_bias"][layer])
                e = e + layer_norm(h @ p["down"][layer] + p["down_bias"][layer], p["out_norm"], p["out_norm_bias"])
                y = e / np.linalg.norm(e) @ params["head"][layer, m]
                size_in, size_out = sizes[site]
                own = params["sites"][site]
                a[site][layer, r] = y[:size_in] * own["a_scale"][layer, r]
                b[site][layer, r] = y[size_in : size_in + size_out] * own["b_scale"][layer, r]
    return a, b
