"""CaptTrainingArguments: TrainingArguments plus the threat model, the attack and the objective."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..attacks import PGD, Attack, ThreatModel, parse_attack, parse_fraction
from ..objectives import CaptObjective


@dataclass
class CaptTrainingArguments(TrainingArguments):
    r"""Arguments of `CaptTrainer`: those of `transformers.TrainingArguments`, and what follows.

    Args:
        epsilon: Radius of the perturbations, as a fraction of the [0, 1] range of the pixels; "4/255" is read exactly.
        norm: "linf" or "l2".
        attack_steps: PGD steps of the training attack.
        attack_step_size: Length of its steps, same unit as `epsilon`; by default 2/3 of epsilon for 3 steps, as APT trains.
        attack_loss: What the training attack raises: "ce", "kl" (to the clean prediction) or "margin".
        eval_attack: Attack of `evaluate()`: "pgd-20", "pgd-100x5" (restarts), "pgd-20-margin", "autoattack", ...
        eval_step_size: Length of a step of a PGD `eval_attack`; by default as of `PGD`.
        consistency: λ, the weight of CAPT's consistency terms.
        weighting: α, CAPT's adaptive weight: "confidence", "entropy", "batch", "schedule", or a number in [0, 1].
        augment: Random crops and flips, drawn by example.
        stop_on_collapse: Stop when the model has become constant: the consistency loss falls to a thousandth of what it was
            while the clean loss is that of guessing.

    Defaults that differ from TrainingArguments: `optim="sgd"` with momentum 0.9, `learning_rate=0.1`,
    `lr_scheduler_type="cosine"`, `num_train_epochs=50`, `per_device_train_batch_size=32`,
    `per_device_eval_batch_size=128`, `logging_steps=10`, `report_to="none"`, `remove_unused_columns=False`,
    `label_names=["labels"]`, `average_tokens_across_devices=True`.
    """

    epsilon: str = field(
        default="4/255", metadata={"help": "Radius of the perturbations in [0, 1] pixels, e.g. 4/255."}
    )
    norm: str = field(default="linf", metadata={"help": "Norm of the threat model: linf or l2."})
    attack_steps: int = field(default=3, metadata={"help": "PGD steps of the training attack."})
    attack_step_size: str | None = field(default=None, metadata={"help": "Length of a step, e.g. 1/255."})
    attack_loss: str = field(default="ce", metadata={"help": "Loss of the training attack: ce, kl or margin."})
    eval_attack: str = field(default="pgd-20", metadata={"help": "Attack of evaluate(), e.g. pgd-20 or pgd-100x5."})
    eval_step_size: str | None = field(
        default=None, metadata={"help": "Length of a step of a PGD eval_attack, e.g. 1/255."}
    )
    consistency: float = field(default=1.5, metadata={"help": "Weight of the consistency terms (lambda)."})
    weighting: str = field(
        default="confidence", metadata={"help": "alpha: confidence, entropy, batch, schedule or a number in [0, 1]."}
    )
    augment: bool = field(default=False, metadata={"help": "Random crops and flips of the training images."})
    stop_on_collapse: bool = field(default=True, metadata={"help": "Stop when the model has become constant."})

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
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "Keys of the labels."})

    def __post_init__(self) -> None:
        self.threat_model  # noqa: B018  (bad values are refused before anything is set up)
        self.train_attack  # noqa: B018
        self.evaluation_attack  # noqa: B018
        CaptObjective(self.consistency, self.weighting)
        if self.optim == "sgd" and not self.optim_args:
            self.optim_args = "momentum=0.9"
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the pixels. Leave it at False.")
        super().__post_init__()

    @property
    def threat_model(self) -> ThreatModel:
        """What the adversary may do to an image."""
        return ThreatModel(self.norm, self.epsilon)

    @property
    def train_attack(self) -> PGD:
        """The attack that makes the adversarial images of a training step."""
        step = None if self.attack_step_size is None else parse_fraction(self.attack_step_size)
        return PGD(self.threat_model, steps=self.attack_steps, step_size=step, loss=self.attack_loss)

    @property
    def evaluation_attack(self) -> Attack:
        """The attack of `evaluate()`."""
        return parse_attack(self.eval_attack, self.threat_model, step_size=self.eval_step_size)
