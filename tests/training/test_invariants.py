"""Settings that change what a run costs, and nothing else: each group follows the losses and gradient norms of one reference.

Two processes belong here too; `test_processes.py` and `test_shared_texts.py` start them.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from helpers import shake
from training_helpers import make_model, make_task, make_trainer

from capt_peft import get_method
from capt_peft.texts import max_text_length
from capt_peft.tuner import PromptLayer

# 15 images in batches of 8: the second step of each of the three epochs has 7. A gradient is clipped at norm 1, by default, so
# that a step is 0.01 long: far enough for a wrong one to show in the next step's loss.
TASK = make_task(per_class=5)
RUN = {"per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 0.01}
STEPS = 6


def steps_of(folder, processor, method="capt", prepare=None, before=None, **arguments):
    """Runs a short training; returns each step's loss and gradient norm, (6, 2).

    Args:
        folder: Where it and its `frozen_cache_dir` may write.
        processor: The processor.
        method: A name of `get_method`.
        prepare: Changes the trainer before it trains.
        before: Arguments of a run that comes first, and whose results are thrown away.
        arguments: Of `CaptTrainingArguments`, in place of `RUN`.
    """
    if before is not None:
        steps_of(folder, processor, method, **{**arguments, **before})
    recipe = get_method(method)
    model = make_model(**recipe.prompts)
    shake(model)
    settings = {**RUN, **recipe.attack, **arguments}
    if "frozen_cache_dir" in settings:
        settings["frozen_cache_dir"] = str(folder / settings["frozen_cache_dir"])
    trainer = make_trainer(folder, processor, task=TASK, model=model, **settings)
    trainer.objective = recipe.objective(trainer.args)
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    log = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    return torch.tensor(log, dtype=torch.float64)


def difference(steps, reference):
    """The largest relative difference of any step's loss or gradient norm."""
    return ((steps - reference).abs() / reference).max().item()


# --------------------------------------------------------------------------------- what no argument of the trainer does


def never_cached(trainer):
    """The frozen model runs in every step, on every image."""
    trainer._frozen_outputs.get = lambda indices, pixels, compute: compute(pixels)


def only_from_disk(trainer):
    """The frozen model cannot run at all."""
    trainer._run_frozen = None


def padded_to_the_limit(trainer):
    """The texts have as many tokens as the model takes, like those of CLIP's own tokenizer."""
    classifier = trainer.classifier
    missing = max_text_length(classifier.model) - classifier.input_ids.shape[1]
    assert missing > 60
    pad_token = classifier.processor.tokenizer.pad_token_id
    classifier.input_ids = F.pad(classifier.input_ids, (0, missing), value=pad_token)
    classifier.attention_mask = F.pad(classifier.attention_mask, (0, missing))


# ------------------------------------------------------------------------------------------------------- the groups


@dataclass(frozen=True)
class Group:
    """Runs that must follow the run with no settings at all.

    Attributes:
        tolerance: Largest relative difference of a loss or gradient norm, over all steps.
        methods: What is tuned; each has a reference of its own.
        variants: Settings of `steps_of` by name.
    """

    tolerance: float
    methods: tuple[str, ...]
    variants: dict[str, dict] = field(default_factory=dict)


# Sums in another order round differently, in the 7th digit of float32; the attack's signs turn a few of these into pixels that
# move the other way, and six steps carry both on.
ROUNDING = 1e-5
EXACT = 0.0

GROUPS = {
    # the mean over the images is summed in parts
    "batches": Group(ROUNDING, ("capt", "fap", "adv-tp"), {
        "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "chunks of 3": {"image_chunk_size": 3},
        "chunks of 3 in 4 x 2": {
            "image_chunk_size": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        },
    }),
    # an image's frozen logits are computed in another batch than the cached ones were
    "frozen logits": Group(ROUNDING, ("capt",), {
        "not cached": {"prepare": never_cached},
        "on disk": {"frozen_cache_dir": "frozen"},
        "on disk, by an earlier run": {
            "frozen_cache_dir": "frozen", "before": {"per_device_train_batch_size": 5, "seed": 3, "num_train_epochs": 1},
            "prepare": only_from_disk,
        },
    }),
    # matrices of other sizes are multiplied in another order
    "texts": Group(ROUNDING, ("capt", "fap", "adv-tp"), {
        "one by one": {"text_chunk_size": 1},
        "in twos": {"text_chunk_size": 2},
        "padded to 77 tokens": {"prepare": padded_to_the_limit},
    }),
    # what is computed again is computed in the same order
    "activation checkpointing": Group(EXACT, ("capt", "fap", "adv-tp", "adv-vp"), {
        "on": {"activation_checkpointing": True},
    }),
    # parts add the rounding of "texts" and "batches"
    "activation checkpointing in parts": Group(ROUNDING, ("capt", "fap"), {
        "texts and images": {"activation_checkpointing": True, "text_chunk_size": 2, "image_chunk_size": 3},
    }),
    # aot_eager runs the same kernels, but derives the backward pass from decomposed operations
    "torch_compile": Group(ROUNDING, ("capt",), {
        "on": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        "with activation checkpointing": {
            "torch_compile": True, "torch_compile_backend": "aot_eager", "activation_checkpointing": True,
        },
    }),
    # an image and its random numbers are the same, whoever loads it
    "workers": Group(EXACT, ("capt",), {"2": {"dataloader_num_workers": 2}}),
}  # fmt: skip
CASES = [
    pytest.param(group, method, settings, id=f"{name}: {variant}, {method}")
    for name, group in GROUPS.items()
    for method in group.methods
    for variant, settings in group.variants.items()
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, processor):
    """The run that all others of a method follow, made once."""
    known = {}

    def get(method):
        if method not in known:
            known[method] = steps_of(tmp_path_factory.mktemp("reference"), processor, method)
            assert known[method].shape == (STEPS, 2) and (known[method] > 0.01).all()
        return known[method]

    return get


@pytest.mark.parametrize(("group", "method", "settings"), CASES)
def test_a_setting_that_only_changes_the_cost_follows_the_reference(
    tmp_path, processor, reference, group, method, settings
):
    found = difference(steps_of(tmp_path, processor, method, **settings), reference(method))
    assert found <= group.tolerance
