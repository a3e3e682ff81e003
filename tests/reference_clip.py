"""CLIP with deep prompts, written plainly from the equations: the oracle of the exactness tests.

It shares no code with capt_peft or transformers: it reads tensors by name and computes everything one layer after another
(Radford et al. 2021; prompts as in MaPLe, arXiv 2210.03117, Section 3.2, and FAP, arXiv 2403.14774).
"""

import math

import torch


def attention(x, w, name, heads, causal, weights=None):
    """x: (L, d), one sequence at a time, one head at a time; weights: (L,), of each token as a key, all 1 by default."""
    length, dim = x.shape
    size = dim // heads
    q, k, v = (x @ w[f"{name}.{part}_proj.weight"].T + w[f"{name}.{part}_proj.bias"] for part in ("q", "k", "v"))
    outputs = []
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        scores = q[:, cut] @ k[:, cut].T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.triu(torch.ones(length, length, dtype=torch.bool), 1), float("-inf"))
        shares = torch.softmax(scores, -1)
        if weights is not None:
            shares = shares * weights / (shares * weights).sum(-1, keepdim=True)
        outputs.append(shares @ v[:, cut])
    return torch.cat(outputs, -1) @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def layer_norm(x, w, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(x, w, name, heads, causal, weights=None):
    x = x + attention(layer_norm(x, w, f"{name}.layer_norm1"), w, f"{name}.self_attn", heads, causal, weights)
    hidden = layer_norm(x, w, f"{name}.layer_norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    return x + hidden @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]


def deep_prompts(adapter, coupling, depth, config):
    """Returns the text and the vision prompts of each layer, {layer: (n, d)}, from the tensors of a saved adapter."""

    def stored(tower, layer, kind):
        inner = {"text": "embeddings.token_embedding", "vision": "embeddings"}[tower]
        place = inner if layer == 0 else f"encoder.layers.{layer}"
        return adapter.get(f"base_model.model.{tower}_model.{place}.{kind}")

    def mapped(prompts, tower, layer):
        return prompts @ stored(tower, layer, "capt_proj.weight").T + stored(tower, layer, "capt_proj.bias")

    text, vision = {}, {}
    for layer in range(max(depth)):
        if coupling == "none":
            text[layer], vision[layer] = stored("text", layer, "capt_prompt"), stored("vision", layer, "capt_prompt")
        elif coupling == "text_to_vision" or layer == 0:
            text[layer] = stored("text", layer, "capt_prompt")
            vision[layer] = mapped(text[layer], "vision", layer)
        else:
            vision[layer] = stored("vision", layer, "capt_prompt")
            text[layer] = mapped(vision[layer], "text", layer)
    return text, vision


def text_features(w, config, ids, prompts, strength=1):
    """ids: one text, a list of token ids; prompts: {layer: (n, d)}, None where a layer has none."""
    ids = torch.tensor(ids)
    x = w["text_model.embeddings.token_embedding.weight"][ids]
    if prompts.get(0) is not None:
        places = slice(1, 1 + len(prompts[0]))
        x[places] = (1 - strength) * x[places] + strength * prompts[0]
    x = x + w["text_model.embeddings.position_embedding.weight"][: len(ids)]
    for layer in range(config.num_hidden_layers):
        if layer > 0 and prompts.get(layer) is not None:
            x = x.clone()
            places = slice(1, 1 + len(prompts[layer]))
            x[places] = (1 - strength) * x[places] + strength * prompts[layer]
        x = block(x, w, f"text_model.encoder.layers.{layer}", config.num_attention_heads, causal=True)
    x = layer_norm(x, w, "text_model.final_layer_norm")
    # OpenAI's rule: the highest id is the end token; it is the first of its kind in both of transformers' conventions
    return x[int(ids.argmax())] @ w["text_projection.weight"].T


def image_features(w, config, image, prompts, strength=1):
    """image: (3, H, W) normalised pixels."""
    size, patches = config.patch_size, []
    for top in range(0, config.image_size, size):
        for left in range(0, config.image_size, size):
            patch = image[:, top : top + size, left : left + size]
            patches.append((w["vision_model.embeddings.patch_embedding.weight"] * patch).sum((1, 2, 3)))
    x = torch.stack([w["vision_model.embeddings.class_embedding"], *patches])
    x = x + w["vision_model.embeddings.position_embedding.weight"]
    end = len(x)
    if prompts.get(0) is not None:
        x = torch.cat([x, prompts[0]])
    x = layer_norm(x, w, "vision_model.pre_layrnorm")
    for layer in range(config.num_hidden_layers):
        if layer > 0 and prompts.get(layer) is not None:
            x = torch.cat([x[:end], prompts[layer]])
        weights = torch.ones(len(x))
        weights[end:] = strength
        x = block(
            x, w, f"vision_model.encoder.layers.{layer}", config.num_attention_heads, causal=False, weights=weights
        )
    return layer_norm(x[0], w, "vision_model.post_layernorm") @ w["visual_projection.weight"].T
