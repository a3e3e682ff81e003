"""CAPT's objective, against its equation written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from capt_peft.objectives import (
    AdversarialCrossEntropy,
    CaptObjective,
    FapObjective,
    PmgAftObjective,
    SiameseCosine,
    Views,
    certainty,
    kl_to,
    needs_frozen_adversarial,
    parse_weighting,
)

WEIGHTINGS = ["confidence", "margin", "entropy", "batch", "schedule", 0.0, 0.3, 1.0]


def views(batch=6, classes=4, progress=0.25, **changes):
    generator = torch.Generator().manual_seed(0)
    draw = {name: 3 * torch.randn(batch, classes, generator=generator) for name in ("clean", "adversarial", "frozen")}
    labels = torch.randint(classes, (batch,), generator=generator)
    return Views(**{**draw, "labels": labels, "progress": progress, **changes})


def probabilities(logits):
    exponents = [[math.exp(z - max(row)) for z in row] for row in logits.tolist()]
    return [[e / sum(row) for e in row] for row in exponents]


def divergence(p, q):
    """KL(p || q) of two rows."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_hand(v, weighting, strength):
    clean, adversarial, frozen = (probabilities(z) for z in (v.clean, v.adversarial, v.frozen))
    labels, batch = v.labels.tolist(), len(v.labels)
    trust = {
        "entropy": lambda p, y: 1 + sum(x * math.log(x) for x in p) / math.log(len(p)),
        "margin": lambda p, y: p[y] / max(p[:y] + p[y + 1 :]),
    }.get(weighting, lambda p, y: p[y])
    tuned_trust = [trust(p, y) for p, y in zip(clean, labels, strict=True)]
    frozen_trust = [trust(p, y) for p, y in zip(frozen, labels, strict=True)]
    if weighting == "batch":
        frozen_trust, tuned_trust = [sum(frozen_trust) / batch] * batch, [sum(tuned_trust) / batch] * batch
    alpha = [f / (f + t) for f, t in zip(frozen_trust, tuned_trust, strict=True)]
    if weighting == "schedule":
        alpha = [1 - v.progress] * batch
    if isinstance(weighting, float):
        alpha = [weighting] * batch
    loss = 0.0
    for i in range(batch):
        consistency = (1 - alpha[i]) * divergence(clean[i], adversarial[i]) + alpha[i] * divergence(
            frozen[i], adversarial[i]
        )
        loss += -math.log(clean[i][labels[i]]) + strength * consistency
    return loss / batch, sum(alpha) / batch


@pytest.mark.parametrize("strength", [0.0, 1.5, 6.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_equals_the_equation(weighting, strength):
    v = views()
    loss, parts = CaptObjective(strength, weighting)(v)
    expected, alpha = by_hand(v, weighting, strength)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    if strength > 0:
        assert parts["alpha"].item() == pytest.approx(alpha, rel=1e-5)
    rebuilt = parts["clean_loss"]
    if weighting in (0.0, 1.0):
        rebuilt = rebuilt + strength * parts["consistency_frozen" if weighting else "consistency_tuned"]
        assert loss.item() == pytest.approx(rebuilt.item(), rel=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_flow_to_both_tuned_views_and_not_to_the_weights(weighting):
    v = views(batch=3)
    clean, adversarial = v.clean.double().requires_grad_(), v.adversarial.double().requires_grad_()
    frozen = v.frozen.double().requires_grad_()
    loss, _ = CaptObjective(1.5, weighting)(Views(clean, adversarial, v.labels, frozen, v.progress))
    gradients = torch.autograd.grad(loss, (clean, adversarial, frozen), allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1].abs().sum() > 0
    assert gradients[2] is None
    # with alpha held fixed, the same gradient: it has none of its own
    alpha = CaptObjective(1.5, weighting).alpha(v).double()
    held = (
        torch.nn.functional.cross_entropy(clean, v.labels)
        + 1.5 * ((1 - alpha) * kl_to(adversarial, clean) + alpha * kl_to(adversarial, frozen.detach())).mean()
    )
    expected = torch.autograd.grad(held, (clean, adversarial))
    torch.testing.assert_close(gradients[:2], expected, atol=1e-6, rtol=1e-6)


def test_kl_has_the_right_gradient():
    target = torch.randn(2, 3, dtype=torch.double)
    assert gradcheck(lambda z: kl_to(z, target), torch.randn(2, 3, dtype=torch.double, requires_grad=True))


def test_identical_views_have_no_consistency_loss():
    v = views()
    _, parts = CaptObjective(1.5, "confidence")(Views(v.clean, v.clean, v.labels, v.clean))
    assert parts["consistency_tuned"].abs() < 1e-6
    assert parts["consistency_frozen"].abs() < 1e-6
    assert parts["alpha"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("weighting", ["confidence", "margin", "entropy", "batch"])
def test_alpha_trusts_the_model_that_is_right(weighting):
    labels = torch.tensor([0, 1])
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), torch.zeros(2, 3)
    objective = CaptObjective(1.5, weighting)
    assert (objective.alpha(Views(unsure, unsure, labels, frozen=sure)) > 0.6).all()
    assert (objective.alpha(Views(sure, sure, labels, frozen=unsure)) < 0.4).all()


def test_alpha_is_one_half_where_neither_model_gives_the_class_any_chance():
    logits = torch.tensor([[-300.0, 0.0]])
    alpha = CaptObjective().alpha(Views(logits, logits, torch.tensor([0]), frozen=logits))
    assert alpha.item() == 0.5


def test_the_schedule_goes_from_the_frozen_to_the_tuned_model():
    objective = CaptObjective(1.5, "schedule")
    assert [objective.alpha(views(progress=p))[0].item() for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]


def test_certainty_is_0_for_the_uniform_prediction_and_1_for_a_sure_one():
    values = certainty(torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]]))
    assert values[0].abs() < 1e-6
    assert values[1] > 0.999


def test_the_frozen_model_is_asked_for_only_where_it_counts():
    assert CaptObjective(1.5, "confidence").needs_frozen
    assert not CaptObjective(1.5, 0.0).needs_frozen
    assert not CaptObjective(0.0, "confidence").needs_frozen
    with pytest.raises(ValueError, match="frozen model's logits"):
        CaptObjective()(views(frozen=None))


def test_adversarial_cross_entropy_is_just_that():
    v = views()
    loss, parts = AdversarialCrossEntropy()(v)
    expected = -sum(math.log(p[y]) for p, y in zip(probabilities(v.adversarial), v.labels.tolist(), strict=True)) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert set(parts) == {"clean_loss", "adversarial_loss"}


@pytest.mark.parametrize("weighting", ["confident", "1.5", -0.1, None, float("nan")])
def test_unknown_weightings_are_refused(weighting):
    with pytest.raises(ValueError, match="Allowed: confidence, margin, entropy, batch, schedule, or a number"):
        parse_weighting(weighting)


@pytest.mark.parametrize("consistency", [-1.0, float("inf"), float("nan")])
def test_bad_strengths_are_refused(consistency):
    with pytest.raises(ValueError, match="must be a finite number"):
        CaptObjective(consistency)


def test_faps_objective_is_its_equation_and_its_gradient_flows_through_both_views():
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(6, 5, generator=generator) for _ in range(2)]
    v = views(clean_features=features[0], adversarial_features=features[1])
    loss, parts = FapObjective(2.5)(v)
    clean, adversarial = probabilities(v.clean), probabilities(v.adversarial)
    expected = 0.0
    for i in range(6):
        a, b = features[0][i].tolist(), features[1][i].tolist()
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        expected += (-math.log(clean[i][v.labels[i]]) + 2.5 * (cosine + 1) * divergence(clean[i], adversarial[i])) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert set(parts) == {"clean_loss", "consistency_tuned", "cosine"}
    for name in ("clean", "adversarial", "clean_features", "adversarial_features"):
        leaf = getattr(v, name).clone().requires_grad_()
        loss, _ = FapObjective(1.0)(views(**{**vars(v), name: leaf}))
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.abs().max() > 1e-4
    with pytest.raises(ValueError, match="needs the image features"):
        FapObjective()(views())
    with pytest.raises(ValueError, match="consistency=-1"):
        FapObjective(-1)


def some_features(number=2, size=(6, 5)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) for _ in range(number)]


def cosine_by_hand(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


# ----------------------------------------------------------------------- CAPT with the label mixed into the frozen predictions


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_labelled_frozen_term_draws_to_the_mean_of_frozen_prediction_and_label(weighting):
    v = views()
    loss, parts = CaptObjective(1.5, weighting, "labelled")(v)
    assert torch.equal(parts["alpha"], CaptObjective(1.5, weighting)(v)[1]["alpha"])  # the frozen model's own
    clean, attacked, frozen = (probabilities(logits) for logits in (v.clean, v.adversarial, v.frozen))
    alpha = CaptObjective(1.5, weighting).alpha(v).tolist()
    expected = 0.0
    for i, label in enumerate(v.labels.tolist()):
        mixed = [(p + (j == label)) / 2 for j, p in enumerate(frozen[i])]
        terms = (1 - alpha[i]) * divergence(clean[i], attacked[i]) + alpha[i] * divergence(mixed, attacked[i])
        expected += (-math.log(clean[i][label]) + 1.5 * terms) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_labelled_frozen_term_is_finite_where_a_frozen_probability_is_nothing():
    v = views(frozen=torch.full((6, 4), -1e4).index_fill(1, torch.tensor([0]), 0.0))
    assert torch.isfinite(CaptObjective(1.5, 1.0, "labelled")(v)[0])
    half = replace(v, **{name: getattr(v, name).half() for name in ("clean", "adversarial", "frozen")})
    assert torch.isfinite(CaptObjective(1.5, 1.0, "labelled")(half)[0])


# ------------------------------------------------------------------------------------- CAPT with features of the frozen model


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_frozen_term_of_features_is_one_minus_their_cosine_in_place_of_the_kl(weighting):
    adversarial, frozen = some_features()
    v = views(adversarial_features=adversarial, frozen_features=frozen)
    loss, parts = CaptObjective(1.5, weighting, "features")(v)
    _, plain = CaptObjective(1.5, weighting)(v)
    assert torch.equal(parts["alpha"], plain["alpha"])  # which stays what the weighting says
    clean, attacked = probabilities(v.clean), probabilities(v.adversarial)
    alpha = CaptObjective(1.5, weighting).alpha(v).tolist()
    expected = 0.0
    for i, label in enumerate(v.labels.tolist()):
        tuned, far = divergence(clean[i], attacked[i]), 1 - cosine_by_hand(adversarial[i], frozen[i])
        expected += (-math.log(clean[i][label]) + 1.5 * ((1 - alpha[i]) * tuned + alpha[i] * far)) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_frozen_term_of_features_moves_the_adversarial_features_alone():
    features = [f.double().requires_grad_() for f in some_features()]

    def loss(adversarial, frozen):
        v = views(adversarial_features=adversarial, frozen_features=frozen)
        return CaptObjective(1.0, 1.0, "features")._distance_to_frozen(v).sum()

    moved, still = torch.autograd.grad(loss(*features), features, allow_unused=True)
    assert moved.abs().max() > 0.01 and still is None
    assert loss(features[1], features[1]).item() == pytest.approx(0, abs=1e-6)


def test_what_the_frozen_term_of_features_lacks_is_named():
    with pytest.raises(ValueError, match=r"needs Views.frozen_features"):
        CaptObjective(frozen_term="features")(views())
    with pytest.raises(ValueError, match=r"frozen_term='logits' is unknown. Allowed: predictions, labelled, features"):
        CaptObjective(frozen_term="logits")


# ---------------------------------------------------------------------------------------------------------------- PMG-AFT


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
def test_pmg_afts_objective_is_its_equation(strength):
    v = views(frozen_adversarial=views(progress=0.5).frozen.flip(0))
    loss, parts = PmgAftObjective(strength)(v)
    clean, attacked, frozen = (probabilities(z) for z in (v.clean, v.adversarial, v.frozen_adversarial))
    rows = list(enumerate(v.labels.tolist()))
    cross_entropy = sum(-math.log(attacked[i][y]) for i, y in rows) / 6
    to_clean = sum(divergence(clean[i], attacked[i]) for i, _ in rows) / 6
    to_frozen = sum(divergence(frozen[i], attacked[i]) for i, _ in rows) / 6
    assert loss.item() == pytest.approx(cross_entropy + strength * (to_clean + to_frozen), rel=1e-5)
    assert parts["adversarial_loss"].item() == pytest.approx(cross_entropy, rel=1e-5)
    assert parts["consistency_tuned"].item() == pytest.approx(to_clean, rel=1e-5)
    assert parts["consistency_frozen"].item() == pytest.approx(to_frozen if strength else 0.0, rel=1e-5)
    assert needs_frozen_adversarial(PmgAftObjective(strength)) is (strength > 0)


def test_pmg_afts_gradient_flows_to_both_tuned_views_and_not_to_the_frozen_model():
    names = ("clean", "adversarial", "frozen_adversarial")
    leaves = [z.double().requires_grad_() for z in (views().clean, views().adversarial, views().frozen)]

    def loss(*leaves):
        return PmgAftObjective(1.0)(views(**dict(zip(names, leaves, strict=True))))[0]

    *tuned, frozen = torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)
    assert all(gradient.abs().max() > 1e-3 for gradient in tuned) and frozen is None
    # of the cross-entropy: p - y; of a KL to the adversarial prediction: p - target
    one_hot = torch.nn.functional.one_hot(views().labels, 4).double()
    clean, attacked, fixed = (z.detach().softmax(-1) for z in leaves)
    torch.testing.assert_close(tuned[1], ((attacked - one_hot) + (attacked - clean) + (attacked - fixed)) / 6)
    assert gradcheck(lambda *two: loss(*two, leaves[2].detach()), tuple(leaves[:2]))


def test_pmg_aft_is_not_computed_without_the_frozen_model_on_adversarial_images():
    with pytest.raises(ValueError, match="logits on adversarial images"):
        PmgAftObjective()(views())
    with pytest.raises(ValueError, match="consistency=-1"):
        PmgAftObjective(-1)
    assert not any(map(needs_frozen_adversarial, (CaptObjective(), FapObjective(), AdversarialCrossEntropy())))


# --------------------------------------------------------------------------------------------------------------- Sim-CLIP


def test_sim_clips_objective_is_the_mean_cosine_with_the_gradient_of_one_half_of_it():
    original, adversarial = (f.requires_grad_() for f in some_features())
    loss, parts = SiameseCosine()(views(frozen=original, adversarial_features=adversarial))
    expected = sum(cosine_by_hand(a, b) for a, b in zip(original, adversarial, strict=True)) / 6
    assert loss.item() == pytest.approx(-expected, rel=1e-5)
    assert parts["cosine"].item() == pytest.approx(expected, rel=1e-5)
    moved, still = torch.autograd.grad(loss, (adversarial, original), allow_unused=True)
    leaf = adversarial.detach().clone().requires_grad_()
    half = -sum((a / a.norm()) @ (b / b.norm()) for a, b in zip(leaf, original.detach(), strict=True)) / 12
    torch.testing.assert_close(moved, torch.autograd.grad(half, leaf)[0])
    assert still is None
