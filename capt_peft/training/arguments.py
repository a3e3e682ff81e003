"""CaptTrainingArguments: TrainingArguments plus the threat model, the attack and the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..attacks import PGD, Attack, ThreatModel, parse_attack, parse_fraction
from ..objectives import CaptObjective
from .processes import refuse_sharding
from .schedule import LR_SCHEDULES
from .settings import refuse_arguments

BEST_METRIC = "eval_robust_accuracy"


@dataclass
class CaptTrainingArguments(TrainingArguments):
    r"""Arguments of `CaptTrainer`: those of `transformers.TrainingArguments`, and what follows.

    Args:
        epsilon: Radius of the perturbations, as a fraction of the [0, 1] range of the pixels; "4/255" is read exactly.
        norm: "linf" or "l2".
        attack_steps: PGD steps of the training attack.
        attack_step_size: Length of its steps, same unit as `epsilon`; by default 2/3 of epsilon for 3 steps, as APT trains.
        attack_loss: What the training attack raises: "ce", "kl" (to the clean prediction) or "margin".
        attack_clip_each_step: Cut the training attack's perturbation to [0, 1] after every step. False: only what the model sees
            is cut, as in APT's code.
        eval_attack: Attack of `evaluate()`: "pgd-20", "pgd-100x5" (restarts), "pgd-20-margin", "autoattack", ...
        eval_step_size: Length of a step of a PGD `eval_attack`; by default as of `PGD`.
        consistency: λ, the weight of CAPT's consistency terms.
        weighting: α, CAPT's adaptive weight: "confidence", "entropy", "batch", "schedule", or a number in [0, 1].
        augment: Random crops and flips, drawn by example.
        squash: Resize training images to the model's size whatever their shape, instead of cropping, as in FAP's code.
        lr_schedule: "step": the learning rate follows `lr_scheduler_type` and `warmup_steps` step by step. "epoch": as in CoOp's
            toolbox, which MaPLe, FAP and APT train with: the first epoch at 1e-5, then a cosine that changes once an epoch.
        decay_biases: Let `weight_decay` act on biases too, as in CoOp's toolbox; the Trainer leaves them out.
        text_chunk_size: Class texts that run at once; the activations of the others are not kept, which bounds the memory, but
            computed again in the backward pass. By default all texts up to 256 classes, and 64 above that.
        image_chunk_size: Images of a batch that are computed at a time, which bounds the memory; by default all of them. Nothing
            is computed twice. With gradient accumulation instead, the texts would be run again for each part. The objective must
            be a mean over images.
        full_precision_attack: Run the training attack in float32 although `bf16` or `fp16` is set. Without it the attack runs in
            that precision; its losses and the signs of its gradients are taken in full precision either way.
        stop_on_collapse: Stop when the model has become constant: the consistency loss falls to a thousandth of what it was while
            the clean loss is that of guessing.
        stop_on_overfitting: Stop, instead of warning, when robust accuracy falls in `evaluate` while it rises in training; it
            needs an `eval_strategy`.

    Defaults that differ from TrainingArguments: `optim="sgd"` with momentum 0.9, `learning_rate=0.1`,
    `lr_scheduler_type="cosine"`, `num_train_epochs=50`, `per_device_train_batch_size=32`,
    `per_device_eval_batch_size=128`, `logging_steps=10`, `report_to="none"`, `remove_unused_columns=False`,
    `label_names=["labels"]`, `average_tokens_across_devices=True`; `metric_for_best_model="eval_robust_accuracy"` where a best
    checkpoint is asked for. Arguments that would have no effect, or a wrong one, are refused by name: `training.settings` has
    the list.
    """

    epsilon: str = field(
        default="4/255", metadata={"help": "Radius of the perturbations in [0, 1] pixels, e.g. 4/255."}
    )
    norm: str = field(default="linf", metadata={"help": "Norm of the threat model: linf or l2."})
    attack_steps: int = field(default=3, metadata={"help": "PGD steps of the training attack."})
    attack_step_size: str | None = field(default=None, metadata={"help": "Length of a step, e.g. 1/255."})
    attack_loss: str = field(default="ce", metadata={"help": "Loss of the training attack: ce, kl or margin."})
    attack_clip_each_step: bool = field(
        default=True, metadata={"help": "Cut the training attack's perturbation to [0, 1] after every step."}
    )
    eval_attack: str = field(default="pgd-20", metadata={"help": "Attack of evaluate(), e.g. pgd-20 or pgd-100x5."})
    eval_step_size: str | None = field(
        default=None, metadata={"help": "Length of a step of a PGD eval_attack, e.g. 1/255."}
    )
    consistency: float = field(default=1.5, metadata={"help": "Weight of the consistency terms (lambda)."})
    weighting: str = field(
        default="confidence", metadata={"help": "alpha: confidence, entropy, batch, schedule or a number in [0, 1]."}
    )
    augment: bool = field(default=False, metadata={"help": "Random crops and flips of the training images."})
    squash: bool = field(
        default=False, metadata={"help": "Resize training images whatever their shape, instead of cropping."}
    )
    lr_schedule: str = field(
        default="step", metadata={"help": "step, or epoch: 1e-5 in the first one, then a cosine by epoch (CoOp)."}
    )
    decay_biases: bool = field(default=False, metadata={"help": "Let weight_decay act on biases too."})
    text_chunk_size: int | None = field(
        default=None, metadata={"help": "Class texts that run at once; by default all up to 256 classes, else 64."}
    )
    image_chunk_size: int | None = field(
        default=None, metadata={"help": "Images of a batch that are computed at a time; by default all of them."}
    )
    full_precision_attack: bool = field(
        default=False, metadata={"help": "Run the training attack in float32 although bf16 or fp16 is set."}
    )
    stop_on_collapse: bool = field(default=True, metadata={"help": "Stop when the model has become constant."})
    stop_on_overfitting: bool = field(
        default=False, metadata={"help": "Stop when robust accuracy falls in evaluation while it rises in training."}
    )

    optim: str = field(
        default="sgd", metadata={"help": "Optimizer; sgd has momentum 0.9 unless optim_args says otherwise."}
    )
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    num_train_epochs: float = field(default=50, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training images a step and device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Evaluation images a batch and device."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  (HfArgumentParser takes the second type)
        default="none", metadata={"help": "Trackers; none by default."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: batches hold pixels and places."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "Must be end: checkpoints are never uploaded."})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Keys of the labels."})

    def __post_init__(self) -> None:
        refuse_sharding(self)
        refuse_arguments(self)
        self.threat_model  # noqa: B018  (bad values are refused before anything is set up)
        self.train_attack  # noqa: B018
        self.evaluation_attack  # noqa: B018
        CaptObjective(self.consistency, self.weighting)
        if self.optim == "sgd" and not self.optim_args:
            self.optim_args = "momentum=0.9"
        if self.image_chunk_size is not None and self.image_chunk_size < 1:
            raise ValueError(
                f"image_chunk_size={self.image_chunk_size} must be at least 1, or None for the whole batch."
            )
        if self.image_chunk_size and self.fp16:
            raise ValueError("image_chunk_size takes gradients that fp16's loss scaling does not reach. Use bf16.")
        if self.image_chunk_size and self.weighting == "batch":
            raise ValueError("weighting='batch' looks at the whole batch, so image_chunk_size cannot split it.")
        if self.image_chunk_size:
            if self.ddp_find_unused_parameters:
                raise ValueError("image_chunk_size does not work with ddp_find_unused_parameters=True. Leave it out.")
            # with it DDP makes one graph of both towers' features, and the first chunk would free that of the texts
            self.ddp_find_unused_parameters = False
        metric, greater = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        self._check_published()
        if metric is None and (self.metric_for_best_model is not None or self.save_strategy == SaveStrategy.BEST):
            self.metric_for_best_model = BEST_METRIC  # instead of a loss, which is not evaluated
            self.greater_is_better = True if greater is None else greater
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16=True would train in float32 on a CPU: Accelerate has no fp16 there. Use bf16=True.")
        checkpointing: Any = self.activation_checkpointing_kwargs or {}  # a dict by now, whatever it was given as
        if checkpointing.get("use_reentrant"):
            raise ValueError("use_reentrant=True cannot take the attack's gradients. Leave it out, or give False.")

    def _check_published(self) -> None:
        """Refuses settings of published trainers that would have no effect."""
        if self.squash and self.augment:
            raise ValueError(
                "squash and augment are two ways to bring a training image to the model's size. Choose one."
            )
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule={self.lr_schedule!r} is unknown. Allowed: {', '.join(LR_SCHEDULES)}.")
        shape = self.warmup_steps or self.lr_scheduler_kwargs or self.lr_scheduler_type != "cosine"
        if self.lr_schedule == "epoch" and shape:
            raise ValueError(
                "lr_schedule='epoch' is a cosine with a first epoch at 1e-5, so that lr_scheduler_type, lr_scheduler_kwargs and "
                "warmup_steps have no effect. Leave them out, or set lr_schedule='step'."
            )

    @property
    def threat_model(self) -> ThreatModel:
        """What the adversary may do to an image."""
        return ThreatModel(self.norm, self.epsilon)

    @property
    def train_attack(self) -> PGD:
        """The attack that makes the adversarial images of a training step."""
        step = None if self.attack_step_size is None else parse_fraction(self.attack_step_size)
        return PGD(
            self.threat_model,
            steps=self.attack_steps,
            step_size=step,
            loss=self.attack_loss,
            clip_each_step=self.attack_clip_each_step,
        )

    @property
    def evaluation_attack(self) -> Attack:
        """The attack of `evaluate()`."""
        return parse_attack(self.eval_attack, self.threat_model, step_size=self.eval_step_size)
