"""CaptTrainingArguments, and what the trainer is given that would have no effect, or a wrong one: it is refused by name."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from inspect import cleandoc
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..attacks import PGD, Attack, ThreatModel, parse_attack, parse_fraction
from ..objectives import CaptObjective
from ..randomness import check_seed
from ..utils.text import shown
from ..utils.versions import COMPILING_TORCH, FSDP_OFF, TrainingArguments

logger = logging.getLogger(__name__)

BEST_METRIC = "eval_robust_accuracy"
LR_SCHEDULES = ("step", "epoch")


@dataclass
class CaptTrainingArguments(TrainingArguments):
    r"""Arguments of `CaptTrainer`: those of `transformers.TrainingArguments`, and what follows.

    Args:
        epsilon: Radius of the perturbations, as a fraction of the [0, 1] range of the pixels; "4/255" is read exactly.
        norm: Norm of the perturbations: "linf", "l2" or "l1".
        attack_steps: PGD steps of the training attack, at least 1.
        attack_step_size: Length of its steps, same unit as `epsilon`; by default 2/3 of epsilon for 3 steps, as APT trains.
        attack_loss: What the training attack raises: "ce", "kl" (to the clean prediction) or "margin".
        attack_clip_each_step: Cut the training attack's perturbation to [0, 1] after every step. False: only what the model sees
            is cut, as in APT's code.
        eval_attack: Attack of `evaluate()`: "pgd-20", "pgd-100x5" (restarts), "pgd-20-margin", "autoattack", ...
        eval_step_size: Length of a step of a PGD `eval_attack`; by default that of `PGD`.
        consistency: λ, the weight of CAPT's consistency terms.
        weighting: α, CAPT's adaptive weight: "confidence", "margin", "entropy", "batch", "schedule", or a number in [0, 1].
        frozen_term: What CAPT holds to the frozen model: "predictions" (KL), "labelled" (KL to their mean with the label), or
            "features" (cosine of the image features).
        augment: Crop and flip training images at random.
        squash: Resize training images to the model's size whatever their shape, instead of cropping, as in FAP's code.
        lr_schedule: "step": the learning rate follows `lr_scheduler_type` and `warmup_steps` step by step. "epoch": as in CoOp's
            toolbox, which MaPLe, FAP and APT train with: the first epoch at 1e-5, then a cosine that changes once per epoch.
        decay_biases: Let `weight_decay` act on biases too, as in CoOp's toolbox; the Trainer leaves them out.
        text_chunk_size: Class texts that run at once; the activations of the others are not kept, which bounds the memory, but
            computed again in the backward pass. By default all texts up to 256 classes, and 64 above that.
        image_chunk_size: Images of a batch that are computed at a time, which bounds the memory; by default all of them. Nothing
            is computed twice. With gradient accumulation instead, the texts would be run again for each part. The objective must
            be a mean over images.
        full_precision_attack: Run the training attack in float32 although `bf16` or `fp16` is set. Without it the attack runs in
            that precision; its losses and the signs of its gradients are taken in full precision either way.
        stop_on_collapse: Stop when the model has become constant; see `StopOnCollapse`.
        stop_on_overfitting: Stop, instead of warning, when robust accuracy falls in `evaluate` while it rises in training; it
            needs an `eval_strategy`.

    Defaults that differ from TrainingArguments: `optim="sgd"` with momentum 0.9, `learning_rate=0.1`,
    `lr_scheduler_type="cosine"`, `num_train_epochs=50`, `per_device_train_batch_size=32`,
    `per_device_eval_batch_size=128`, `logging_steps=10`, `report_to="none"`, `remove_unused_columns=False`,
    `hub_strategy="end"`, `label_names=["labels"]`; `metric_for_best_model="eval_robust_accuracy"` where a best checkpoint is
    asked for; `logging_nan_inf_filter=False`, because a loss that is not finite stops a run before it is logged, and the filter
    would wait for a GPU in every step; `tf32=False`, because transformers would switch it on with `torch_compile`. Where there is
    an accelerator, images are loaded into pinned memory and copied without waiting (unless an `accelerator_config` is given), and
    workers stay from epoch to epoch (unless `dataloader_persistent_workers` is given). Arguments that would have no effect, or a
    wrong one, are refused by name; this module lists them.
    """

    epsilon: str = "4/255"
    norm: str = "linf"
    attack_steps: int = 3
    attack_step_size: str | None = None
    attack_loss: str = "ce"
    attack_clip_each_step: bool = True
    eval_attack: str = "pgd-20"
    eval_step_size: str | None = None
    consistency: float = 1.5
    weighting: str = "confidence"
    frozen_term: str = "predictions"
    augment: bool = False
    squash: bool = False
    lr_schedule: str = "step"
    decay_biases: bool = False
    text_chunk_size: int | None = None
    image_chunk_size: int | None = None
    full_precision_attack: bool = False
    stop_on_collapse: bool = True
    stop_on_overfitting: bool = False

    optim: str = "sgd"
    learning_rate: float = 0.1
    lr_scheduler_type: str = "cosine"
    num_train_epochs: float = 50
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 128
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    tf32: bool | None = False
    dataloader_persistent_workers: bool | None = None  # type: ignore[assignment]  # None: as the device has it
    report_to: None | str | list[str] = "none"  # noqa: RUF036  (HfArgumentParser takes the second type)
    remove_unused_columns: bool = False
    hub_strategy: str = "end"
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])

    def __post_init__(self) -> None:
        refuse_arguments(self)
        refuse_values(self)
        # bad values are refused before anything is set up
        _ = (
            self.threat_model,
            self.train_attack,
            self.evaluation_attack,
            CaptObjective(self.consistency, self.weighting, self.frozen_term),
        )
        if self.optim == "sgd" and not self.optim_args:
            self.optim_args = "momentum=0.9"
        metric, greater = self.metric_for_best_model, self.greater_is_better
        own_transfer = self.accelerator_config is None
        super().__post_init__()
        self._load_for_device(own_transfer)
        self._refuse_combinations()
        if self.image_chunk_size:
            # with it DDP makes one graph of both towers' features, and the first chunk would free that of the texts
            self.ddp_find_unused_parameters = False
        if metric is None and (self.metric_for_best_model is not None or self.save_strategy == SaveStrategy.BEST):
            self.metric_for_best_model = BEST_METRIC  # instead of a loss, which is not evaluated
            self.greater_is_better = True if greater is None else greater

    def _load_for_device(self, own_transfer: bool) -> None:
        """Chooses how images are loaded, where the arguments leave that open."""
        loaded: Any = self.accelerator_config
        self.dataloader_pin_memory &= self.device.type not in ("cpu", "mps")  # torch would warn that it cannot
        if own_transfer:
            loaded.non_blocking = self.dataloader_pin_memory
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0 and self.device.type != "cpu"

    def _refuse_combinations(self) -> None:
        chunk = self.image_chunk_size
        shape = self.warmup_steps or self.lr_scheduler_kwargs or self.lr_scheduler_type != "cosine"
        checkpointing: Any = self.activation_checkpointing_kwargs or {}  # a dict by now, whatever it was given as
        for wrong, words in (
            (
                chunk is not None and chunk < 1,
                f"image_chunk_size={chunk} must be at least 1, or None for the whole batch.",
            ),
            (
                self.frozen_term != "predictions"
                and not CaptObjective(self.consistency, self.weighting, self.frozen_term).needs_frozen,
                f"frozen_term={self.frozen_term!r} has no effect where nothing is held to the frozen model: "
                f"weighting={self.weighting}, consistency={self.consistency}. Leave one of them out.",
            ),
            (
                chunk and self.fp16,
                "image_chunk_size takes gradients that fp16's loss scaling does not reach. Use bf16.",
            ),
            (
                chunk and self.weighting == "batch",
                "weighting='batch' looks at the whole batch, so image_chunk_size cannot split it.",
            ),
            (
                chunk and self.ddp_find_unused_parameters,
                "image_chunk_size does not work with ddp_find_unused_parameters=True. Leave it out.",
            ),
            (
                self.squash and self.augment,
                "squash and augment are two ways to bring a training image to the model's size. Choose one.",
            ),
            (
                self.lr_schedule not in LR_SCHEDULES,
                f"lr_schedule={self.lr_schedule!r} is unknown. Allowed: {', '.join(LR_SCHEDULES)}.",
            ),
            (
                self.lr_schedule == "epoch" and shape,
                "lr_schedule='epoch' is a cosine with a first epoch at 1e-5, so that lr_scheduler_type, lr_scheduler_kwargs and "
                "warmup_steps have no effect. Leave them out, or set lr_schedule='step'.",
            ),
            (
                self.torch_compile and torch.__version__ < COMPILING_TORCH,
                f"torch_compile=True needs torch {COMPILING_TORCH} or newer, which can compile a tower of CLIP as one graph; "
                f"this is torch {torch.__version__}. Update torch, or leave torch_compile out.",
            ),
            (
                self.fp16 and self.device.type == "cpu",
                "fp16=True would train in float32 on a CPU: Accelerate has no fp16 there. Use bf16=True.",
            ),
            (
                checkpointing.get("use_reentrant"),
                "use_reentrant=True cannot take the attack's gradients. Leave it out, or give False.",
            ),
        ):
            if wrong:
                raise ValueError(words)

    @property
    def threat_model(self) -> ThreatModel:
        """What the adversary may do to an image."""
        return ThreatModel(self.norm, self.epsilon)

    @property
    def train_attack(self) -> PGD:
        """The attack that makes the adversarial images of a training step."""
        return PGD(
            self.threat_model,
            steps=self.attack_steps,
            step_size=None if self.attack_step_size is None else parse_fraction(self.attack_step_size),
            loss=self.attack_loss,
            clip_each_step=self.attack_clip_each_step,
        )

    @property
    def evaluation_attack(self) -> Attack:
        """The attack of `evaluate()`."""
        return parse_attack(self.eval_attack, self.threat_model, step_size=self.eval_step_size)


def _describe_fields() -> None:
    """Gives each field the help that the docstring has or, where transformers has the field too, its own."""
    told = cleandoc(CaptTrainingArguments.__doc__ or "")  # which Python 3.13 indents less than those before it
    words = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", told, re.MULTILINE))
    theirs = {f.name: f.metadata for f in fields(TrainingArguments)}
    for f in fields(CaptTrainingArguments):
        if f.name not in words and f.name not in theirs:
            raise TypeError(f"CaptTrainingArguments.{f.name} has no description: add one under Args in the docstring.")
        f.metadata = theirs[f.name] if f.name in theirs else {"help": " ".join(words[f.name].split())}  # type: ignore[assignment]


_describe_fields()

# ---------------------------------------------------------------------------------------------------- what is refused

NO_MODEL_OUTPUT = "an evaluation counts right predictions and hands on no other output of the model"
ROUNDS = "it would round the weights themselves, for good. An evaluation runs in the model's own precision"
NO_TOKENS = "batches hold images, and every batch takes the same class texts"

# of TrainingArguments: what must stay at its default, and why
REFUSED: dict[str, str] = {
    "auto_find_batch_size": "another batch size is another run. image_chunk_size bounds the memory and keeps the result",
    "average_tokens_across_devices": "the loss is the mean over the images of all processes",
    "batch_eval_metrics": "accuracies and their intervals are those of all images",
    "bf16_full_eval": ROUNDS,
    "enable_jit_checkpoint": "a run that SIGTERM ends would look finished. Write checkpoints (save_strategy) and start the run "
    "again with resume_from_checkpoint",
    "eval_do_concat_batches": "accuracies are those of all batches",
    "eval_use_gather_object": "predictions are tensors",
    "fp16_full_eval": ROUNDS,
    "hub_always_push": "nothing is uploaded before the end; call push_to_hub() then",
    "include_for_metrics": NO_MODEL_OUTPUT,
    "label_names": "labels are in the column `label` of the task",
    "label_smoothing_factor": "the objective decides the loss. Give objective= one that smooths",
    "length_column_name": NO_TOKENS,
    "liger_kernel_config": "Liger has no kernels for CLIP",
    "neftune_noise_alpha": "only the embeddings of language models would be changed",
    "optim_target_modules": "GaLore and APOLLO project the weights of whole layers",
    "prediction_loss_only": "accuracies are what is evaluated",
    "remove_unused_columns": "it would drop the pixels",
    "use_cache": "nothing is generated",
    "use_liger_kernel": "Liger has no kernels for CLIP",
}
# those of which some values do
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hub_strategy": (("end",), "checkpoints are not uploaded"),
    "include_num_input_tokens_seen": (("no", False), NO_TOKENS),
    "train_sampling_strategy": (("random", "sequential"), NO_TOKENS),
}
# numbers of which transformers takes any, and the smallest that works
AT_LEAST: dict[str, int] = {
    "attack_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 0, "max_grad_norm": 0,
    "per_device_eval_batch_size": 1, "per_device_train_batch_size": 1, "weight_decay": 0,
}  # fmt: skip
OF_SGD = ("momentum", "dampening", "weight_decay", "nesterov")  # what transformers hands on to torch's SGD
# arguments of Trainer.__init__ and of TRL's trainers
REFUSED_OF_TRAINER: dict[str, str] = {
    "compute_loss_func": "the loss is that of objective=, which maps a step's views to it",
    "compute_metrics": "clean and robust accuracy are what is evaluated. predict(split) returns the predicted classes for others",
    "data_collator": "the frozen model's outputs are kept for each image of the task as it is. Use augment=True, or another task",
    "formatting_func": NO_TOKENS,
    "model_init": "give the model itself",
    "peft_config": "give model=get_peft_model(model, peft_config)",
    "preprocess_logits_for_metrics": NO_MODEL_OUTPUT,
    "tokenizer": "give processor=, which holds the tokenizer",
    "train_dataset": "give task=, whose `train` split is tuned on and whose class names are the texts",
}
SHARDING_ARGUMENTS = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
SHARDING_ENVIRONMENT = (
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG",
)  # fmt: skip
SHARDING_PLUGINS = ("fsdp_plugin", "deepspeed_plugins", "megatron_lm_plugin", "torch_tp_plugin", "parallelism_config")


def refuse_arguments(args: TrainingArguments) -> None:
    """Raises a ValueError if a training argument is set that would have no effect, or a wrong one; it need not be set up yet."""
    refuse_sharding(args)
    for name, reason in REFUSED.items():
        if _is_changed(args, name):
            raise ValueError(f"{name}={shown(getattr(args, name), 80)} is refused: {reason}. Leave it at its default.")
    for name, (values, reason) in ALLOWED.items():
        if getattr(args, name, values[0]) not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{name}={shown(getattr(args, name), 80)} is refused: {reason}. Allowed: {allowed}.")
    given: Any = args.accelerator_config
    for name, default in (("split_batches", False), ("dispatch_batches", None), ("even_batches", True)):
        value = given.get(name, default) if isinstance(given, Mapping) else getattr(given, name, default)
        if value != default:
            raise ValueError(
                f"accelerator_config: {name}={shown(value, 80)} is refused: every process must load its own share of a step's "
                f"images. Leave it at {default}."
            )
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if args.optim == "sgd" and _is_changed(args, name):
            raise ValueError(
                f"{name}={getattr(args, name)} has no effect on optim='sgd'. Give optim='adamw_torch' too."
            )


def refuse_values(args: CaptTrainingArguments) -> None:
    """Raises a ValueError if a number is not finite, or out of a range that neither transformers nor an attack checks."""
    for f in fields(args):
        value = getattr(args, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{f.name}={value} must be a finite number.")
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if isinstance(value, (int, float)) and value < least:  # max_grad_norm may be None
            raise ValueError(f"{name}={value} must be at least {least}.")
    for name in ("seed", "data_seed"):
        if (value := getattr(args, name)) is not None:
            check_seed(value, name)
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ValueError(f"{name}={getattr(args, name)}: nothing would be trained. Give more than 0, or leave it out.")
    _check_optim_args(args)


def _check_optim_args(args: CaptTrainingArguments) -> None:
    for pair in args.optim_args.replace(" ", "").split(",") if args.optim_args else ():
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or "=" in value:
            raise ValueError(
                f"optim_args={shown(args.optim_args, 80)} must be names with values, such as 'momentum=0.9,nesterov=true'."
            )
        if args.optim == "sgd" and name not in OF_SGD:
            raise ValueError(
                f"optim_args: {shown(name, 40)} has no effect on optim='sgd'. Allowed: {', '.join(OF_SGD)}."
            )
        if args.optim == "sgd" and name != "nesterov" and not _is_finite(value):
            raise ValueError(f"optim_args: {name}={shown(value, 40)} must be a finite number.")


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_changed(args: Any, name: str) -> bool:
    known = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    return name in known and getattr(args, name) != known[name]


def refuse_sharding(args: TrainingArguments) -> None:
    """Raises a ValueError if parameters are to be sharded over processes: a step calls a CLIP's towers past its `forward`."""
    state = AcceleratorState._shared_state
    found = [
        *(name for name in SHARDING_ARGUMENTS if (given := getattr(args, name, None)) and given != FSDP_OFF),
        *(name for name in SHARDING_ENVIRONMENT if os.environ.get(name, "").lower() in ("true", "1", "yes", "on")),
        *(f"Accelerate's {name}" for name in SHARDING_PLUGINS if state.get(name)),
    ]
    if found:
        raise ValueError(
            f"{found[0]} is set, but CaptTrainer does not shard parameters (FSDP, DeepSpeed and the like): leave it out, and run "
            "several processes with plain data parallelism: accelerate launch --multi_gpu --num_processes N ..."
        )


def check_trackers(args: Any) -> None:
    """Raises a ValueError if a tracker of `report_to` is unknown or not installed."""
    names = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in {"none", "all", *installed}:
            known = "needs a package that is not installed" if name in INTEGRATION_TO_CALLBACK else "is unknown"
            raise ValueError(
                f"report_to={shown(name, 80)} {known}. Trackers that are: {', '.join(installed) or 'none'}; pip install "
                "tensorboard, or wandb, brings one. Leave it out to write results.json alone."
            )


def check_processes(args: Any) -> None:
    """Raises a ValueError if the processes that were launched do not know of each other; leaves a single process one GPU."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train for itself: there is no GPU, and use_cpu is off. Give "
            "--use_cpu, or launch one process."
        )
    if args.n_gpu > 1:
        # the Trainer would split the class texts over the GPUs of one process (torch's DataParallel)
        logger.warning(
            "One process uses one GPU, the first of %d. Start a process for each: accelerate launch --multi_gpu "
            "--num_processes %d ...", args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1


def check_arguments(args: Any, others: Mapping[str, Any], attack: Attack | None) -> None:
    """Raises if what a trainer is given has no effect or cannot work.

    Args:
        args: Its arguments, which may have been changed since they were made.
        others: Arguments for `transformers.Trainer`, by name; None is as good as not given.
        attack: The training attack, if one is given.
    """
    if not isinstance(args, CaptTrainingArguments):
        raise TypeError(
            f"args must be CaptTrainingArguments, not {type(args).__name__}: they hold the threat model too."
        )
    for name, reason in REFUSED_OF_TRAINER.items():
        if others.get(name) is not None:
            raise ValueError(f"{name}= is refused: {reason}.")
    refuse_arguments(args)
    refuse_values(args)
    check_trackers(args)
    check_processes(args)
    for name in ("attack_steps", "attack_step_size", "attack_loss", "attack_clip_each_step"):
        if attack is not None and _is_changed(args, name):
            raise ValueError(
                f"{name}={getattr(args, name)!r} has no effect beside attack=, which has its own. Leave it out."
            )


def one_processor(processor: Any, processing_class: Any) -> Any:
    """Returns the processor that was given under one of its two names; a ValueError if under both or neither."""
    if (processor is None) == (processing_class is None):
        given = "Neither" if processor is None else "Both"
        raise ValueError(
            f"{given} of processor= and processing_class= is given. They are two names of one: give the model's processor, "
            "AutoProcessor.from_pretrained(...), as one of them."
        )
    return processing_class if processor is None else processor


def check_best_metric(args: CaptTrainingArguments, held_out: Any, from_test: bool) -> None:
    """Raises if no evaluation has the metric that chooses the best checkpoint; warns if the test images choose it."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == IntervalStrategy.NO:
        return
    prefixes = [f"eval_{name}" for name in held_out] if isinstance(held_out, dict) else ["eval"]
    measured = [f"{name}_accuracy{end}" for name in ("clean", "robust") for end in ("", "_low", "_high")]
    names = [*measured, "n", "runtime", "samples_per_second", "steps_per_second"]
    if not {metric, f"eval_{metric}"} & {f"{prefix}_{name}" for prefix in prefixes for name in names}:
        choice = ", ".join(f"{prefix}_robust_accuracy" for prefix in prefixes[:4])
        raise ValueError(f"metric_for_best_model={metric[:80]!r} is not evaluated. Give {choice}, or another accuracy.")
    if from_test:
        logger.warning("The best checkpoint is chosen on the test images, whose accuracy it then overstates.")
