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
from ..results.earlier import RANDOM, TOLERANCE, changes, logit_changes, logit_distance
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
_EPSILON = 8 * torch.finfo(torch.float32).eps  # of the largest logit: what float32 cannot tell apart


_CHECKED = (
    "Verified: clean accuracy and the worst case agree with the images, the data, the weights and the distances. The names of "
    "attacks, the accuracy under each, signs and all other figures are the record's own."
)


@dataclass(frozen=True)
class Verification:
    """What the worst-case images of an evaluation show.

    Attributes:
        bounds: For each threat model, the share of images that are right, clean and in the worst case, as these weights answer,
            whatever the record says: robust accuracy is at most this. Images outside of their threat model prove nothing, and
            count as right. Without the data, right in the worst case alone. Empty where a file cannot be believed at all.
        clean: Clean accuracy; None without the data.
        problems: Sentences on what does not agree with the record.
        broken: Sentences on attacks that break images which the record's attacks left: it is honest, and its figure too high.
        unchecked: Sentences on what could not be checked.
    """

    bounds: Mapping[ThreatModel, Accuracy] = field(default_factory=dict)
    clean: Accuracy | None = None
    problems: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether data, weights, distances, clean accuracy and the worst case were checked and agree, and nothing broke more."""
        return bool(self.bounds) and not (self.problems or self.broken or self.unchecked)

    def __str__(self) -> str:
        verdict = "verified upper bound" if self.verified else "not verified"
        lines = [] if self.clean is None else [f"Clean accuracy: {self.clean}"]
        for threat, bound in self.bounds.items():
            lines.append(f"At most {bound} robust under {threat}: {verdict}")
        lines += [f"Does not agree: {problem}" for problem in self.problems]
        lines += [f"A stronger attack: {sentence}" for sentence in self.broken]
        lines += [f"Could not be checked: {reason}" for reason in self.unchecked]
        return "\n".join([*lines, _CHECKED if self.verified else "Not verified."])


@dataclass(frozen=True)
class _Kept:
    """The worst-case images of a threat model, what the classifier says of them, and which of them count."""

    threat: ThreatModel
    images: Tensor  # (n, 3, H, W)
    right: Tensor  # (R, n) bool: in each of R decisions, more than one where a defence is random
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
            (`Defended`), if it has one. A random defence cannot be verified by one image per example: its accuracy is compared
            within the noise of several answers, and problems are found all the same.
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
        problems += _protocol_problems(evaluation)
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
    if defence is not None and defence.random:
        checked.unchecked.append(
            f"the defence {defence.name} is random: {subject.decisions} answers on each image were compared within "
            "their noise, and one image per example says little about the worst case."
        )
    if data is None:
        return checked.without_data()
    bare = classifier.classifier if isinstance(classifier, Defended) else classifier
    return checked.with_data(Examples(data, bare), attacks if defence is None else adaptive(attacks, defence))


def _model_problems(subject: Subject, configuration: Mapping[str, Any]) -> Iterator[str]:
    """Yields sentences on where the record is of another model than this one."""
    model = configuration.get("model") or {}
    if not isinstance(model, Mapping):
        yield "the record does not say which model it is of: its model is not a JSON object."
        return
    own, told = _identity(subject.description), _identity(model)
    if found := changes({"model": own}, {"model": told}):
        yield f"the record is of another model: {some(found, 5, separator='; ')}."


def _defence_problems(defence: Defence | None, told: Any) -> Iterator[str]:
    own = None if defence is None else json.loads(json.dumps(defence.to_dict()))
    if own != told:
        names = [given["name"] if isinstance(given, dict) and "name" in given else "none" for given in (told, own)]
        yield f"the record is of the defence {plain(names[0], 80)}, with other settings or another one than {names[1]}."


def _protocol_problems(evaluation: Evaluation) -> Iterator[str]:
    """Yields sentences on a published protocol that the record names, where its attacks are not those of the protocol."""
    name = evaluation.configuration.get("protocol")
    if name is None or evaluation.configuration.get("defence") is not None:  # whose attacks go by ways of their own
        return
    if evaluation.protocol is None:
        yield f"the record names the protocol {plain(name, 80)}, which this version does not know."
        return
    for threat in evaluation.worst_case:
        given = [outcome.attack for outcome in evaluation.white_box(threat)]
        try:
            own = [evaluation.protocol.attack(each, threat).to_dict() for each in evaluation.protocol.attacks]
        except ValueError as error:
            yield f"the record names a protocol that it is not by: {error}."
            continue
        if any(attack not in given for attack in own):
            yield (
                f"the record names the protocol {evaluation.protocol.name}, but its attacks under {threat} are not the "
                f"protocol's ({', '.join(evaluation.protocol.attacks)}, with its settings)."
            )


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
    rows = torch.arange(len(images)).split(batch_size)
    logits = torch.cat([subject.scored(moved(images[part], subject.device)).cpu() for part in rows])
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels range from {int(labels.min())} to {int(labels.max())}, of {logits.shape[1]} classes.")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    best = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    # by their spread: a number that is added to all logits says nothing, and only makes float32 coarser
    rounding = torch.maximum(TOLERANCE * (logits.amax(1) - logits.amin(1)), _EPSILON * logits.abs().amax(1))
    if subject.decisions == 1:
        right = (logits.argmax(1) == labels)[None]
    else:
        right = torch.cat([_decided(subject, images[part], labels[part], part) for part in rows], dim=1)
    return _Kept(threat, images, right, (own - best).abs() <= rounding)


def _decided(subject: Subject, pixels: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Returns which decisions on B images are right: (R, B) bool."""
    here = moved(pixels, subject.device), moved(labels, subject.device)
    return subject.decide(*here, rows.tolist(), seed=0).right.cpu()


def _share(right: Tensor) -> Accuracy:
    """Returns the share of right decisions (R, n)."""
    return Accuracy(int(right.sum()), right.shape[1], len(right))


def _is_random(subject: Subject, images: Tensor) -> bool:
    first, second = (subject.scored(moved(images, subject.device)).cpu().double() for _ in range(2))
    return logit_distance(first, second) > TOLERANCE / 2


def _noise(right: Tensor) -> float:
    """Returns by how much the accuracy of (R, n) answers at random may differ from that of R others: 5 standard errors, 1 image.

    The error comes from the accuracies of whole decisions, as what is drawn may be the same for all images of a batch.
    """
    decisions, n = right.shape
    return 5 * float(right.double().mean(1).std()) * (2 / decisions) ** 0.5 + 1 / n


@dataclass
class _Against:
    """Compares what the images show with the record."""

    subject: Subject
    evaluation: Evaluation
    labels: Tensor
    kept: Sequence[_Kept]
    problems: list[str]
    batch_size: int
    broken: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def without_data(self) -> Verification:
        right = {of.threat: of.right for of in self.kept}
        self._compare(right)
        self.unchecked.append(
            "the data are not here. So neither the labels nor whether the images lie within their threat model is known, and the "
            "figures above are what the file says of itself."
        )
        return self._result(right)

    def with_data(self, examples: Examples, attacks: Sequence[Attack]) -> Verification:
        if examples.to_dict() != self.evaluation.configuration.get("data"):
            self.problems.append(
                "the record is of other data than these: their fingerprints, or numbers of images, differ."
            )
        if not torch.equal(examples.labels.cpu(), self.labels):
            self.problems.append("the labels of the images are not those of the data.")
            return Verification(problems=tuple(self.problems))
        clean = torch.cat([self._clean(examples, rows) for rows in self._rows()], dim=1)
        right = {of.threat: clean & of.right for of in self.kept}
        for of in self.kept:
            outside = self._check_distances(examples, of, right[of.threat].all(0))
            right[of.threat] = torch.where(outside, clean, right[of.threat])
        self._compare(right)
        accuracy, told = _share(clean), self.evaluation.clean
        if self.subject.decisions > 1:
            agrees = accuracy.n == told.n and abs(accuracy.value - told.value) <= _noise(clean)
        else:
            self._check_logits(examples)
            agrees = accuracy == told or bool(self.unchecked)
        if not agrees:
            self.problems.append(f"clean accuracy is {accuracy}; the record says {told}.")
        if attacks and self.subject.decisions > 1:
            self.unchecked.append("attacks on a random defence are not tried here: capt-peft evaluate measures it.")
        else:
            for attack in attacks:
                self._attack(examples, attack, right)
        return self._result(right, accuracy)

    def _result(self, right: Mapping[ThreatModel, Tensor], clean: Accuracy | None = None) -> Verification:
        bounds = {threat: _share(of) for threat, of in right.items()}
        return Verification(bounds, clean, tuple(self.problems), tuple(self.broken), tuple(self.unchecked))

    def _rows(self) -> Sequence[Tensor]:
        return torch.arange(len(self.labels)).split(self.batch_size)

    def _clean(self, examples: Examples, rows: Tensor) -> Tensor:
        return _decided(self.subject, *examples.batch(rows.tolist(), self.subject.device), rows)

    def _check_distances(self, examples: Examples, of: _Kept, robust: Tensor) -> Tensor:
        """Notes images outside of their ball, which it returns, and images that count as robust though nothing has moved them."""
        outside, unmoved = torch.ones(len(of.images), dtype=torch.bool), 0
        for rows in self._rows():
            pixels = examples.batch(rows.tolist(), torch.device("cpu"))[0]
            if of.images.shape[1:] != pixels.shape[1:]:
                self.problems.append(
                    f"the images under {of.threat} are {tuple(of.images.shape[1:])}, those of the data {tuple(pixels.shape[1:])}."
                )
                return torch.ones_like(outside)
            length = of.threat.norm_of(of.images[rows] - pixels.float())
            outside[rows] = ~(length <= of.threat.epsilon + _ROUNDING)
            unmoved += int(((length == 0) & robust[rows]).sum())
        if outside.any():
            self.problems.append(
                f"{int(outside.sum())} of {len(of.images)} images lie outside of {of.threat} around the clean image."
            )
        if unmoved and of.threat.epsilon > 0:
            self.problems.append(
                f"{unmoved} of the images under {of.threat} that count as robust are the clean images themselves: nothing "
                "attacked them."
            )
        return outside

    def _compare(self, right: Mapping[ThreatModel, Tensor]) -> None:
        """Notes worst cases, and a union of them, that are not those of the record, but by images that rounding decides.

        Of these, all may be broken in the record, but hardly any robust: a record's figure may be below what the images show.
        """
        told, union = self.evaluation.worst_case, self.evaluation.union
        certain = {of.threat: right[of.threat] & ~of.close for of in self.kept}
        possible = {of.threat: right[of.threat] | of.close for of in self.kept}
        rows = [(f"in the worst case under {t}", told[t], right[t], certain[t], possible[t]) for t in told]
        if union is not None:
            first, second, third = (torch.stack(list(of.values())).all(0) for of in (right, certain, possible))
            rows.append(("under every threat model", union, first, second, third))
        for where, accuracy, found, *rounded in rows:
            shown, (least, most) = _share(found), (int(each.sum()) for each in rounded)
            if shown.decisions > 1:  # of answers that are drawn again: an honest worst case took the lowest of several
                agrees = accuracy.value <= shown.value + _noise(found)
            else:
                few = 1 + shown.n // 1000
                agrees = accuracy.decisions == 1 and least <= accuracy.correct <= min(most, shown.correct + few)
            if not (agrees and accuracy.n == shown.n):
                self.problems.append(
                    f"{shown.correct / shown.decisions:g} of {shown.n} images are right {where}; the record says "
                    f"{accuracy.correct / accuracy.decisions:g} of {accuracy.n}."
                )

    def _check_logits(self, examples: Examples) -> None:
        """Compares the logits on sample images with those of the record."""
        model = self.evaluation.configuration.get("model")
        told = model.get("logits") if isinstance(model, Mapping) else None
        own = sample_logits(self.subject, examples, self.batch_size)[0]
        if own["scored"] == RANDOM or _is_random(self.subject, self.kept[0].images[: self.batch_size]):
            self.unchecked.append("the classifier answers at random: one answer per image says little about it.")
            return
        scored = {**told, "attacked": own.get("attacked")} if isinstance(told, Mapping) else told  # what decides, alone
        self.problems += [f"{sentence}." for sentence in logit_changes(own, scored)]

    def _attack(self, examples: Examples, attack: Attack, right: dict[ThreatModel, Tensor]) -> None:
        """Attacks the images that count as robust, and takes what it breaks from them."""
        threat = attack.threat_model
        standing = right[threat][0].nonzero().squeeze(1)
        before = len(standing)
        for rows in standing.split(self.batch_size):
            pixels, labels = examples.batch(rows.tolist(), self.subject.device)
            record, _ = attack_batch(self.subject, attack, pixels, labels, rows.tolist(), seed=0)
            right[threat][:, sorted(record.wrong())] = False
        if broken := before - int(right[threat].sum()):
            self.broken.append(
                f"{attack.name} breaks {broken} of the {before} images that count as robust under {threat}: it is too high."
            )
