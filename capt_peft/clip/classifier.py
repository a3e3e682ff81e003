"""ZeroShotClassifier: from pixels in [0, 1] to logits over class names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.names import check_class_names
from ..data.pixels import PixelTransform
from ..data.texts import ClassTexts, Template, read_template, texts_for, texts_of
from ..tuner import Calibration, PromptLayer, adapters_off, clip
from ..tuner.config import DEFAULT_TEMPLATE
from ..tuner.model import capt_config, set_strength
from ..utils.machine import moved
from ..utils.modules import eval_mode
from ..utils.text import shown
from .activations import lean_activations
from .calibration import calibration_for
from .loading import load_model
from .texts import (
    SIZE,
    TextPart,
    TextParts,
    check_adapter_fits,
    check_free_texts_fit,
    check_texts,
    context_places,
    normalize,
    room_for_prompts,
    split_texts,
    tokenize_classes,
    tokenize_texts,
)


class ZeroShotClassifier(nn.Module):
    """A CLIP and the texts of N classes: the callable that attacks attack, `pixels in [0, 1] -> logits`.

    Normalisation is inside, so that an adversary moves pixels as the model sees them. Every call runs the texts, so that it is
    right whatever has changed since the last: weights written by any means, another adapter, another precision. A loop over one
    model that stays as it is takes `with_fixed_texts`, which runs them once.

    Args:
        model: A CLIPModel, with or without adapters (`PeftModel` too).
        processor: Its processor: an image processor and a tokenizer (`AutoProcessor.from_pretrained`).
        class_names: The N class names; at least two, no two alike.
        template: The text of a class; `{}` stands for its name. Several, as a list, as a text file with one on each line, or by
            the name of a published set (`capt_peft.data.TEMPLATES`): a class has one text of each, and its feature is the mean of
            theirs, scaled to length 1.
        class_texts: Own texts, by class name, or a JSON file of them: a text or a list for each class that has them,
            which stand in place of the template's, and of which the mean is taken as well; `{}` in a text stands for the name.
        text_chunk_size: Texts that run at once, which bounds the memory; with gradients the others are run again in the backward
            pass. By default all of them up to 256 classes, and 64 above that. The results are the same up to rounding.

    Raises:
        ValueError: A `text_chunk_size` below 1; a template without one `{}`; class names that repeat, or whose texts are the same
            to the tokenizer; texts of another class, or one that is given twice; a text that is too long for the model, or one so
            short that the adapter's prompts would overwrite the class name; a model with a head for classification, or the
            processor of another model; or other classes than those of an active adapter with class-specific prompts.
    """

    model: Any  # a PeftModel, or a model of transformers: both hand out CLIP's methods
    input_ids: Tensor  # (T, L), of the T texts of N classes, class by class
    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        class_names: Sequence[str],
        template: Template = DEFAULT_TEMPLATE,
        *,
        class_texts: ClassTexts | None = None,
        text_chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if text_chunk_size is not None and text_chunk_size < 1:
            raise ValueError(f"text_chunk_size={text_chunk_size} must be at least 1, or None for the default.")
        self.model = model
        self.processor = processor
        self.transform = PixelTransform(processor)
        check_class_names(class_names)
        self.class_names = tuple(class_names)
        self.template = read_template(template)
        self.class_texts = texts_for(self.class_names, class_texts)
        clip.check_supported(model)
        texts = texts_of(self.class_names, self.template, self.class_texts)
        self.texts = [one.text for one in texts]
        self.text_labels = [one.label for one in texts]
        self._tokenizer = clip.reader(model, processor.tokenizer)
        text_inputs = tokenize_classes(model, self._tokenizer, self.class_names, texts)
        self._first_template = self.template if isinstance(self.template, str) else self.template[0]
        ids = text_inputs["input_ids"]
        self._room = room_for_prompts(self._tokenizer, self.class_names, texts, ids, self._first_template)
        self._check_adapter()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in self.transform.normalization)
        for name, value in {**text_inputs, "mean": mean, "std": std}.items():
            self.register_buffer(name, value, persistent=False)
        self.to(next(model.parameters()).device)
        self.text_chunk_size = text_chunk_size
        self._parts = self.text_parts()
        self.train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        class_names: Sequence[str] | None = None,
        template: Template | None = None,
        class_texts: ClassTexts | None = None,
        **kwargs: Any,
    ) -> ZeroShotClassifier:
        """Loads an adapter with its base model and processor, or a bare CLIP.

        Args:
            name_or_path: Folder or Hub id of an adapter of CAPT or, saved by `CaptTrainer`, of another PEFT method; or of a CLIP.
            class_names: The classes; by default those the adapter was tuned on.
            template: The text of a class, or several, in the forms that the class takes; by default the adapter's.
            class_texts: Own texts, or a file of them. By default the adapter's, for those of the classes that have some
                there, unless a template is given, which is then the text of all classes; {} for none.
            kwargs: For loading: `dtype`, float32 by default; `base`, another base model; `revision`, `token`, `cache_dir`,
                `subfolder`; and of the base model `device_map` (one device), `quantization_config`, `attn_implementation`, ...

        Raises:
            ValueError: No class names given, and none recorded in the adapter.
        """
        model, processor = load_model(name_or_path, **kwargs)
        config = model.peft_config["default"] if isinstance(model, PeftModel) else None
        names = class_names if class_names is not None else getattr(config, "class_names", None)
        if not names:
            raise ValueError(f"{name_or_path} records no class names. Give the classes: class_names=['cat', 'dog'].")
        if class_texts is None and template is None:
            class_texts = texts_for(names, getattr(config, "class_texts", None), strict=False)
        template = template if template is not None else getattr(config, "template", DEFAULT_TEMPLATE)
        return cls(model.eval(), processor, names, template, class_texts=class_texts)

    # ------------------------------------------------------------------------------------------------------ logits

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the logits of images.

        Args:
            pixels: (B, 3, H, W) float in [0, 1], of the model's size.

        Returns:
            (B, N) float32 logits, at the model's own temperature.
        """
        return self.logits(self.image_features(pixels), self.text_features())

    def text_inputs(self) -> dict[str, Tensor]:
        """Returns the tokens of the T texts, having checked that the adapter fits: `input_ids`, `attention_mask`, (T, L)."""
        self._check_adapter()
        return {name: self._own(name, self.device) for name in clip.TEXT_INPUTS if hasattr(self, name)}

    def with_fixed_texts(self) -> Callable[[Tensor], Tensor]:
        """Returns this classifier as a function whose text features are computed now, once: for loops and attacks.

        It takes what `forward` takes, and is right while the model stays as it is: after an optimiser's step, another adapter,
        another strength or `frozen()`, make another.
        """
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be part of an attack's graph
            texts = self.encode_texts()
        return lambda pixels: self.logits(self.image_features(pixels), texts)

    def text_features(self) -> Tensor:
        """Returns the (N, D) normalised text features of the classes, without gradient in eval mode."""
        if self.training:
            return self.encode_texts()
        with torch.inference_mode(False), torch.no_grad():
            return self.encode_texts()

    def encode_texts(self) -> Tensor:
        """Runs the text tower on all texts: (N, D) normalised features of the classes, with gradient if the caller wants one."""
        if self._parts is None:
            return normalize(clip.text_features(self.model, self.text_inputs()))
        return self._parts.join([self.encode_part(part) for part in self._parts.parts])

    def text_parts(self, *, cut: bool = True) -> TextParts | None:
        """Returns the texts in parts of `text_chunk_size`; None if one has all, and each is a class. See `split_texts`."""
        inputs = {name: getattr(self, name).cpu() for name in clip.TEXT_INPUTS if hasattr(self, name)}
        return split_texts(inputs, self.text_chunk_size, labels=self.text_labels, cut=cut)

    def encode_part(self, part: TextPart) -> Tensor:
        """Runs the text tower on a part: (n, D) normalised features. Its activations are not kept: backward runs it again."""

        def run() -> Tensor:
            with lean_activations(self.base_model), self.part_inputs(part) as inputs:
                return normalize(clip.text_features(self.model, inputs))

        features: Tensor = checkpoint(run, use_reentrant=False) if torch.is_grad_enabled() else run()
        return features

    @contextmanager
    def part_inputs(self, part: TextPart) -> Iterator[dict[str, Tensor]]:
        """Gives the tokens of a part; within it, class-specific prompts are those of its classes."""
        self._check_adapter()
        layers = [m for m in self.model.modules() if isinstance(m, PromptLayer) and m.site.tower == "text"]
        for layer in layers:
            layer.rows = part.rows
        try:
            yield part.inputs_on(self.device)
        finally:
            for layer in layers:
                layer.rows = None

    def context_places(self) -> slice:
        """Returns the positions of the tokens that no text needs to tell its class: text prompts, or words before the name."""
        return context_places(self.model, self._room)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Runs the image tower: (B, 3, H, W) pixels in [0, 1] -> (B, D) normalised features."""
        return normalize(clip.image_features(self.model, self.pixel_values(pixels)))

    def pixel_values(self, pixels: Tensor) -> Tensor:
        """Normalises pixels in [0, 1] to what the model takes, in its precision."""
        mean, std = self._own("mean", pixels.device), self._own("std", pixels.device)
        return ((pixels - mean) / std).to(self._parameter.dtype)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Returns (B, N) float32 logits of normalised features (B, D) and (N, D)."""
        return clip.logits(self.model, image_features, text_features)

    @contextmanager
    def frozen(self) -> Iterator[ZeroShotClassifier]:
        """Within it, this is the classifier of the base model: adapters are off."""
        with adapters_off(self.model):
            yield self

    @property
    def strength(self) -> float:
        """How much of the active CAPT adapter acts, from 0 (the base model) to 1; it can be set, see `set_strength`."""
        return capt_config(self.model).strength

    @strength.setter
    def strength(self, value: float) -> None:
        set_strength(self.model, value)

    # -------------------------------------------------------------------------------------------------- prediction

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        *,
        class_names: Sequence[str] | None = None,
        template: Template | None = None,
        class_texts: ClassTexts | None = None,
        top_k: int | None = None,
        batch_size: int = 32,
        reject: bool = False,
        multi_label: bool = False,
        sigmoid: bool = False,
    ) -> list[list[dict[str, Any]]]:
        """Classifies images.

        Scores are softmax(logits / temperature). The temperature is that of the adapter's calibration, if it holds for exactly
        this classifier (`calibration`), else the model's own: its logits as they are.

        Args:
            images: One image or a list: PIL images, paths, or arrays ((H, W), (H, W, 3); uint8, or float in [0, 1]).
            class_names: Other classes for this call.
            template: Another text of a class for this call, or several; of all classes but those that `class_texts` has some for.
            class_texts: Own texts for this call, as in `from_pretrained`; {} for none.
            top_k: Return the k best classes; by default all.
            batch_size: Images per forward pass.
            reject: An image may be none of these classes: its list is empty where no logit reaches the calibration's threshold.
            multi_label: An image may have any number of classes, and its list has these alone: the ones whose logits are above
                the calibration's thresholds of the classes. The score of a class is then 1 / (1 + exp(-x)), x being how far its
                logit is above: more than 0.5, and no probability.
            sigmoid: Scores of a SigLIP as it was trained: sigmoid(logit), how likely the text of a class fits the image, whatever
                the other classes are. Neither the order of the classes nor `reject` changes.

        Returns:
            For each image, its classes from best to worst, as in transformers' pipelines: `{"label": name, "score": p}`.

        Raises:
            ValueError: `reject` or `multi_label` without a calibration that holds here, or both at once; `sigmoid` with
                `multi_label`, or of a model that is no SigLIP; an image that cannot be read (the file is named), a
                `top_k` or `batch_size` below 1, class names or texts that a classifier refuses, or logits that are not
                finite (the cause is named).
        """
        if not (class_names is template is class_texts is None):
            names = self.class_names if class_names is None else class_names
            if class_texts is None and template is None:
                class_texts = texts_for(names, self.class_texts, strict=False)
            template = self.template if template is None else template
            other = ZeroShotClassifier(self.model, self.processor, names, template, class_texts=class_texts)
            return other.predict(
                images, top_k=top_k, batch_size=batch_size, reject=reject, multi_label=multi_label, sigmoid=sigmoid
            )
        if batch_size < 1 or (top_k is not None and top_k < 1):
            raise ValueError(f"top_k={top_k} and batch_size={batch_size} must be at least 1.")
        if reject and multi_label:
            raise ValueError(
                "reject=True has no effect with multi_label=True, where no class at all is an answer anyway."
            )
        if sigmoid:
            clip.check_sigmoid(self.model)
            if multi_label:
                raise ValueError("sigmoid=True and multi_label=True are scores of two kinds. Choose one.")
        calibration, why = calibration_for(self)
        if calibration is None and (reject or multi_label):
            raise ValueError(f"{'reject' if reject else 'multi_label'}=True needs thresholds: {why}.")
        images = _listed(images)
        with eval_mode(self):
            texts, answers = self.text_features(), []
            for start in range(0, len(images), batch_size):
                pixels = moved(self.transform.batch(images[start : start + batch_size]), self.device)
                logits = self.logits(self.image_features(pixels), texts)
                self._check_finite(logits, texts)
                scores, named = _answers(logits, calibration, reject, multi_label)
                for row, said in zip(logits.sigmoid().cpu() if sigmoid else scores, named, strict=True):
                    best = row.topk(min(top_k or len(row), len(row)))
                    ordered = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                    answers.append([{"label": self.class_names[i], "score": p} for p, i in ordered if said[i]])
        return answers

    @property
    def calibration(self) -> Calibration | None:
        """The adapter's calibration, if it holds for exactly these classes, texts, strength, weights and precision, else None.

        The weights are the adapter's and the base model's; what is written to these through `parameter.data` stays unseen.
        """
        return calibration_for(self)[0]

    def scores(self, logits: Tensor) -> Tensor:
        """Returns the scores (B, N) that `predict` gives for logits (B, N), on the CPU."""
        return _scores(logits, self.calibration)

    # -------------------------------------------------------------------------------------------------- embeddings

    def embed_images(self, images: Any, *, batch_size: int = 32) -> Tensor:
        """Returns the features of images, for retrieval; class names do not affect them.

        Args:
            images: As for `predict`.
            batch_size: Images per forward pass.

        Returns:
            (n, D) float32 on the CPU, without gradient, each row of length 1. Products with `embed_texts` are cosine
            similarities; `logits` of both are the model's.

        Raises:
            ValueError: An image that cannot be read, a `batch_size` below 1, or features that are not finite.
        """
        listed = _listed(images)

        def run(rows: slice) -> Tensor:
            pixels = moved(self.transform.batch(listed[rows]), self.device)
            return clip.image_features(self.model, self.pixel_values(pixels))

        return self._embedded(run, len(listed), batch_size)

    def embed_texts(self, texts: str | Sequence[str], *, batch_size: int = SIZE) -> Tensor:
        """Returns the features of free texts, such as captions and search queries; see `embed_images`.

        They run as they are, without the template. The n text prompts of an adapter replace the first n tokens of a text, which
        are those of `template` ("a photo" of "a photo of a {}."), of several the first, so that with text prompts every text must
        begin with these.

        Args:
            texts: One text or a list; texts may repeat.
            batch_size: Texts per forward pass.

        Returns:
            (n, D) float32 on the CPU, without gradient, each row of length 1.

        Raises:
            TypeError: Something else than texts.
            ValueError: A text that is empty, too long for the model, holds a start or end token, or does not begin as the
                adapter's prompts need it; class-specific prompts, which know no other texts than those of their classes; a
                `batch_size` below 1, or features that are not finite.
        """
        if not isinstance(texts, Iterable):
            raise TypeError(f"texts={shown(texts, 40)} ({type(texts).__name__}) must be a text or a list of texts.")
        listed = [texts] if isinstance(texts, str) else list(texts)
        check_texts(listed)
        inputs: dict[str, Tensor] = {}
        if listed:
            inputs = tokenize_texts(self.model, self._tokenizer, listed)
            check_free_texts_fit(self.model, self._tokenizer, self._first_template, listed, inputs["input_ids"])

        def run(rows: slice) -> Tensor:
            part = {name: moved(ids[rows], self.device) for name, ids in inputs.items()}
            return clip.text_features(self.model, part)

        return self._embedded(run, len(listed), batch_size)

    @torch.no_grad()
    def _embedded(self, run: Callable[[slice], Tensor], n: int, batch_size: int) -> Tensor:
        """Returns the normalised features (n, D) that `run` gives for some rows after the others."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        with eval_mode(self):
            parts = [run(slice(start, start + batch_size)).float().cpu() for start in range(0, n, batch_size)]
            features = torch.cat(parts) if parts else self.text_features()[:0].float().cpu()
        if not torch.isfinite(features).all():
            raise ValueError(
                "The features are not finite: weights or prompts are damaged, or too large for the model's precision. Load "
                "another model or adapter."
            )
        return normalize(features)

    # ------------------------------------------------------------------------------------------------------- state

    def _own(self, name: str, device: torch.device) -> Tensor:
        """Returns a tensor of this classifier's own, which is moved once if a Trainer has moved the model without it."""
        value: Tensor = getattr(self, name)
        if value.device != device:
            with torch.inference_mode(False):  # an inference tensor could not be part of a graph later
                value = moved(value, device)
            setattr(self, name, value)
        return value

    def _check_adapter(self) -> None:
        # at every run of the texts: another adapter may have become the active one since this was made
        check_adapter_fits(self.model, self.class_names, self._room)

    def _check_finite(self, logits: Tensor, texts: Tensor) -> None:
        """Raises a ValueError that names the cause if logits (B, N) are not finite."""
        if torch.isfinite(logits).all():
            return
        broken = (name for name, p in self.model.named_parameters() if not torch.isfinite(p).all())
        parameter = next(broken, None)
        bad_texts = (~torch.isfinite(texts).all(-1)).nonzero().flatten().tolist()
        if parameter is not None:
            cause = (
                f"the weights {parameter} hold NaN or infinite values; the model is damaged or its training diverged"
            )
        elif bad_texts:
            name = shown(self.class_names[bad_texts[0]])
            cause = f"the text features of class {name} are not: prompts or weights are too large"
        elif not torch.isfinite(clip.log_scale(self.model).exp()):
            cause = f"the temperature overflows (logit_scale={float(clip.log_scale(self.model)):.4g}, of which exp is taken)"
        else:
            cause = "the features of an image are not: prompts or weights are too large for the model's precision"
        raise ValueError(
            f"The logits are not finite, so that there are no scores: {cause}. Load another model or adapter."
        )

    @property
    def device(self) -> torch.device:
        """Where the model is; a Trainer, for one, moves it without this classifier's own tensors."""
        return self._parameter.device

    @property
    def base_model(self) -> Any:
        """The CLIP, without PEFT's wrapper around it."""
        return clip.base_model(self.model)

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = next(self.model.parameters())
        return parameter


def _answers(logits: Tensor, calibration: Calibration | None, reject: bool, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Returns the scores (B, N) of logits (B, N), and which classes an answer may name (B, N)."""
    if calibration is not None and multi_label:
        above = calibration.above(logits)
        return above.sigmoid(), above > 0
    scores = _scores(logits, calibration)
    if calibration is not None and reject:
        return scores, calibration.accepts(logits)[:, None].expand_as(scores)
    return scores, torch.ones_like(scores, dtype=torch.bool)


def _scores(logits: Tensor, calibration: Calibration | None) -> Tensor:
    return logits.softmax(-1).cpu() if calibration is None else calibration.scores(logits)


def _listed(images: Any) -> Sequence[Any]:
    """Returns one image as a list; a column of `datasets` is a sequence already."""
    return [images] if isinstance(images, str) or not isinstance(images, Sequence) else images
