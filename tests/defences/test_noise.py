"""One noisy image, and a vote over several."""

import pytest
import torch

from capt_peft.defences import GaussianNoise, Smoothing, Undefended, parse_defence


def noisy_logits(classifier, images, std, copies):
    """The logits (copies, B, N) by hand, with the draws that follow from seed 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.stack([classifier(images + std * torch.randn(images.shape)) for _ in range(copies)])


def test_noise_is_added_once(classifier, images):
    (expected,) = noisy_logits(classifier, images, 8 / 255, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(GaussianNoise("8/255").logits(Undefended(classifier), images), expected)


@pytest.mark.parametrize("std", [0.1, 0.4])
def test_the_most_frequent_answer_wins_and_probabilities_decide_between_equal_votes(classifier, std):
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = noisy_logits(classifier, images, std, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        found = Smoothing(std, 4).logits(Undefended(classifier), images)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(12))
    for i in range(12):
        answers = logits[:, i].argmax(1).tolist()
        means = logits[:, i].softmax(1).mean(0)
        best = max(range(4), key=lambda n: (answers.count(n), means[n].item()))
        assert found[i].argmax() == best
        shares = torch.tensor([float(answers.count(n)) for n in range(4)])
        torch.testing.assert_close(found[i].exp(), (shares + means) / 5, atol=1e-5, rtol=1e-4)


def test_an_attacker_sees_the_logarithm_of_the_mean_probabilities(classifier, images):
    expected = noisy_logits(classifier, images, 0.1, 5).softmax(-1).mean(0).log()
    torch.manual_seed(0)
    found = Smoothing(0.1, 5).unrolled(Undefended(classifier), images)
    torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=1e-4)


def test_names_hold_the_exact_strength():
    assert parse_defence("noise-8/255").std == 8 / 255
    assert parse_defence("smoothing-12/255x100") == Smoothing("12/255", 100)
    assert GaussianNoise(0.25).name == "noise-0.25" and Smoothing("4/255").name == "smoothing-4/255x32"
