"""`verify`: the worst-case images that an evaluation kept, scored again on the weights and compared with its record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from ..attacks import Attack, LogitsFn, ThreatModel
from ..defences import Defence, Defended, adaptive
from ..results.accuracy import Accuracy
from ..results.earlier import RANDOM, TOLERANCE, changes, logit_distance
from ..results.evaluation import Evaluation
from ..results.kept import KeptImages, read_images
from ..utils.machine import moved
from ..utils.markup import plain
from ..utils.text import some
from .batch import attack_batch
from .images import Examples
from .resume import sample_logits
from .subject import OF_FLOAT32, Subject, subject_of

_ROUNDING = 1e-6  # by which an attack may leave its ball


@dataclass(frozen=True)
class Verification:
    """What the worst-case images of an evaluation show.

    Attributes:
        bounds: For each threat model, the share of images that are right, clean and in the worst case: robust accuracy is at most
            this. Without the data, right in the worst case alone. Empty where a file cannot be believed at all.
        clean: Clean accuracy; None without the data.
        problems: Sentences on what does not agree with the record.
        unchecked: Sentences on what could not be checked.
    """

    bounds: Mapping[ThreatModel, Accuracy] = field(default_factory=dict)
    clean: Accuracy | None = None
    problems: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether everything was checked and agrees."""
        return bool(self.bounds) and not self.problems and not self.unchecked

    def __str__(self) -> str:
        verdict = "verified upper bound" if self.verified else "not verified"
        lines = [] if self.clean is None else [f"Clean accuracy: {self.clean}"]
        for threat, bound in self.bounds.items():
            lines.append(f"At most {bound} robust under {threat}: {verdict}")
        lines += [f"Does not agree: {problem}" for problem in self.problems]
        lines += [f"Could not be checked: {reason}" for reason in self.unchecked]
        end = "Not verified." if not self.verified else "Verified: the record, the images and the weights agree."
        return "\n".join([*lines, end])


@dataclass(frozen=True)
class _Kept:
    """The worst-case images of a threat model, what the classifier says of them, and which of them count."""

    threat: ThreatModel
    images: Tensor  # (n, 3, H, W)
    right: Tensor  # (n,) bool
    close: Tensor  # (n,) bool: nearer to another answer than rounding can tell


def verify(
    classifier: LogitsFn,
    evaluation: Evaluation,
    images: str | Path,
    data: datasets.Dataset | tuple[Tensor, Tensor] | None = None,
    *,
    attacks: Sequence[Attack] = (),
    batch_size: int = 128,
) -> Verification:
    """Scores the worst-case images of an evaluation again, and compares everything that a forged record could say otherwise.

    The bound needs no attack: an image within its ball that the classifier is wrong on shows that it can be. It is an upper bound
    and nothing more: images that a weak attack left unbroken say nothing. `attacks` try those.

    Args:
        classifier: The classifier with the classes and texts of the evaluation, loaded from its weights, and with its defence
            (`Defended`), if it has one. A random defence cannot be verified by one image per example.
        evaluation: The record.
        images: The file of its worst-case images.
        data: The images that it was measured on, as for `evaluate`; None: labels and distances are not checked, and nothing is
            verified.
        attacks: Attacks on the images that count as robust, of the record's threat models, by every way that knows the defence;
            the bound falls by what they break.
        batch_size: Images that the model is run on at once.

    Returns:
        The bounds, what does not agree, and what could not be checked.

    Raises:
        ValueError: The evaluation kept no images, or was not white-box, or an attack is of another threat model.
    """
    for attack in attacks:
        if attack.threat_model not in evaluation.worst_case:
            raise ValueError(f"The record has no images for {attack.name}, {attack.threat_model}.")
    if evaluation.images is None:
        raise ValueError("The evaluation kept no images: measure it again with save_images=True (--save_images).")
    if not evaluation.worst_case:
        raise ValueError("The evaluation has no white-box attack, so it says nothing of robust accuracy.")
    defence = classifier.defence if isinstance(classifier, Defended) else None
    if defence is not None and defence.random:
        return Verification(
            unchecked=(f"the defence {defence.name} is random: one answer per image says little about it.",)
        )
    path = Path(images)
    if KeptImages.of(path) != evaluation.images:
        return Verification(
            problems=(f"the hash of {path.name} is not the one in the record: other images, or damaged.",)
        )
    try:
        tensors, labels = read_images(path)
        subject = subject_of(classifier)
        problems = list(_model_problems(subject, evaluation.configuration))
        problems += _defence_problems(defence, evaluation.configuration.get("defence"))
        kept = [
            _scored(subject, threat, tensors.pop(str(threat)), labels, batch_size) for threat in evaluation.worst_case
        ]
    except KeyError as error:
        return Verification(problems=(f"{path.name} has no images for {error.args[0]}.",))
    except (ValueError, RuntimeError) as error:  # the second: images of a size that the model does not take
        return Verification(problems=(f"the images cannot be scored: {plain(error)}",))
    if tensors:
        problems.append(
            f"{path.name} has images for threat models that the record has no worst case for: {some(tensors)}."
        )
    if len(labels) != evaluation.clean.n:
        problems.append(f"{path.name} has {len(labels)} images, the record is of {evaluation.clean.n}.")
    checked = _Against(subject, evaluation, labels, kept, problems, batch_size)
    if data is None:
        return checked.without_data()
    if isinstance(classifier, Defended):
        return checked.with_data(Examples(data, classifier.classifier), adaptive(attacks, classifier.defence))
    return checked.with_data(Examples(data, classifier), attacks)


def _model_problems(subject: Subject, configuration: Mapping[str, Any]) -> Iterator[str]:
    """Yields sentences on where the record is of another model than this one."""
    own, told = (_identity(description) for description in (subject.description, configuration.get("model") or {}))
    if found := changes({"model": own}, {"model": told}):
        yield f"the record is of another model: {some(found, 5, separator='; ')}."


def _defence_problems(defence: Defence | None, told: Any) -> Iterator[str]:
    own = None if defence is None else json.loads(json.dumps(defence.to_dict()))
    if own != told:
        names = [given["name"] if isinstance(given, dict) and "name" in given else "none" for given in (told, own)]
        yield f"the record is of the defence {plain(names[0], 80)}, with other settings or another one than {names[1]}."


def _identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a model is told by, without names that may differ from place to place."""
    found: dict[str, Any] = json.loads(json.dumps(description))
    found.pop("logits", None)
    for part in ("base", "adapter"):
        if isinstance(found.get(part), dict):
            found[part] = found[part].get("fingerprint")
    if found.get("precision") in OF_FLOAT32:
        found["precision"] = "float32"  # of the same weights
    return found


def _scored(subject: Subject, threat: ThreatModel, images: Tensor, labels: Tensor, batch_size: int) -> _Kept:
    logits = torch.cat([subject.scored(moved(part, subject.device)).cpu() for part in images.split(batch_size)])
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels range from {int(labels.min())} to {int(labels.max())}, of {logits.shape[1]} classes.")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    best = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    close = (own - best).abs() <= TOLERANCE * logits.abs().amax(1)
    return _Kept(threat, images, logits.argmax(1) == labels, close)


def _is_random(subject: Subject, images: Tensor) -> bool:
    first, second = (subject.scored(moved(images, subject.device)).cpu().double() for _ in range(2))
    return logit_distance(first, second) > TOLERANCE / 2


@dataclass
class _Against:
    """Compares what the images show with the record."""

    subject: Subject
    evaluation: Evaluation
    labels: Tensor
    kept: Sequence[_Kept]
    problems: list[str]
    batch_size: int

    def without_data(self) -> Verification:
        bounds = {of.threat: Accuracy(int(of.right.sum()), len(of.right)) for of in self.kept}
        self._compare({of.threat: of.right for of in self.kept})
        reason = (
            "the data are not here. So neither the labels nor whether the images lie within their threat model is known, and the "
            "figures above are what the file says of itself."
        )
        return Verification(bounds, None, tuple(self.problems), (reason,))

    def with_data(self, examples: Examples, attacks: Sequence[Attack]) -> Verification:
        if examples.to_dict() != self.evaluation.configuration.get("data"):
            self.problems.append(
                "the record is of other data than these: their fingerprints, or numbers of images, differ."
            )
        if not torch.equal(examples.labels.cpu(), self.labels):
            self.problems.append("the labels of the images are not those of the data.")
            return Verification(problems=tuple(self.problems))
        clean = torch.cat([self._clean(examples, rows) for rows in self._rows()])
        right = {of.threat: clean & of.right for of in self.kept}
        for of in self.kept:
            self._check_distances(examples, of, right[of.threat])
        self._compare(right)
        accuracy = Accuracy(int(clean.sum()), len(clean))
        unchecked = self._check_logits(examples)
        if not unchecked and accuracy != self.evaluation.clean:
            self.problems.append(f"clean accuracy is {accuracy}; the record says {self.evaluation.clean}.")
        for attack in attacks:
            self._attack(examples, attack, right)
        bounds = {threat: Accuracy(int(of.sum()), len(of)) for threat, of in right.items()}
        return Verification(bounds, accuracy, tuple(self.problems), tuple(unchecked))

    def _rows(self) -> Sequence[Tensor]:
        return torch.arange(len(self.labels)).split(self.batch_size)

    def _clean(self, examples: Examples, rows: Tensor) -> Tensor:
        pixels, labels = examples.batch(rows.tolist(), self.subject.device)
        return (self.subject.scored(pixels).argmax(1) == labels).cpu()

    def _check_distances(self, examples: Examples, of: _Kept, robust: Tensor) -> None:
        """Notes images outside of their ball, and images that count as robust though nothing has moved them."""
        outside, unmoved = 0, 0
        for rows in self._rows():
            pixels = examples.batch(rows.tolist(), torch.device("cpu"))[0]
            if of.images.shape[1:] != pixels.shape[1:]:
                self.problems.append(
                    f"the images under {of.threat} are {tuple(of.images.shape[1:])}, those of the data {tuple(pixels.shape[1:])}."
                )
                return
            length = of.threat.norm_of(of.images[rows] - pixels.float())
            outside += int((~(length <= of.threat.epsilon + _ROUNDING)).sum())
            unmoved += int(((length == 0) & robust[rows]).sum())
        if outside:
            self.problems.append(
                f"{outside} of {len(of.images)} images lie outside of {of.threat} around the clean image."
            )
        if unmoved and of.threat.epsilon > 0:
            self.problems.append(
                f"{unmoved} of the images under {of.threat} that count as robust are the clean images themselves: nothing "
                "attacked them."
            )

    def _compare(self, right: Mapping[ThreatModel, Tensor]) -> None:
        """Notes worst cases, and a union of them, that are not those of the record, but by images that rounding decides."""
        told, union = self.evaluation.worst_case, self.evaluation.union
        certain = {of.threat: right[of.threat] & ~of.close for of in self.kept}
        possible = {of.threat: right[of.threat] | of.close for of in self.kept}
        rows = [(f"in the worst case under {t}", told[t], right[t], certain[t], possible[t]) for t in told]
        if union is not None:
            first, second, third = (torch.stack(list(of.values())).all(0) for of in (right, certain, possible))
            rows.append(("under every threat model", union, first, second, third))
        for where, accuracy, found, least, most in rows:
            if not (int(least.sum()) <= accuracy.correct <= int(most.sum()) and accuracy.n == len(found)):
                self.problems.append(
                    f"{int(found.sum())} of {len(found)} images are right {where}; the record says {accuracy.correct} of "
                    f"{accuracy.n}."
                )

    def _check_logits(self, examples: Examples) -> list[str]:
        """Compares the logits on sample images with those of the record; returns what cannot be checked."""
        told = (self.evaluation.configuration.get("model") or {}).get("logits")
        own = sample_logits(self.subject, examples, self.batch_size)[0]
        if own["scored"] == RANDOM or _is_random(self.subject, self.kept[0].images[: self.batch_size]):
            return ["the classifier answers at random: one answer per image says little about it."]
        plain_told = {k: v for k, v in told.items() if k != "attacked"} if isinstance(told, Mapping) else told
        plain_own = {k: v for k, v in own.items() if k != "attacked"}
        found = changes({"model": {"logits": plain_own}}, {"model": {"logits": plain_told}})
        self.problems += [f"{sentence}." for sentence in found]
        return []

    def _attack(self, examples: Examples, attack: Attack, right: dict[ThreatModel, Tensor]) -> None:
        """Attacks the images that count as robust, and takes what it breaks from them."""
        threat = attack.threat_model
        standing = right[threat].nonzero().squeeze(1)
        before = len(standing)
        for rows in standing.split(self.batch_size):
            pixels, labels = examples.batch(rows.tolist(), self.subject.device)
            record, _ = attack_batch(self.subject, attack, pixels, labels, rows.tolist(), seed=0)
            right[threat][sorted(record.wrong())] = False
        if broken := before - int(right[threat].sum()):
            self.problems.append(
                f"{attack.name} breaks {broken} of the {before} images that count as robust under {threat}."
            )
