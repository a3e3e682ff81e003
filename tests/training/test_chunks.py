"""What a step keeps for its backward pass: less than plain CLIP keeps, in chunks of images less still, for the same result."""

import pytest
import torch
from helpers import shake
from training_helpers import adapter_of, frozen_logits, losses, make_model, make_task, make_trainer
from transformers.activations import QuickGELUActivation

from capt_peft import CaptTrainingArguments
from capt_peft.clip.activations import lean_activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_lean_activation_is_bitwise_the_plain_one_and_keeps_half(dtype):
    activation = QuickGELUActivation()
    x = (5 * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    found = []
    for lean in (False, True):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t
        ):
            if lean:
                with lean_activations(activation):
                    y = activation(x)
            else:
                y = activation(x)
        (gradient,) = torch.autograd.grad(y, x, torch.cos(y.detach()))
        found.append((y, gradient, len(kept)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][2], found[1][2]) == (2, 1)


def test_the_activations_are_the_models_own_again_afterwards(clip):
    inner = next(m for m in clip.modules() if isinstance(m, QuickGELUActivation))
    with lean_activations(clip):
        with lean_activations(clip):
            pass
        assert "forward" in inner.__dict__
    assert "forward" not in inner.__dict__
    with pytest.raises(KeyError), lean_activations(clip):
        raise KeyError
    assert "forward" not in inner.__dict__


def step(tmp_path, processor, **arguments):
    """The loss and the prompts' gradients of a step, and the most activations alive at once, in bytes."""
    model = make_model(num_vision_tokens=4, num_text_tokens=2)
    shake(model)
    trainer = make_trainer(
        tmp_path, processor, model=model, task=make_task(per_class=4), per_device_train_batch_size=12, **arguments
    )
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    frozen_logits(trainer, batch["pixels"], batch["index"].tolist())
    kept, most = {}, [0]

    def pack(tensor):
        if tensor.grad_fn is None and not tensor.requires_grad:
            return tensor
        boxed = Boxed(tensor, kept)
        most[0] = max(most[0], sum(kept.values()))
        return boxed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda boxed: getattr(boxed, "tensor", boxed)):
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad], most[0]


class Boxed:
    """A tensor that autograd keeps, and is counted while it does."""

    def __init__(self, tensor, kept):
        self.tensor, self.kept = tensor, kept
        kept[id(self)] = tensor.numel() * tensor.element_size()

    def __del__(self):
        del self.kept[id(self)]


@pytest.mark.parametrize("size", [1, 4, 5])
def test_chunks_of_images_give_the_step_of_the_whole_batch_and_keep_less(tmp_path, processor, size):
    whole, chunked = step(tmp_path, processor), step(tmp_path, processor, image_chunk_size=size)
    torch.testing.assert_close(chunked[0], whole[0], rtol=1e-5, atol=0)
    for ours, expected in zip(chunked[1], whole[1], strict=True):
        assert expected.norm() > 1e-3 and (ours - expected).norm() < 1e-4 * expected.norm()
    assert chunked[2] < (size / 12 + 0.25) * whole[2]


def test_a_run_in_chunks_follows_the_run_of_whole_batches(tmp_path, processor):
    runs = []
    for arguments in ({}, {"image_chunk_size": 3}, {"image_chunk_size": 3, "gradient_accumulation_steps": 2}):
        batch = 8 // arguments.get("gradient_accumulation_steps", 1)
        trainer = make_trainer(
            tmp_path,
            processor,
            task=make_task(per_class=5),
            per_device_train_batch_size=batch,
            learning_rate=0.01,
            **arguments,
        )
        trainer.train()
        runs.append((losses(trainer), adapter_of(trainer)))
    for other in runs[1:]:
        assert other[0] == pytest.approx(runs[0][0], abs=1e-5)
        for name, expected in runs[0][1].items():
            torch.testing.assert_close(other[1][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_chunk_size": 0}, "image_chunk_size=0 must be at least 1"),
        ({"image_chunk_size": 4, "weighting": "batch"}, "looks at the whole batch"),
        ({"image_chunk_size": 4, "fp16": True}, "Use bf16"),
        ({"image_chunk_size": 4, "ddp_find_unused_parameters": True}, "does not work with ddp_find_unused"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        CaptTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
