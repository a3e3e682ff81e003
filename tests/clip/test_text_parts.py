"""The class texts in parts: every text once, the same features and gradients, and memory that does not grow with the classes."""

import pytest
import torch
from helpers import TINY_CLIP, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.clip.texts import SIZE, WHOLE, split_texts

WORDS = ["red", "green apple", "big blue house", "old dog", "tree", "small white cat on it", "car", "seven"]


def texts(count, seed=0):
    """Token ids of `count` texts of different lengths; the first token says which text it is."""
    lengths = torch.randint(3, 12, (count,), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = mask * torch.arange(1, 13)
    ids[:, 0] = torch.arange(count)
    return {"input_ids": ids, "attention_mask": mask}


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 300), size=st.none() | st.integers(1, 40))
def test_every_text_is_run_and_comes_back_to_its_place(count, size):
    split = split_texts(texts(count), size)
    if split is None:
        assert count <= (size or WHOLE)
        return
    features = [part.inputs["input_ids"][:, :1] for part in split.parts]
    assert torch.equal(split.join(features)[:, 0], torch.arange(count))
    sizes = {len(part.rows) for part in split.parts}
    assert len(sizes) == 1 and (size is None or sizes.pop() <= size)
    assert sum(map(len, features)) - count < len(split.parts)  # what makes the parts equal is less than a text for each


def test_parts_are_cut_at_their_longest_text_unless_shapes_must_stay():
    inputs = texts(100)
    lengths = inputs["attention_mask"].sum(1)
    for part in split_texts(inputs, 10).parts:
        assert part.inputs["input_ids"].shape[1] == lengths[part.rows].max()
        assert torch.equal(part.inputs["attention_mask"].sum(1), lengths[part.rows])
    run = sum(part.inputs["input_ids"].numel() for part in split_texts(inputs, 10).parts)
    assert run < 1.15 * lengths.sum() < 0.75 * inputs["input_ids"].numel()
    assert all(part.inputs["input_ids"].shape == (10, 12) for part in split_texts(inputs, 10, cut=False).parts)


def test_the_default_is_one_part_up_to_256_texts_and_at_most_64_texts_a_part_above():
    assert split_texts(texts(WHOLE), None) is None
    parts = split_texts(texts(WHOLE + 1), None).parts
    assert [len(part.rows) for part in parts] == [52] * 5 and SIZE == 64


@pytest.fixture(params=[False, True], ids=["one context", "class-specific"])
def model(request):
    config = {"class_names": WORDS, "class_specific": True} if request.param else {}
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig(**config))
    shake(model)
    return model


def features_and_gradients(model, processor, size):
    classifier = ZeroShotClassifier(model.train(), processor, WORDS, text_chunk_size=size)
    model.zero_grad()
    features = classifier.encode_texts()
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return features.detach(), gradients


@pytest.mark.parametrize("size", [1, 3, 7])
def test_parts_give_the_features_and_gradients_of_the_whole(model, processor, size):
    whole, parts = (features_and_gradients(model, processor, s) for s in (None, size))
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    assert parts[1].keys() == whole[1].keys() and len(whole[1]) >= 2
    for name, gradient in whole[1].items():
        assert gradient.norm() > 1e-4 and (parts[1][name] - gradient).norm() < 1e-5 * gradient.norm()


def test_predictions_do_not_depend_on_the_parts(model, processor):
    model.eval()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = ZeroShotClassifier(model, processor, WORDS)(pixels)
    torch.testing.assert_close(ZeroShotClassifier(model, processor, WORDS, text_chunk_size=3)(pixels), whole)


def kept(model, processor, count, size):
    """Bytes that autograd keeps for the backward pass of `count` texts."""
    names = [f"{a} {b} {c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"][:count]
    classifier = ZeroShotClassifier(model.train(), processor, names, text_chunk_size=size)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size() * (tensor.requires_grad or tensor.grad_fn is not None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        classifier.encode_texts()
    return total


def test_what_is_kept_for_backward_does_not_grow_with_the_classes(processor):
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig())
    assert kept(model, processor, 200, None) > 3 * kept(model, processor, 50, None)
    few, many = (kept(model, processor, count, 25) for count in (50, 400))
    assert many < 0.05 * kept(model, processor, 200, None)
    assert few < 0.05 * kept(model, processor, 200, None)


def test_a_size_below_one_is_refused(model, processor):
    with pytest.raises(ValueError, match="text_chunk_size=0 must be at least 1"):
        ZeroShotClassifier(model, processor, WORDS, text_chunk_size=0)
