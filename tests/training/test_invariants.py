"""Settings that change what a run costs, and nothing else: each group follows the losses and gradient norms of one reference.

Two processes belong here too: `test_processes.py` starts them.
"""

from dataclasses import dataclass

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from helpers import compiles, shake
from training_helpers import make_model, make_task, make_trainer

from capt_peft import CaptTrainingArguments, get_method
from capt_peft.methods import PROMPT_FIELDS
from capt_peft.training.callbacks import WarnAtChance
from capt_peft.training.frozen import embed
from capt_peft.tuner import PromptLayer
from capt_peft.tuner.clip import max_text_length

# 15 images in batches of 8: the second step of each of the three epochs has 7. A gradient is clipped at norm 1, by default, so
# that a step is 0.01 long: far enough for a wrong one to show in the next step's loss.
TASK = make_task(per_class=5)
RUN = {"per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 0.01}
STEPS = 6


def steps_of(folder, processor, method="capt", prepare=None, **arguments):
    """Runs a short training; returns each step's loss and gradient norm, (6, 2).

    Args:
        folder: Where it may write.
        processor: The processor.
        method: A name of `get_method`.
        prepare: Changes the trainer before it trains.
        arguments: Of `CaptTrainingArguments`, in place of `RUN`.
    """
    recipe = get_method(method)
    settings = {**recipe.defaults, **recipe.fixed}
    model = make_model(**{name: value for name, value in settings.items() if name in PROMPT_FIELDS})
    shake(model)
    attack = {name: value for name, value in settings.items() if name.startswith("attack_")}
    settings = {**RUN, **attack, **arguments}
    trainer = make_trainer(folder, processor, task=TASK, model=model, **settings)
    trainer.objective = recipe.objective(trainer.args)
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    log = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    return torch.tensor(log, dtype=torch.float64)


def differences(steps, reference):
    """The largest relative difference of a step's loss, and of its gradient norm: (2,)."""
    return ((steps - reference).abs() / reference).amax(0)


# --------------------------------------------------------------------------------- what no argument of the trainer does


def never_kept(trainer):
    """The frozen model runs in every step, on every image."""
    outputs = trainer._frozen_outputs

    def features(pixels, indices):
        with outputs._frozen() as base:
            return embed(base, pixels)

    outputs.features = features


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
    variants: dict[str, dict]


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
    # an image's frozen logits are computed in other batches than those that the reference keeps
    "frozen logits": Group(ROUNDING, ("capt",), {"not kept": {"prepare": never_kept}}),
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
    }),
    # an image and its random numbers are the same, whoever loads it
    "workers": Group(EXACT, ("capt",), {"2": {"dataloader_num_workers": 2}}),
}  # fmt: skip
CASES = [
    pytest.param(
        group, method, settings, marks=[compiles] * ("torch_compile" in settings), id=f"{name}: {variant}, {method}"
    )
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
    found = differences(steps_of(tmp_path, processor, method, **settings), reference(method))
    assert found.max() <= group.tolerance


# the objective of adv-tp and adv-vp has no λ; a hundredth more of epsilon is as small a change
@pytest.mark.parametrize("method", sorted({method for group in GROUPS.values() for method in group.methods}))
def test_another_seed_or_a_hundredth_more_violates_every_tolerance(tmp_path, processor, reference, method):
    hundredth = {"epsilon": 1.01 * 4 / 255} if method.startswith("adv") else {"consistency": 1.01 * 1.5}
    for change in ({"seed": 1}, hundredth):
        found = differences(steps_of(tmp_path, processor, method, **change), reference(method))
        assert found.min() > 10 * max(group.tolerance for group in GROUPS.values()), change


# ---------------------------------------------------------------------------------------- activation checkpointing


@compiles
@pytest.mark.long
def test_compiled_towers_can_be_checkpointed(tmp_path, processor, reference):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "activation_checkpointing": True}
    assert differences(steps_of(tmp_path, processor, **settings), reference("capt")).max() <= ROUNDING


def runs_of_a_layer(folder, processor, **arguments):
    """How often a step runs an encoder layer of the image tower, with 3 attack steps."""
    trainer = make_trainer(folder, processor, max_steps=1, attack_steps=3, **arguments)
    trainer.remove_callback(WarnAtChance)  # it runs the base model before the step
    runs = []
    trainer.classifier.base_model.vision_model.encoder.layers[-1].mlp.register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    trainer.train()
    return len(runs)


def test_checkpointed_layers_run_again_in_each_backward_pass(tmp_path, processor):
    attack, clean_and_adversarial, frozen = 3, 2, 1
    assert runs_of_a_layer(tmp_path, processor) == attack + clean_and_adversarial + frozen
    again = attack + clean_and_adversarial  # the frozen model has no backward pass
    found = runs_of_a_layer(tmp_path, processor, activation_checkpointing=True)
    assert found == attack + clean_and_adversarial + frozen + again


def test_reentrant_checkpointing_is_refused_because_attacks_take_gradients(tmp_path):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=True cannot"):
        CaptTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


# ---------------------------------------------------------------------------------------------------- baked adapters


def first_step(folder, processor, model):
    """The loss and the clean logits of a step that is not taken; the gradients stay in the model."""
    trainer = make_trainer(folder, processor, model=model, task=TASK, per_device_train_batch_size=8)
    model.train()
    model.zero_grad()
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    return loss.item(), outputs["views"].clean.detach()


@pytest.mark.parametrize("coupling", ["text_to_vision", "vision_to_text"])
def test_a_baked_adapter_has_the_first_step_of_the_coupled_one(tmp_path, processor, coupling):
    """From the second step on they are different runs: the step of one parametrisation is not that of the other.

    With q = W p + b coupled, and p and q on their own once baked, the chain rule joins their gradients:
    coupled dL/dp = dL/dp + W^T dL/dq, dL/dW = sum_i dL/dq_i p_i^T and dL/db = sum_i dL/dq_i.
    """
    model = make_model(coupling=coupling)
    shake(model)
    coupled_loss, coupled_logits = first_step(tmp_path, processor, model)
    layers = [layer for layer in model.modules() if isinstance(layer, PromptLayer) and "default" in layer.capt_proj]
    pairs = [(layer, layer.capt_proj["default"], layer.partners["default"][0]) for layer in layers]
    assert len(pairs) == 2
    coupled = [owner.capt_prompt["default"].grad.clone() for _, _, owner in pairs]

    model.base_model.bake()
    baked_loss, baked_logits = first_step(tmp_path, processor, model)
    assert baked_loss == pytest.approx(coupled_loss, rel=ROUNDING)
    torch.testing.assert_close(baked_logits, coupled_logits, rtol=1e-5, atol=1e-4)
    for (layer, proj, owner), gradient in zip(pairs, coupled, strict=True):
        p, q = owner.capt_prompt["default"], layer.capt_prompt["default"]
        for found, expected in (
            (p.grad + q.grad @ proj.weight, gradient),
            (q.grad.T @ p, proj.weight.grad),
            (q.grad.sum(0), proj.bias.grad),
        ):
            assert expected.norm() > 1e-3 and (found - expected).norm() < 1e-4 * expected.norm()
