"""CLIPs of random weights in OpenAI's own layout, and an independent forward in it, which reads the state dict as it is."""

from argparse import Namespace
from collections import OrderedDict

import torch
from torch import nn
from transformers import CLIPModel

VOCABULARY = 737  # tiny CLIP's, so that its tokenizer fits
SMALL = {
    "patch": 8, "grid": 4, "vision_width": 128, "vision_layers": 3, "text_width": 64, "text_layers": 2, "context": 20,
    "vocabulary": VOCABULARY, "features": 48,
}  # fmt: skip
VIT_B32 = {
    "patch": 32, "grid": 7, "vision_width": 768, "vision_layers": 12, "text_width": 512, "text_layers": 12, "context": 77,
    "vocabulary": 49408, "features": 512,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ state dicts


def openai_state_dict(shapes, seed=0):
    """A whole random CLIP by OpenAI's names. No tensor is constant: a bias or a norm that is lost changes the result."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape, scale):
        return torch.randn(shape, generator=generator) * scale

    def norm(name, width):
        return {f"{name}.weight": 1 + tensor(width, scale=0.1), f"{name}.bias": tensor(width, scale=0.1)}

    def linear(weight, bias, outputs, inputs):
        return {weight: tensor(outputs, inputs, scale=inputs**-0.5), bias: tensor(outputs, scale=0.1)}

    def blocks(prefix, width, layers):
        state = {}
        for i in range(layers):
            p = f"{prefix}transformer.resblocks.{i}"
            state |= linear(f"{p}.attn.in_proj_weight", f"{p}.attn.in_proj_bias", 3 * width, width)
            state |= linear(f"{p}.attn.out_proj.weight", f"{p}.attn.out_proj.bias", width, width)
            state |= linear(f"{p}.mlp.c_fc.weight", f"{p}.mlp.c_fc.bias", 4 * width, width)
            state |= linear(f"{p}.mlp.c_proj.weight", f"{p}.mlp.c_proj.bias", width, 4 * width)
            state |= norm(f"{p}.ln_1", width) | norm(f"{p}.ln_2", width)
        return state

    s, v, t = Namespace(**shapes), shapes["vision_width"], shapes["text_width"]
    state = {
        "visual.class_embedding": tensor(v, scale=0.3),
        "visual.positional_embedding": tensor(s.grid**2 + 1, v, scale=0.3),
        "visual.proj": tensor(v, s.features, scale=v**-0.5),
        "visual.conv1.weight": tensor(v, 3, s.patch, s.patch, scale=s.patch**-1.0),
        "token_embedding.weight": tensor(s.vocabulary, t, scale=0.3),
        "positional_embedding": tensor(s.context, t, scale=0.3),
        "text_projection": tensor(t, s.features, scale=t**-0.5),
        "logit_scale": torch.tensor(4.6052),
    }
    state |= norm("visual.ln_pre", v) | norm("visual.ln_post", v) | norm("ln_final", t)
    return state | blocks("visual.", v, s.vision_layers) | blocks("", t, s.text_layers)


def vision_alone(state):
    """What `model.visual.state_dict()` gives: the names without `visual.`."""
    return OrderedDict((n.removeprefix("visual."), t) for n, t in state.items() if n.startswith("visual."))


# ---------------------------------------------------------------------------------------------- independent forward


class Block(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.activation = activation

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def run_blocks(state, prefix, x, mask, activation):
    """x: (L, B, d). One block at a time is built and filled strictly with its own tensors."""
    start, i = f"{prefix}transformer.resblocks.", 0
    while any(name.startswith(f"{start}{i}.") for name in state):
        with torch.device("meta"):
            layer = Block(x.shape[-1], activation)
        own = {n.removeprefix(f"{start}{i}."): t.float() for n, t in state.items() if n.startswith(f"{start}{i}.")}
        layer.load_state_dict(own, strict=True, assign=True)
        x, i = layer.eval()(x, mask), i + 1
    return x


def norm(state, name, x):
    return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"].float(), state[f"{name}.bias"].float())


@torch.no_grad()
def image_features(state, images, activation=quick_gelu):
    weight = state["visual.conv1.weight"].float()
    x = nn.functional.conv2d(images, weight, stride=weight.shape[-1]).flatten(2).permute(2, 0, 1)  # (L, B, d)
    x = torch.cat([state["visual.class_embedding"].float().expand(1, len(images), -1), x])
    x = norm(state, "visual.ln_pre", x + state["visual.positional_embedding"].float()[:, None])
    x = run_blocks(state, "visual.", x, None, activation)
    return norm(state, "visual.ln_post", x[0]) @ state["visual.proj"].float()


@torch.no_grad()
def text_features(state, ids, activation=quick_gelu):
    length = ids.shape[1]
    x = (state["token_embedding.weight"].float()[ids] + state["positional_embedding"].float()[:length]).permute(1, 0, 2)
    mask = torch.full((length, length), float("-inf")).triu(1)
    x = norm(state, "ln_final", run_blocks(state, "", x, mask, activation)).permute(1, 0, 2)
    return x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"].float()


def inputs(shapes):
    """Images, and texts that end at different places; the end token is the highest id."""
    generator = torch.Generator().manual_seed(1)
    side = shapes["patch"] * shapes["grid"]
    ids = torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 4)):
        ids[row, :length] = torch.randint(1, shapes["vocabulary"] - 2, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = shapes["vocabulary"] - 2, shapes["vocabulary"] - 1
    return torch.randn(2, 3, side, side, generator=generator), ids


def assert_same_model(model, state, shapes, activation=quick_gelu, text_state=None):
    """The features of the converted model, or folder, are those of the independent forward of the original tensors."""
    model = (model if isinstance(model, CLIPModel) else CLIPModel.from_pretrained(model)).eval()
    images, ids = inputs(shapes)
    text_state = state if text_state is None else text_state
    with torch.no_grad():
        found = model.get_image_features(pixel_values=images).pooler_output, model.get_text_features(ids).pooler_output
    expected = image_features(state, images, activation), text_features(text_state, ids, activation)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-5
        assert theirs.std(0).mean() > 0.1  # the inputs matter
    assert torch.equal(model.logit_scale.detach(), text_state["logit_scale"].float())
    return model


def fine_tuned(state):
    """The image tower a little further on, as fine-tuning leaves it."""
    other = openai_state_dict(SMALL, seed=9)
    return {name: tensor + 0.2 * other[name] if tensor.ndim else tensor for name, tensor in state.items()}
