"""SigLIP with deep prompts, written plainly from the equations: the oracle of its exactness tests.

It shares no code with capt_peft or transformers (Zhai et al., arXiv 2303.15343; pooling by attention as in Zhai et al., arXiv
2106.04560). `prompts` are {layer: (n, d)}; `strength` is that of the adapter.
"""

import torch
from torch.nn.functional import gelu, layer_norm, linear

HEADS = 4


def attend(query, tokens, w, b, keys=None):
    """query: (Q, d), tokens: (L, d); w (3 d, d), b (3 d,): of query, key, value; keys: (L,), weights of the tokens."""
    q, k, v = (
        linear(x, *part).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        for x, *part in zip((query, tokens, tokens), w.chunk(3), b.chunk(3), strict=True)
    )
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    if keys is not None:
        shares = shares * keys / (shares * keys).sum(-1, keepdim=True)
    return (shares @ v).transpose(0, 1).flatten(1)


def norm(x, w, name):
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def mlp(x, w, name):
    hidden = gelu(linear(x, w[f"{name}.fc1.weight"], w[f"{name}.fc1.bias"]), approximate="tanh")
    return linear(hidden, w[f"{name}.fc2.weight"], w[f"{name}.fc2.bias"])


def block(x, w, name, keys=None):
    parts = [torch.cat([w[f"{name}.self_attn.{p}_proj.{kind}"] for p in "qkv"]) for kind in ("weight", "bias")]
    hidden = attend(*[norm(x, w, f"{name}.layer_norm1")] * 2, *parts, keys)
    x = x + linear(hidden, w[f"{name}.self_attn.out_proj.weight"], w[f"{name}.self_attn.out_proj.bias"])
    return x + mlp(norm(x, w, f"{name}.layer_norm2"), w, f"{name}.mlp")


def text_features(w, ids, prompts, layers, strength=1.0):
    """ids: (L,) with their padding. The prompts replace the first tokens; the features are those of the last one."""

    def write(x, layer):
        p = prompts.get(layer)
        return x if p is None else torch.cat([x[: len(p)] + strength * (p - x[: len(p)]), x[len(p) :]])

    x = write(w["text_model.embeddings.token_embedding.weight"][ids], 0)
    x = x + w["text_model.embeddings.position_embedding.weight"][: len(ids)]
    for layer in range(layers):
        x = block(write(x, layer) if layer else x, w, f"text_model.encoder.layers.{layer}")
    last = norm(x, w, "text_model.final_layer_norm")[-1]
    return linear(last, w["text_model.head.weight"], w["text_model.head.bias"])


def image_features(w, pixels, prompts, layers, strength=1.0):
    """pixels: (3, H, W), normalised. The prompts stand behind the patches, and the pooling head does not see them."""
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    patches = torch.nn.functional.conv2d(
        pixels[None], kernel, w["vision_model.embeddings.patch_embedding.bias"], kernel.shape[-1]
    )
    x = patches[0].flatten(1).T + w["vision_model.embeddings.position_embedding.weight"]
    count = len(x)
    for layer in range(layers):
        if layer in prompts:
            x = torch.cat([x[:count], prompts[layer]])
        keys = torch.ones(len(x), dtype=x.dtype)
        keys[count:] = strength
        x = block(x, w, f"vision_model.encoder.layers.{layer}", keys)
    x = norm(x[:count], w, "vision_model.post_layernorm")
    parts = [w[f"vision_model.head.attention.in_proj_{kind}"] for kind in ("weight", "bias")]
    x = attend(w["vision_model.head.probe"][0], x, *parts)
    x = linear(x, w["vision_model.head.attention.out_proj.weight"], w["vision_model.head.attention.out_proj.bias"])
    return (x + mlp(norm(x, w, "vision_model.head.layernorm"), w, "vision_model.head.mlp"))[0]
