"""TTC: its steps, its gate and its surrogate, against the same written down with derivatives by hand."""

import numpy as np
import pytest
import torch
from small_undefended import SmallUndefended, small_images

from capt_peft.defences import TTC, ttc


def purified_by_hand(images, noise, defence, *, smooth):
    """The published procedure on `SmallUndefended`, in NumPy; (B, 3, 4, 4)."""
    weight, x = SmallUndefended().weight.numpy(), images.numpy().reshape(len(images), -1)
    radius = defence.budget / 255

    def cut(change):
        return np.clip(np.clip(change, -radius, radius), -x, 1 - x)

    change = cut((2 * noise.numpy().reshape(x.shape) - 1) * radius)
    feature = np.tanh(x @ weight.T)
    changes, drift = [change], None
    for _ in range(defence.steps):
        moved = np.tanh((x + change) @ weight.T)
        if drift is None:
            drift = np.linalg.norm(moved - feature, axis=1) / np.linalg.norm(feature, axis=1)
        gradient = (2 * (moved - feature) * (1 - moved**2)) @ weight
        mean = np.abs(gradient).mean(1, keepdims=True)
        change = cut(change + (np.tanh(2 * gradient / mean) if smooth else np.sign(gradient)) / 255)
        changes.append(change)
    weights = np.exp(2.0 * np.arange(defence.steps + 1))
    pushed = sum(w * c for w, c in zip(weights / weights.sum(), changes, strict=True))
    lead = defence.threshold - drift
    gate = 1 / (1 + np.exp(-lead / 0.02)) if smooth else (lead > 0).astype(float)
    found = x + gate[:, None] * pushed + (1 - gate[:, None]) * changes[0]
    return torch.from_numpy(found.reshape(images.shape)), drift


def noise_of(images, seed=5):
    torch.manual_seed(seed)
    return torch.rand_like(images)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("defence", [TTC(), TTC(8, 5, 0.05), TTC(1, 4, 9.0)])
def test_the_image_is_moved_as_published(defence, smooth):
    images = small_images(6)
    images[0, 0, 0] = torch.tensor([0.0, 1.0, 0.001, 0.999])  # where it would leave [0, 1]
    noise = noise_of(images)
    expected, _ = purified_by_hand(images, noise, defence, smooth=smooth)
    torch.manual_seed(5)
    move = defence.smooth if smooth else defence.purify
    torch.testing.assert_close(move(SmallUndefended(), images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smooth", [False, True])
def test_the_gate_is_each_images_own(smooth):
    images = small_images(6)
    noise = noise_of(images)
    _, drift = purified_by_hand(images, noise, TTC(), smooth=False)
    threshold = float(np.median(drift))
    defence = TTC(threshold=threshold)
    torch.manual_seed(5)
    change = defence.purify(SmallUndefended(), images) - images
    alone = ((2 * noise - 1) * 4 / 255 - change).abs().amax((1, 2, 3)) < 1e-12
    assert alone.tolist() == (drift >= threshold).tolist() and 0 < alone.sum() < 6


def test_a_closed_gate_leaves_the_noise_alone():
    images = small_images()
    noise = noise_of(images)
    torch.manual_seed(5)
    found = TTC(threshold=0.0).purify(SmallUndefended(), images)
    torch.testing.assert_close(found, images + (2 * noise - 1) * 4 / 255, rtol=0, atol=1e-15)


def test_the_counter_attack_moves_the_feature_farther_than_noise_and_keeps_to_its_budget():
    model, images = SmallUndefended(), torch.rand(8, 3, 4, 4, dtype=torch.float64).round()  # black and white
    own = model.raw_features(images)
    moved = {}
    for threshold in (0.0, 9.0):
        torch.manual_seed(5)
        found = TTC(8, 4, threshold).purify(model, images)
        assert (found - images).abs().max() <= 8 / 255 + 1e-12
        assert found.min() >= -1e-12 and found.max() <= 1 + 1e-12
        moved[threshold] = (model.raw_features(found) - own).norm(dim=1)
    assert (moved[9.0] > moved[0.0]).all()


def test_the_noise_is_drawn_again_for_every_answer():
    model, images = SmallUndefended(), small_images()
    assert TTC().random
    torch.manual_seed(5)
    first, second = TTC().logits(model, images), TTC().logits(model, images)
    torch.manual_seed(5)
    assert not torch.equal(first, second) and torch.equal(first, TTC().logits(model, images))


def test_the_surrogate_becomes_the_decision_in_the_limit(monkeypatch):
    images, model = small_images(6), SmallUndefended()
    monkeypatch.setattr(ttc, "SHARPNESS", 1e9)
    monkeypatch.setattr(ttc, "WIDTH", 1e-9)
    torch.manual_seed(5)
    expected = TTC().purify(model, images)
    torch.manual_seed(5)
    torch.testing.assert_close(TTC().smooth(model, images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_answer_costs_the_steps_and_two_forwards(steps):
    model = SmallUndefended()
    TTC(steps=steps).logits(model, small_images(3))
    assert model.forwards == 3 * (steps + 2)
