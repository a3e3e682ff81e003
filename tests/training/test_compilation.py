"""torch_compile: whole graphs, all compiled in the first step, and the run of the eager code."""

import pytest
import torch
import torch._dynamo
from helpers import compiles
from training_helpers import adapter_of, losses, make_model, make_task, make_trainer
from transformers import TrainerCallback

from capt_peft import CaptTrainingArguments
from capt_peft.training.chunks import fill_batch


class Graphs(TrainerCallback):
    """How many graphs there are after each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def run(tmp_path, processor, **arguments):
    # 10 images: the last batch is smaller; the evaluation between the epochs sees other shapes
    trainer = make_trainer(
        tmp_path, processor, task=make_task(per_class=10), model=make_model(), per_device_train_batch_size=8, attack_steps=2,
        eval_strategy="epoch", eval_attack="pgd-2", learning_rate=0.01, **arguments,
    )  # fmt: skip
    graphs = Graphs()
    trainer.add_callback(graphs)
    trainer.train()
    return trainer, graphs.counts


@compiles
@pytest.mark.parametrize("arguments", [{}, {"text_chunk_size": 2}, {"image_chunk_size": 3}, {"bf16": True}])
def test_nothing_breaks_a_graph_and_nothing_is_compiled_after_the_first_step(tmp_path, processor, arguments):
    trainer, counts = run(tmp_path, processor, torch_compile=True, torch_compile_backend="aot_eager", **arguments)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(counts) == 8 and set(counts) == {3}  # clean and adversarial, attack; texts
    clip = trainer.classifier.base_model  # whose towers are its own again
    assert "forward" not in clip.vision_model.__dict__ and "forward" not in clip.text_model.__dict__
    trainer.evaluate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    eager, _ = run(tmp_path, processor, **arguments)
    tolerance = 1e-5 if "bf16" not in arguments else 0.02
    assert losses(trainer) == pytest.approx(losses(eager), rel=tolerance)
    if "bf16" not in arguments:
        for name, expected in adapter_of(eager).items():
            torch.testing.assert_close(adapter_of(trainer)[name], expected, atol=1e-4, rtol=1e-4)


@compiles
@pytest.mark.long
def test_the_default_backend_follows_the_eager_run(tmp_path, processor):
    trainer, counts = run(tmp_path, processor, torch_compile=True)
    assert not torch._dynamo.utils.counters["graph_break"] and set(counts) == {3}
    assert losses(trainer) == pytest.approx(losses(run(tmp_path, processor)[0]), rel=1e-3)


def test_a_torch_that_cannot_compile_a_tower_as_one_graph_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("capt_peft.training.arguments.COMPILING_TORCH", "99.1")
    with pytest.raises(
        ValueError, match=r"^torch_compile=True needs torch 99\.1 or newer.*this is torch 2.*Update torch"
    ):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, torch_compile=True)


def test_a_batch_is_filled_with_black_images():
    pixels = torch.rand(2, 3, 4, 4)
    filled = fill_batch(pixels, 5)
    assert filled.shape == (5, 3, 4, 4) and torch.equal(filled[:2], pixels) and not filled[2:].any()
    assert fill_batch(pixels, 2) is pixels
