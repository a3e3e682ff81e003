"""Image-text retrieval, clean and under attack: Recall@k of images that look for their captions, and the other way round."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..attacks import PGD, ThreatModel, parse_attack
from ..attacks.features import squared_distance, two_logits
from ..clip.classifier import ZeroShotClassifier
from ..data.captions import CaptionedImages
from ..data.pixels import PixelDataset
from ..randomness import example_generators
from ..results.retrieval import CLEAN, WORST, Recall, Retrieval, RetrievalRow
from ..tuner.config import check_template
from ..utils.files import make_writable
from ..utils.machine import describe_machine, moved, versions
from ..utils.modules import buffers_kept, eval_mode, modules_in
from ..utils.outputs import main_process_says
from ..utils.text import shown
from .batch import check_inside
from .images import spread
from .loop import agreed, check_call
from .resume import SAMPLED, Jobs, compared_logits, finished, logits_twice
from .subject import OF_FLOAT32, describe

GOALS = {
    "feature": "FARE's: moves the image's feature away from its clean one",
    "caption": "lowers the image's similarity to its own captions",
    "contrast": "lowers it beside that to all other captions",
}
KS = (1, 5, 10)
CAPTION_TEMPLATE = (
    "a photo of {}"  # as CLIP's authors put captions (Radford et al. 2021, arXiv 2103.00020, appendix E.1)
)
TIE = 1e-6  # cosine similarities that are nearer than this are a tie: float32 rounds so


@dataclass(frozen=True)
class QueryAttack:
    """A white-box attack on an image of a collection, so that the image and its captions no longer find each other.

    It is untargeted, and climbs one of these, with f the normalised feature of an image and z its logits over all captions:

    - "feature": ‖f(x') - f(x)‖², and knows no captions. FARE's loss (Schlarmann et al. 2024, arXiv 2402.12336) without the
      lengths of the features, since a search sees directions alone.
    - "caption": the mean of -z over the image's own captions, on which alone it depends whether these find it.
    - "contrast": `logsumexp(z of all other captions) - logsumexp(z of its own)`, for the image that looks for its captions.

    Args:
        goal: "feature", "caption" or "contrast".
        pgd: The attack that climbs, whose loss stays "ce".

    Raises:
        ValueError: Another goal, or a PGD that is targeted, has restarts or another loss, or, for "feature", no random start:
            at the image itself the distance has no gradient.
    """

    goal: str
    pgd: PGD

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"goal={self.goal!r} is unknown. Allowed: {', '.join(GOALS)}.")
        if self.pgd.targeted or self.pgd.restarts > 1 or self.pgd.loss != "ce":
            raise ValueError(
                f"{self.pgd.name} has a loss, targets or restarts of its own. Give a plain one, such as {self.goal}-pgd-50."
            )
        if self.goal == "feature" and not self.pgd.random_start:
            raise ValueError(
                f"feature-{self.pgd.name} would not move: at the image itself the distance has no gradient."
            )

    @property
    def name(self) -> str:
        """The goal and the attack, "feature-pgd-50"."""
        return f"{self.goal}-{self.pgd.name}"

    @property
    def threat_model(self) -> ThreatModel:
        """The ball that the attack stays in."""
        return self.pgd.threat_model

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings in JSON types."""
        return {**self.pgd.to_dict(), "name": self.name, "goal": self.goal}


def parse_query_attack(name: str, threat_model: ThreatModel) -> QueryAttack:
    """Returns the attack of a name: "feature-pgd-50", "caption-pgd-20".

    Args:
        name: A goal, and a `PGD` as `parse_attack` reads it.
        threat_model: The ball to stay in.

    Raises:
        ValueError: Any other name.
    """
    match = re.fullmatch(rf"({'|'.join(GOALS)})-(.+)", name)
    attack = parse_attack(match[2], threat_model) if match else None
    if match is None or not isinstance(attack, PGD):
        known = "; ".join(f"{goal}-pgd-STEPS ({meaning})" for goal, meaning in GOALS.items())
        raise ValueError(f"{shown(name, 40)} is not an attack on retrieval. Known: {known}.")
    return QueryAttack(match[1], attack)


def evaluate_retrieval(
    classifier: ZeroShotClassifier,
    data: CaptionedImages,
    attacks: QueryAttack | Sequence[QueryAttack] = (),
    *,
    ks: Sequence[int] = KS,
    caption_template: str = CAPTION_TEMPLATE,
    batch_size: int = 128,
    seed: int = 0,
    output: str | Path | None = None,
    overwrite: bool = False,
    details: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Retrieval:
    """Measures Recall@k of image-text retrieval, without an attack, under each, and in the worst case over them.

    Image to text: an image looks for one of its captions among all captions. Text to image: a caption looks for its image among
    all images. The adversary moves the pixels of one image, and of no other: every image is attacked by itself, and looks for
    its captions, or is looked for by them, among the captions and the other images as they are. A tie counts against the query.

    The processes of `accelerate launch` or `torchrun` share the work. With `output`, a killed call resumes where it stopped when
    it is called again.

    Args:
        classifier: The model, in float32; its class names do not matter. Measured in eval mode and given back in the mode it had.
        data: At least two images with captions.
        attacks: Attacks, each with its threat model; none measures clean recall alone.
        ks: The k of Recall@k; none larger than the number of images or captions.
        caption_template: The text that a caption is put into, with one `{}`. With text prompts, it has to begin as the adapter's
            texts do (see `ZeroShotClassifier.embed_texts`).
        batch_size: Images per piece of work. It changes no random number.
        seed: Seed of the attacks, from 0 to 2**32 - 1.
        output: JSON file for the figures.
        overwrite: Measure again and replace what is there, as for `evaluate`.
        details: What else the figures depend on, for the record (JSON types).
        progress: Show a progress bar, in the main process.

    Returns:
        The figures, the same in every process.

    Raises:
        TypeError: Data or attacks of the wrong kind.
        ValueError: A model in another precision, fewer than two images, a k out of range, captions that the model or its prompts
            cannot take, two attacks alike, a seed out of range, or an output that cannot be written or holds something else.
    """
    attacks = [attacks] if isinstance(attacks, QueryAttack) else list(attacks)
    output = None if output is None else Path(output)
    check_call(attacks, batch_size, seed, output)
    _check(data, attacks, ks)
    check_template(caption_template)
    with eval_mode(classifier, gradients=False), buffers_kept(modules_in(classifier)):
        description = {
            k: v for k, v in describe(classifier).items() if k not in ("class_names", "template", "class_texts")
        }
        if description["precision"] not in OF_FLOAT32:
            raise ValueError(
                f"The model is in {description['precision']}, and retrieval is measured in float32: load it with dtype='float32'."
            )
        gallery = _Gallery.of(classifier, data, caption_template, batch_size)
        configuration = agreed({
            **(details or {}),
            "model": {**description, "logits": gallery.sample(batch_size)},
            "data": {"n": len(data), "captions": len(data.texts), "fingerprint": data.fingerprint()},
            "caption_template": caption_template,
            "attacks": [attack.to_dict() for attack in attacks],
            "ks": list(ks),
            "tie": TIE,
            "seed": seed,
            "batch_size": batch_size,
            **({} if classifier.device.type == "cpu" else {"device": classifier.device.type}),  # it draws other random numbers
            "versions": versions(),
        })  # fmt: skip
        folder = None
        if output is not None:
            if not overwrite and (found := finished(output, configuration, Retrieval)) is not None:
                return found
            main_process_says(lambda: make_writable(output.parent, output.name))
            folder = output.with_suffix(".partial")
        jobs = Jobs(folder, configuration, overwrite=overwrite)
        pieces = [
            _measure(gallery, attack, number, jobs, seed, batch_size, progress) for number, attack in enumerate(attacks)
        ]
    result = Retrieval(tuple(_figures(gallery, attacks, pieces, ks)), configuration, describe_machine())
    if output is not None:
        if PartialState().is_main_process:
            result.save(output)
            jobs.remove()
        PartialState().wait_for_everyone()
    return result


def _check(data: CaptionedImages, attacks: Sequence[Any], ks: Sequence[int]) -> None:
    if not isinstance(data, CaptionedImages):
        raise TypeError(f"data must be CaptionedImages, as `load_captions` returns them, not {type(data).__name__}.")
    other = next((attack for attack in attacks if not isinstance(attack, QueryAttack)), None)
    if other is not None:
        raise TypeError(
            f"{shown(other)} attacks class logits; give attacks as `parse_query_attack('feature-pgd-50', ...)`."
        )
    most = min(len(data), len(data.texts))
    if most < 2:
        raise ValueError("Retrieval needs at least two images: give more of them.")
    if not ks or list(ks) != sorted(set(ks)) or not all(isinstance(k, int) and 1 <= k <= most for k in ks):
        raise ValueError(f"ks={list(ks)} must be whole numbers from 1 to {most}, the number of images, ascending.")


@dataclass
class _Gallery:
    """All images and captions of a collection as features, and the ranks of what belongs together among them."""

    classifier: ZeroShotClassifier
    pixels: PixelDataset
    texts: Tensor  # (m, D) normalised
    owners: Tensor  # (m,) the image of each text
    images: Tensor  # (n, D) normalised
    image_ranks: Tensor  # (n,) of each image's best caption, without an attack
    text_ranks: Tensor  # (m,) of each caption's image

    @classmethod
    def of(cls, classifier: ZeroShotClassifier, data: CaptionedImages, template: str, batch_size: int) -> _Gallery:
        """Embeds the collection."""
        unique = list(dict.fromkeys(data.texts))  # captions that are the same have the same features, to the last bit
        features = classifier.embed_texts([template.format(text) for text in unique])
        places = {text: place for place, text in enumerate(unique)}
        texts = moved(features[[places[text] for text in data.texts]], classifier.device)
        owners = moved(torch.from_numpy(data.owners), classifier.device)
        pixels = PixelDataset(data.images, classifier.transform, labels=np.zeros(len(data), np.int64))
        empty = texts.new_empty(0)
        gallery = cls(classifier, pixels, texts, owners, empty, empty, empty)
        batches = [list(range(len(data)))[i : i + batch_size] for i in range(0, len(data), batch_size)]
        with torch.no_grad():
            gallery.images = torch.cat([classifier.image_features(gallery.batch(places)) for places in batches])
            ranks = [gallery.ranks(gallery.images[places], places) for places in batches]
        gallery.image_ranks, gallery.text_ranks = (torch.cat(each) for each in zip(*ranks, strict=True))
        return gallery

    def batch(self, places: Sequence[int]) -> Tensor:
        """Returns the pixels (B, 3, H, W) of the images at these places."""
        return moved(torch.stack([self.pixels[place]["pixels"] for place in places]), self.classifier.device)

    def own(self, places: Sequence[int]) -> Tensor:
        """Returns which texts belong to the images at these places: (B, m) bool."""
        return self.owners[None] == torch.tensor(places, device=self.owners.device)[:, None]

    def ranks(self, features: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the ranks of images with these features, each by itself in the place of the image that was there.

        Args:
            features: (B, D) normalised.
            places: The B places of the images.

        Returns:
            For each image, the rank (B,) of its best caption among all captions, from 1; and for the captions of these images,
            one after the other, the rank of their image among all images.
        """
        own = self.own(places)
        scores = features @ self.texts.t()  # (B, m)
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        of_images = 1 + ((scores >= best - TIE) & ~own).sum(1)
        rows, texts = own.nonzero().unbind(1)  # (t,), (t,): all captions of these images, image by image
        others = self.images @ self.texts[texts].t()  # (n, t)
        theirs = torch.arange(len(self.images), device=texts.device)[:, None] != self.owners[texts][None]
        of_texts = 1 + ((others >= scores[rows, texts] - TIE) & theirs).sum(0)
        return of_images.cpu(), of_texts.cpu()

    def loss(self, goal: str, places: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Returns what an attack of this goal climbs on the images at these places: (B, 3, H, W) -> (B,)."""
        clean, own = self.images[list(places)], self.own(places)

        def feature(images: Tensor) -> Tensor:
            return squared_distance(self.classifier.image_features(images), clean)

        def logits(images: Tensor) -> Tensor:
            return self.classifier.logits(self.classifier.image_features(images), self.texts)  # (B, m)

        def caption(images: Tensor) -> Tensor:
            return -logits(images).masked_fill(~own, 0).sum(1) / own.sum(1)

        def contrast(images: Tensor) -> Tensor:
            z = logits(images)
            mine, others = (z.masked_fill(mask, -torch.inf).logsumexp(1) for mask in (~own, own))
            return others - mine

        return {"feature": feature, "caption": caption, "contrast": contrast}[goal]

    def sample(self, batch_size: int) -> dict[str, Any]:
        """Returns the logits on a few images, by which the model is told from others of the same name."""
        places = spread(range(len(self.images)), SAMPLED)
        size = min(batch_size, SAMPLED)
        batches = [self.batch(places[i : i + size]) for i in range(0, len(places), size)]

        def logits(pixels: Tensor) -> Tensor:
            return self.classifier.logits(self.classifier.image_features(pixels), self.texts)

        return {"images": places, "scored": compared_logits(*logits_twice(logits, batches, self.classifier.device))}


def _measure(
    gallery: _Gallery, attack: QueryAttack, number: int, jobs: Jobs, seed: int, batch_size: int, progress: bool
) -> list[dict[str, Any]]:
    """Attacks all images, in pieces that processes share; returns what became of them, in their order."""
    state, n = PartialState(), len(gallery.images)
    pieces = [
        (f"{number:02d}-{i:06d}", list(range(n)[j : j + batch_size])) for i, j in enumerate(range(0, n, batch_size))
    ]
    mine = pieces[state.process_index :: state.num_processes]
    hidden = not (progress and state.is_main_process)
    title = f"{attack.name}, {attack.threat_model}"
    with tqdm(total=sum(len(places) for _, places in mine), desc=title, unit="image", disable=hidden) as bar:
        for piece, places in mine:
            if piece not in jobs.done:
                jobs.keep(piece, _attacked(gallery, attack, places, seed))
            bar.update(len(places))
    done = jobs.of_all()
    return [done[name] for name, _ in pieces]


def _attacked(gallery: _Gallery, attack: QueryAttack, places: list[int], seed: int) -> dict[str, Any]:
    """Attacks the images at these places: their ranks, those of their captions, and the cosines with their clean features."""
    pixels = gallery.batch(places)
    generators = example_generators(seed, places, stream="evaluation", device=pixels.device)
    labels = torch.zeros(len(places), dtype=torch.int64, device=pixels.device)
    adversarial = attack.pgd(two_logits(gallery.loss(attack.goal, places)), pixels, labels, generators)
    check_inside(attack.name, attack.threat_model, adversarial, pixels)
    with torch.no_grad():
        features = gallery.classifier.image_features(adversarial)
    images, texts = gallery.ranks(features, places)
    cosines = (features * gallery.images[places]).sum(1)
    return {"image_ranks": images.tolist(), "text_ranks": texts.tolist(), "cosines": cosines.tolist()}


def _figures(
    gallery: _Gallery, attacks: Sequence[QueryAttack], pieces: Sequence[list[dict[str, Any]]], ks: Sequence[int]
) -> list[RetrievalRow]:
    n = len(gallery.images)

    def row(name: str, ranks: Sequence[Tensor], threat: ThreatModel | None = None, **more: Any) -> RetrievalRow:
        of_images, of_texts = (tuple(Recall(k, int((of <= k).sum()), len(of), n) for k in ks) for of in ranks)
        return RetrievalRow(name, threat, of_images, of_texts, **more)

    clean = gallery.image_ranks, gallery.text_ranks
    rows, worst = [row(CLEAN, clean)], dict[ThreatModel, list[Tensor]]()
    for attack, found in zip(attacks, pieces, strict=True):
        joined = {
            name: [value for piece in found for value in piece[name]]
            for name in ("image_ranks", "text_ranks", "cosines")
        }
        after = torch.tensor(joined["image_ranks"]), torch.tensor(joined["text_ranks"])
        # no attack makes a query better: the adversary may also leave the image as it is
        ranks = [torch.maximum(a, b) for a, b in zip(clean, after, strict=True)]
        cosine = sum(joined["cosines"]) / n
        rows.append(row(attack.name, ranks, attack.threat_model, cosine=cosine, attack=attack.to_dict()))
        before = worst.get(attack.threat_model, clean)
        worst[attack.threat_model] = [torch.maximum(a, b) for a, b in zip(before, ranks, strict=True)]
    counts = [attack.threat_model for attack in attacks]
    return [*rows, *(row(WORST, ranks, threat) for threat, ranks in worst.items() if counts.count(threat) > 1)]
