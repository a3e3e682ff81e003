"""The answer "none of these" under attack: attackers who want a class and to be accepted at once.

With a threshold t on the largest logit, N classes and "none of these" are one classifier of N + 1: its last logit is t. Both
attackers are ordinary attacks on it, so that every attack knows what it has to reach:

- An image of no class has the label "none of these", and is attacked until another class wins.
- An image of class y is lost where a class that is neither y nor "none of these" wins. Both are one class then, whose logit is
  max(z_y, t), and the image is attacked until another one wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..attacks import Attack, LogitsFn
from ..attacks.base import Guarded
from ..results.rejection import Rejection, RejectionOutcome
from .batch import attack_batch
from .images import Examples
from .resume import Jobs
from .subject import Subject

INSIDE, OUTSIDE = "inside", "outside"  # begin the names of pieces of work, each of images of one label


@dataclass
class Rejecting:
    """The pieces of work that fall to this process: images of the classes and of none, clean and under each attack.

    Args:
        subject: The classifier of N classes.
        inside: Images of its classes.
        outside: Images of no class, with the label N.
        threshold: The largest logit that an image needs to be accepted.
        attacks: The attacks.
        seed: Their seed.
        batch_size: Images per piece of work.
        jobs: Keeps what is done.
        progress: Show a bar, in the main process.
    """

    subject: Subject
    inside: Examples
    outside: Examples
    threshold: float
    attacks: Sequence[Attack]
    seed: int
    batch_size: int
    jobs: Jobs
    progress: bool

    def measure(self) -> Rejection:
        """Does what is left, and returns what became of all images, the same in every process."""
        names: list[tuple[str, Attack | None]] = [("clean", None)]
        names += [(f"{i:02d}", attack) for i, attack in enumerate(self.attacks)]
        for name, attack in names:
            for kind, examples in ((INSIDE, self.inside), (OUTSIDE, self.outside)):
                self._run(f"{kind}-{name}", examples, attack)
        done = self.jobs.of_all()
        clean, _ = self._joined(done, f"{INSIDE}-clean")
        outcomes = []
        for name, attack in names:
            inside, (outside, _) = self._joined(done, f"{INSIDE}-{name}"), self._joined(done, f"{OUTSIDE}-{name}")
            settings = None if attack is None else attack.to_dict()
            outcomes.append(RejectionOutcome.of(settings, self.threshold, inside, outside, clean))
        return Rejection(self.threshold, tuple(outcomes))

    def _joined(self, done: dict[str, Any], name: str) -> tuple[list[float], list[bool]]:
        """Returns the scores of the images of pieces of this name, in their order in the dataset, and which answers are right."""
        pieces = [done[piece] for piece in done if piece.startswith(f"{name}-")]
        rows = sorted(
            row for piece in pieces for row in zip(piece["index"], piece["score"], piece["right"], strict=True)
        )
        return [score for _, score, _ in rows], [right for _, _, right in rows]

    def _run(self, name: str, examples: Examples, attack: Attack | None) -> None:
        state = PartialState()
        batches = list(self._batches(name, examples))[state.process_index :: state.num_processes]
        under = "clean" if attack is None else f"{attack.name}, {attack.threat_model}"
        title = f"reject, {'images of the classes' if name.startswith(INSIDE) else 'of no class'}, {under}"
        hidden = not (self.progress and state.is_main_process)
        with tqdm(total=sum(len(batch) for _, batch in batches), desc=title, unit="image", disable=hidden) as bar:
            for piece, indices in batches:
                if piece not in self.jobs.done:
                    self.jobs.keep(piece, self._record(examples, indices, attack))
                bar.update(len(indices))

    def _batches(self, name: str, examples: Examples) -> Iterator[tuple[str, list[int]]]:
        """Yields names and places of images: each batch has one label, for which there is one classifier to attack."""
        for label in examples.labels.unique().tolist():
            places = (examples.labels == label).nonzero().squeeze(1).tolist()
            for start in range(0, len(places), self.batch_size):
                yield f"{name}-{label:06d}-{start:08d}", places[start : start + self.batch_size]

    def _record(self, examples: Examples, indices: list[int], attack: Attack | None) -> dict[str, Any]:
        pixels, labels = examples.batch(indices, self.subject.device)
        if attack is not None:
            label = int(labels[0])
            attacked, scored = (
                Guarded(with_rejection(each.logits_fn, label, self.threshold))
                for each in (self.subject.attacked, self.subject.scored)
            )
            subject = replace(self.subject, attacked=attacked, scored=scored)
            _, pixels = attack_batch(subject, attack, pixels, labels, indices, self.seed)
        logits = self.subject.scored(pixels)
        right = (logits.argmax(1) == labels).tolist()
        return {"index": indices, "score": logits.double().amax(1).tolist(), "right": right}


def with_rejection(logits_fn: LogitsFn, label: int, threshold: float) -> LogitsFn:
    """Returns a classifier that is wrong on an image of a label where the image is accepted as another class.

    Args:
        logits_fn: images (B, 3, H, W) in [0, 1] -> logits (B, N).
        label: A class, whose logit is then max(z_y, threshold); or N, "none of these", the threshold itself.
        threshold: The largest logit that an image needs to be accepted.
    """

    def logits(images: Tensor) -> Tensor:
        found = logits_fn(images)
        own = torch.full_like(found[:, :1], threshold)
        if label == found.shape[1]:
            return torch.cat([found, own], 1)
        own = torch.maximum(found[:, label : label + 1], own)
        return torch.cat([found[:, :label], own, found[:, label + 1 :]], 1)

    return logits
