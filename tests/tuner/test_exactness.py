"""Features agree with an independent computation from the equations, for each coupling and depth."""

import dataclasses

import pytest
import torch
from helpers import COUPLINGS, END, adapted, clip_inputs, random_clip
from peft import get_peft_model_state_dict
from reference_clip import deep_prompts, image_features, text_features

SHAPES = [
    # text depth, vision depth, text tokens, vision tokens
    (1, 1, 2, 2),
    (2, 2, 1, 1),
    (3, 3, 3, 3),
    (4, 4, 2, 2),
]
INDEPENDENT = [(0, 3, 2, 2), (3, 0, 2, 2), (4, 5, 1, 3), (2, 5, 3, 1), (1, 4, 2, 2), (4, 1, 2, 0), (4, 1, 0, 2)]
CASES = [(coupling, shape) for coupling in COUPLINGS for shape in SHAPES] + [("none", shape) for shape in INDEPENDENT]


def largest_error(model, coupling, shape, inputs, strength=1):
    depth = shape[:2]
    weights = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
    }
    config = model.config
    text, vision = deep_prompts(get_peft_model_state_dict(model), coupling, depth, config)
    with torch.no_grad():
        output = model(**inputs)
        errors = []
        for ids, features in zip(inputs["input_ids"], output.text_embeds, strict=True):
            expected = text_features(weights, config.text_config, ids[: ids.argmax() + 1].tolist(), text, strength)
            errors.append((features - expected / expected.norm()).abs().max().item())
        for image, features in zip(inputs["pixel_values"], output.image_embeds, strict=True):
            expected = image_features(weights, config.vision_config, image, vision, strength)
            errors.append((features - expected / expected.norm()).abs().max().item())
    return max(errors)


@pytest.mark.parametrize("eos_token_id", [END, 2], ids=["eos", "legacy eos"])
@pytest.mark.parametrize(("coupling", "shape"), CASES)
def test_features_equal_an_independent_computation(coupling, shape, eos_token_id):
    text_depth, vision_depth, text_tokens, vision_tokens = shape
    model = adapted(
        random_clip(eos_token_id=eos_token_id),
        coupling=coupling,
        text_depth=text_depth,
        vision_depth=vision_depth,
        num_text_tokens=text_tokens,
        num_vision_tokens=vision_tokens,
    )
    assert largest_error(model, coupling, shape, clip_inputs()) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("coupling", "shape"), [("none", (4, 5, 1, 3)), ("text_to_vision", (3, 3, 3, 3)), ("vision_to_text", (2, 2, 1, 1))]
)
def test_features_of_a_strength_equal_an_independent_computation(coupling, shape, strength, attention):
    names = ("text_depth", "vision_depth", "num_text_tokens", "num_vision_tokens")
    model = adapted(random_clip(), coupling=coupling, **dict(zip(names, shape, strict=True)))
    model.get_base_model().set_attn_implementation(attention)
    model.set_strength(strength)
    assert largest_error(model, coupling, shape, clip_inputs(), strength) < 1e-5


@pytest.mark.parametrize("lengths", [(6, 6, 6), (20, 9, 6)], ids=["short", "as long as possible"])
def test_texts_shorter_and_longer_than_usual_are_exact(lengths):
    model = adapted(random_clip(), text_depth=4, vision_depth=4)
    assert largest_error(model, "text_to_vision", (4, 4), clip_inputs(lengths=lengths)) < 1e-5


def test_the_oracle_notices_a_wrong_prompt():
    model = adapted(random_clip(), coupling="none", text_depth=3, vision_depth=3)
    inputs = clip_inputs()
    assert largest_error(model, "none", (3, 3), inputs) < 1e-5
    layer = model.base_model.model.text_model.encoder.layers[2]
    layer.site = dataclasses.replace(layer.site, start=2)  # the same adapter, written one token later
    assert largest_error(model, "none", (3, 3), inputs) > 1e-3


def test_padding_beyond_the_longest_text_changes_nothing():
    model = adapted(random_clip(), text_depth=4, vision_depth=4)
    inputs = clip_inputs()
    padded = torch.nn.functional.pad(inputs["input_ids"], (0, 12))
    with torch.no_grad():
        short = model(**inputs).text_embeds
        long = model(input_ids=padded, pixel_values=inputs["pixel_values"]).text_embeds
    torch.testing.assert_close(short, long, atol=1e-6, rtol=0)
