"""Objectives: from what a training step saw to a loss and its parts. They know tensors only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .attacks.features import squared_distance
from .attacks.losses import margin

WEIGHTINGS = ("confidence", "margin", "entropy", "batch", "schedule")
FROZEN_TERMS = ("predictions", "labelled", "features")


@dataclass(frozen=True)
class Views:
    """What a training step saw, for B images and N classes.

    Args:
        clean: (B, N) logits of the tuned model on the clean images.
        adversarial: (B, N) logits of the tuned model on the adversarial images.
        labels: (B,) class indices.
        frozen: (B, N) logits of the frozen model on the clean images, without gradient; None if the objective has no use for it.
        progress: Share of the training that is done, in [0, 1].
        clean_features: (B, D) normalised image features of the tuned model on the clean images.
        adversarial_features: (B, D) the same on the adversarial images.
        frozen_features: (B, D) those of the frozen model on the clean images, without gradient; None as `frozen`.
        frozen_adversarial: (B, N) logits of the frozen model on the adversarial images, without gradient; None if the objective
            does not ask for them with `needs_frozen_adversarial`.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    frozen: Tensor | None = None
    progress: float = 0.0
    clean_features: Tensor | None = None
    adversarial_features: Tensor | None = None
    frozen_features: Tensor | None = None
    frozen_adversarial: Tensor | None = None


class Objective(Protocol):
    """Maps views to a loss and its named parts (scalars, for the log).

    One that has `needs_frozen_adversarial = True` is given `Views.frozen_adversarial` too, for one more run of the image tower.
    """

    @property
    def needs_frozen(self) -> bool:
        """Whether `Views.frozen` or `Views.frozen_features` is used."""
        ...

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, a scalar with gradient, and its parts by name, without."""
        ...


def needs_frozen_adversarial(objective: Objective) -> bool:
    """Tells whether an objective uses `Views.frozen_adversarial`, which most need not mention."""
    return bool(getattr(objective, "needs_frozen_adversarial", False))


class CaptObjective:
    r"""CAPT's adversarial consistency objective (arXiv 2405.11154).

    `L = CE(clean, y) + λ · mean_i [(1 - α_i) · KL(clean_i ‖ adversarial_i) + α_i · KL(frozen_i ‖ adversarial_i)]`

    with the softmax at the model's own temperature, and the KL terms as TRADES codes them, `kl_div(log_softmax(adversarial),
    softmax(target))`. The gradient flows through the tuned clean predictions, not through the frozen ones. The paper's α is
    not public: every `weighting` here is this project's own. α = 0 is TRADES with prompts, α = 1 is frozen guidance alone.

    Args:
        consistency: λ, the weight of the consistency terms, 0 or more.
        weighting: How α_i is chosen; it never has a gradient. With p(y) the probability of the true class on the clean image:
            `"confidence"`: α_i = p_frozen(y) / (p_frozen(y) + p_tuned(y)). `"margin"`: the same with the odds of the true class
            against the next one, e^m, in place of p(y); that is σ(m_frozen - m_tuned), with m the margin z_y - max_{j≠y} z_j
            of the logits. `"entropy"`: the same with certainties, 1 minus the entropy over log N. `"batch"`: one α for the
            batch, from the means of p(y). `"schedule"`: from 1 at the start of training to 0 at its end. A number in [0, 1]:
            that number.
        frozen_term: What is held to the frozen model: `"predictions"`, as in the equation; `"labelled"`, with the mean of the
            frozen predictions and the label, (p_frozen + onehot(y)) / 2, as what the KL draws to; or `"features"`, with
            `1 - cos(f_adv_i, f_frozen_i)` of the adversarial and the frozen clean image features in place of its KL: a paper
            that cites CAPT (CBA-FAPT) describes a constraint on visual features. α stays as `weighting` says.

    Raises:
        ValueError: λ negative or not finite, or an unknown weighting or frozen term.
    """

    def __init__(
        self, consistency: float = 1.5, weighting: str | float = "confidence", frozen_term: str = "predictions"
    ) -> None:
        self.consistency = _checked(consistency)
        self.weighting = parse_weighting(weighting)
        if frozen_term not in FROZEN_TERMS:
            raise ValueError(f"frozen_term={frozen_term!r} is unknown. Allowed: {', '.join(FROZEN_TERMS)}.")
        self.frozen_term = frozen_term

    @property
    def needs_frozen(self) -> bool:
        """Whether the frozen model's logits have any effect."""
        return self.consistency > 0 and self.weighting != 0.0

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts `clean_loss`, `consistency_tuned`, `consistency_frozen` and `alpha`."""
        clean_loss = F.cross_entropy(views.clean, views.labels)
        tuned = kl_to(views.adversarial, views.clean)  # (B,)
        if self.needs_frozen:
            if views.frozen is None:
                raise ValueError("CAPT's objective needs the frozen model's logits (Views.frozen) unless α is 0.")
            frozen = self._distance_to_frozen(views)  # (B,)
            alpha = self.alpha(views)  # (B,)
        else:
            frozen, alpha = torch.zeros_like(tuned), torch.zeros_like(tuned)
        loss = clean_loss + self.consistency * ((1 - alpha) * tuned + alpha * frozen).mean()
        parts = {"clean_loss": clean_loss, "consistency_tuned": tuned.mean(), "consistency_frozen": frozen.mean()}
        return loss, {name: part.detach() for name, part in (parts | {"alpha": alpha.mean()}).items()}

    def _distance_to_frozen(self, views: Views) -> Tensor:
        assert views.frozen is not None  # __call__ has checked
        if self.frozen_term != "features":
            frozen = views.frozen.detach()
            if self.frozen_term == "labelled":
                label = F.one_hot(views.labels, frozen.shape[-1])
                mixed = (frozen.float().softmax(-1) + label) / 2  # float16 has no number as small as the bound
                frozen = mixed.clamp_min(1e-30).log().to(frozen.dtype)
            return kl_to(views.adversarial, frozen)
        if views.frozen_features is None or views.adversarial_features is None:
            raise ValueError("frozen_term='features' needs Views.frozen_features and Views.adversarial_features.")
        return 1 - F.cosine_similarity(views.adversarial_features.float(), views.frozen_features.detach().float())

    @torch.no_grad()
    def alpha(self, views: Views) -> Tensor:
        """Returns the weights α_i of the frozen model's predictions: (B,) in [0, 1]."""
        if isinstance(self.weighting, float):
            return torch.full_like(views.clean[:, 0], self.weighting)
        if self.weighting == "schedule":
            return torch.full_like(views.clean[:, 0], 1.0 - views.progress)
        assert views.frozen is not None  # __call__ has checked
        if self.weighting == "margin":
            # `margin` is what an attack raises: m with the other sign
            return torch.sigmoid(margin(views.clean, views.labels) - margin(views.frozen, views.labels))
        trust: Callable[[Tensor], Tensor] = (
            certainty if self.weighting == "entropy" else lambda z: true_probability(z, views.labels)
        )
        frozen, tuned = trust(views.frozen), trust(views.clean)  # (B,)
        if self.weighting == "batch":
            frozen, tuned = frozen.mean().expand_as(frozen), tuned.mean().expand_as(tuned)
        # both can be 0 to rounding; neither then deserves more trust than the other
        return torch.where(frozen + tuned > 0, frozen / (frozen + tuned).clamp_min(1e-30), 0.5)


class FapObjective:
    r"""FAP's objective (Zhou et al. 2024, arXiv 2403.14774, as its code has it).

    `L = CE(clean, y) + λ · mean_i [(cos(f_clean_i, f_adv_i) + 1) · KL(clean_i ‖ adversarial_i)]`

    with f the image features: it draws the predictions on both together and the features apart. The gradient flows through both
    branches and through the cosine.

    Args:
        consistency: λ, 0 or more.

    Raises:
        ValueError: λ negative or not finite.
    """

    needs_frozen = False

    def __init__(self, consistency: float = 1.5) -> None:
        self.consistency = _checked(consistency)

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts `clean_loss`, `consistency_tuned` (without the cosine) and `cosine`."""
        if views.clean_features is None or views.adversarial_features is None:
            raise ValueError("FAP's objective needs the image features of both views.")
        clean_loss = F.cross_entropy(views.clean, views.labels)
        tuned = kl_to(views.adversarial, views.clean)  # (B,)
        cosine = F.cosine_similarity(views.clean_features.float(), views.adversarial_features.float())  # (B,)
        loss = clean_loss + self.consistency * ((cosine + 1) * tuned).mean()
        parts = {"clean_loss": clean_loss, "consistency_tuned": tuned.mean(), "cosine": cosine.mean()}
        return loss, {name: part.detach() for name, part in parts.items()}


class PmgAftObjective:
    r"""PMG-AFT's objective (Wang et al. 2024, arXiv 2401.04350): adversarial cross-entropy, guided by the frozen model.

    `L = CE(adversarial, y) + λ · mean_i [KL(frozen(adversarial_i) ‖ adversarial_i) + KL(clean_i ‖ adversarial_i)]`

    The frozen model sees the adversarial images, CAPT's the clean ones. λ is the paper's α and β, which are both 1 in the
    released code, and the KL terms have its direction. That code sums them over the batch, of logits whose temperature a second
    normalisation takes away; here they are means at the model's own temperature. The gradient flows through the tuned clean
    predictions, as there.

    Args:
        consistency: λ, 0 or more.

    Raises:
        ValueError: λ negative or not finite.
    """

    needs_frozen = False

    def __init__(self, consistency: float = 1.0) -> None:
        self.consistency = _checked(consistency)

    @property
    def needs_frozen_adversarial(self) -> bool:
        """Whether the frozen model's logits on adversarial images have any effect."""
        return self.consistency > 0

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts `clean_loss` (for the log only), `adversarial_loss` and the two consistency terms."""
        loss, parts = AdversarialCrossEntropy()(views)
        tuned = kl_to(views.adversarial, views.clean).mean()
        frozen = torch.zeros_like(tuned)
        if self.needs_frozen_adversarial:
            if views.frozen_adversarial is None:
                raise ValueError(
                    "PMG-AFT's objective needs the frozen model's logits on adversarial images, unless λ is 0."
                )
            frozen = kl_to(views.adversarial, views.frozen_adversarial.detach()).mean()
        loss = loss + self.consistency * (tuned + frozen)
        return loss, parts | {"consistency_tuned": tuned.detach(), "consistency_frozen": frozen.detach()}


class AdversarialCrossEntropy:
    """Cross-entropy on the adversarial images alone: the objective of TeCoA, APT and the Adv- baselines (Madry et al. 2018)."""

    needs_frozen = False

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts `clean_loss` (for the log only) and `adversarial_loss`."""
        loss = F.cross_entropy(views.adversarial, views.labels)
        return loss, {
            "clean_loss": F.cross_entropy(views.clean.detach(), views.labels),
            "adversarial_loss": loss.detach(),
        }


class FeatureDistance:
    r"""FARE's objective (Schlarmann et al. 2024, arXiv 2402.12336): `mean_i ‖φ(adversarial_i) - φ_original(clean_i)‖²`.

    φ is the projected and not normalised image feature. `FareTrainer` puts φ of the adversarial images into
    `Views.adversarial_features` and the original's of the clean images into `Views.frozen`, both (B, D).
    """

    needs_frozen = True

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its part `feature_distance`, the same without gradient."""
        assert views.adversarial_features is not None and views.frozen is not None  # the trainer gives both
        loss = squared_distance(views.adversarial_features, views.frozen).mean()
        return loss, {"feature_distance": loss.detach()}


class SiameseCosine:
    r"""Sim-CLIP's objective (Hossain and Imteaj 2024, arXiv 2407.14971), as its released code has it.

    `L = -½ · mean_i [cos(f_adv_i, sg(f_clean_i)) + cos(f_clean_i, sg(f_adv_i))]`

    with f_adv the image features of the tuned tower, f_clean those of the original, and sg the stopped gradient: the second term
    has the value of the first and no gradient. With the tuned tower's own f_clean, as the paper's formula can be read, nothing
    holds the features in place: tiny CLIP became constant within 25 steps.
    """

    needs_frozen = True

    def __call__(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, in [-1, 1], and its part `cosine`, the mean cosine of the two views."""
        assert views.adversarial_features is not None and views.frozen is not None  # the trainer gives both
        cosine = F.cosine_similarity(views.adversarial_features.float(), views.frozen.detach().float()).mean()
        return -(cosine + cosine.detach()) / 2, {"cosine": cosine.detach()}


def _checked(consistency: float) -> float:
    if not 0 <= consistency < float("inf"):
        raise ValueError(f"consistency={consistency} (λ) must be a finite number, 0 or more.")
    return float(consistency)


def parse_weighting(weighting: str | float) -> str | float:
    """Returns a weighting's name, or its number in [0, 1] as a float; a ValueError if it is neither."""
    if weighting in WEIGHTINGS:
        return weighting
    try:
        number = float(weighting)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise ValueError(
            f"weighting={weighting!r} is unknown. Allowed: {', '.join(WEIGHTINGS)}, or a number in [0, 1]."
        )
    return number


def kl_to(logits: Tensor, target: Tensor) -> Tensor:
    """Returns KL(softmax(target) ‖ softmax(logits)) for each row: (B, N), (B, N) -> (B,)."""
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def true_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the probability of each image's true class: (B, N), (B,) -> (B,) in [0, 1]."""
    return logits.softmax(-1).gather(1, labels[:, None])[:, 0]


def certainty(logits: Tensor) -> Tensor:
    """Returns 1 minus the entropy of each prediction over log N: (B, N) -> (B,) in [0, 1], 0 for the uniform one."""
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    most = logits.new_full((), logits.shape[-1], dtype=torch.float32).log()
    return (1 - entropy / most).clamp(0, 1)
