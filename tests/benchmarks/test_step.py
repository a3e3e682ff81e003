"""benchmarks/step.py: its two steps compute the same, a wrong one is refused, ours costs the floor, and the record is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step  # noqa: E402
from step_reference import Setting, Setup, floor_images, floor_texts, our_first_step, our_step, reference_step  # noqa: E402
from step_report import compare, targets  # noqa: E402

SMALL = Setting(batch=2, classes=4, steps=2, tiny=True)


@pytest.fixture(scope="module")
def setup():
    return Setup(SMALL)


def result(run, setup):
    loss = run(setup)
    return {"loss": loss, **{name: p.grad.clone() for name, p in setup.prompts.items()}}


# ----------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("attack_loss", ["kl", "ce"])
def test_the_published_step_and_ours_compute_the_same(attack_loss):
    setup = Setup(Setting(batch=2, classes=4, steps=2, attack_loss=attack_loss, tiny=True))
    reference = result(reference_step, setup)
    for run in (our_first_step, our_step):
        difference = compare(reference, result(run, setup))
        assert max(difference.values()) < 1e-4


def test_the_attack_changes_the_loss_so_that_agreement_means_something(setup):
    views = setup.trainer.compute_loss(setup.model, setup.inputs, return_outputs=True)[1]["views"]
    assert (views.clean - views.adversarial).abs().max() > 0.1 and (views.clean - views.frozen).abs().max() > 0.01


def test_a_step_with_another_lambda_is_refused(setup, monkeypatch):
    reference = result(reference_step, setup)
    monkeypatch.setattr(setup.trainer.objective, "consistency", 1.51)
    with pytest.raises(ValueError, match="do not compute the same: their loss differs by"):
        compare(reference, result(our_step, setup))


def test_a_step_with_another_start_of_the_attack_is_refused(setup, monkeypatch):
    reference = result(reference_step, setup)
    monkeypatch.setattr(setup.trainer.args, "seed", 7)
    with pytest.raises(ValueError, match="do not compute the same"):
        compare(reference, result(our_step, setup))


def test_wrong_gradients_are_refused_though_the_loss_is_right():
    reference = {"loss": torch.tensor(2.0), "prompt": torch.ones(3)}
    for wrong in (torch.tensor([1.0, 1.0, 1.001]), torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match="gradient of the prompts differs"):
            compare(reference, {"loss": torch.tensor(2.0), "prompt": wrong})
    with pytest.raises(ValueError, match="other gradients"):
        compare(reference, {"loss": torch.tensor(2.0)})


# ---------------------------------------------------------------------------------------------------------------- cost


def test_our_step_needs_the_operations_of_the_floor_and_the_published_one_many_times_more(setup):
    our_step(setup)  # leaves the frozen outputs known
    ours, least, reference = (step.count(run, setup)[0] for run in (our_step, step.floor, reference_step))
    assert least <= ours <= 1.02 * least
    assert reference > 5 * ours


def test_the_first_step_of_a_run_also_runs_the_frozen_model_once(setup):
    with setup.trainer.classifier.frozen():
        images, texts = step.count(floor_images, setup)[0] / (2 * 2 + 4), step.count(floor_texts, setup)[0] / 2
    first, later = step.count(our_first_step, setup)[0], step.count(our_step, setup)[0]
    assert first - later == pytest.approx(images + texts, rel=1e-3)  # and the logits


def test_operations_counted_by_shapes_are_those_of_a_run():
    setup = Setup(SMALL)
    by_shapes = step.count_by_shapes(reference_step, setup)
    assert by_shapes == step.count(reference_step, setup)[0]
    assert all(p.grad is not None and not hasattr(p.grad, "fake_mode") for p in setup.prompts.values())


def test_attention_is_counted():
    def attend(_):
        x = torch.ones(1, 2, 3, 4)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert step.count(attend, None)[0] == 2 * 2 * 2 * 3 * 3 * 4  # two products for each of 2 heads


def test_texts_are_as_long_as_those_of_real_data_sets(setup):
    ids = setup.trainer.classifier.input_ids
    assert setup.padded_ids.shape == (4, 77) and 8 <= setup.text_tokens <= 10
    assert torch.equal(setup.padded_ids[:, : ids.shape[1]], ids)


# -------------------------------------------------------------------------------------------------------------- record


def test_the_record_holds_everything_that_the_table_says(tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    arguments = ["--tiny", "--batch", "2", "--classes", "4", "--steps", "1", "--repetitions", "2", "--json", str(file)]
    record = step.main(arguments)
    assert json.loads(file.read_text()) == record
    assert {"model", "machine", "versions", "date"} < record.keys() and record["versions"]["torch"]
    (found,) = record["settings"]
    assert (found["batch"], found["classes"], found["steps"], found["device"]) == (2, 4, 1, "cpu")
    assert {name: len(times) for name, times in found["rounds"].items()} == {
        "reference": 1, "ours_first": 1, "ours": 2, "floor_images": 2, "floor_texts": 2,
    }  # fmt: skip
    clock = found["seconds"]
    assert clock["floor"] == pytest.approx(6 * clock["image_forward"] + 2 * clock["text_forward"])
    assert found["ratios"]["reference_over_ours_seconds"] == clock["reference"] / clock["ours"]
    assert found["ratios"]["ours_over_floor_operations"] == found["operations"]["ours"] / found["operations"]["floor"]
    assert all(each["peak_bytes"] >= each["before_bytes"] > 1e6 for each in found["memory"].values())
    shown = capsys.readouterr().out
    assert "| published |" in shown and f"{found['ratios']['reference_over_ours_operations']:.1f} times fewer" in shown


def test_a_published_step_that_is_not_run_is_counted_and_its_agreement_is_not_claimed(capsys):
    arguments = ["--tiny", "--batch", "3", "--classes", "4", "--steps", "1", "--repetitions", "0"]
    (found,) = step.main([*arguments, "--reference_repetitions", "0", "--image_chunk_size", "2"])["settings"]
    assert "difference" not in found and "reference" not in found["memory"] and found["image_chunk_size"] == 2
    assert found["operations"]["reference"] > found["operations"]["ours"]
    shown = capsys.readouterr().out
    assert "2 images at a time" in shown and "was not run: whether both compute the same was not checked" in shown


def test_targets_are_those_of_the_large_model_and_are_not_rounded_up():
    large = Setting(batch=4, classes=100, steps=2)
    found = {"reference_over_ours_operations": 12.99, "ours_over_floor_operations": 1.02}
    verdicts = {name: target["reached"] for name, target in targets(large, found).items()}
    assert verdicts == {"reference_over_ours_operations": False, "ours_over_floor_operations": True}
    assert targets(SMALL, found) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "4,x"], "--batch=4,x must be whole numbers from 1"),
        (["--classes", "1"], "--classes=1 must be whole numbers from 2"),
        (["--steps", "0"], "--steps=0 must be"),
        (["--steps", ""], "--steps= must be"),
        (["--repetitions", "-1"], "--repetitions and --reference_repetitions must be 0 or more"),
        (["--reference_repetitions", "-1"], "--repetitions and --reference_repetitions must be 0 or more"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_bad_arguments_give_one_sentence(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        step.main(["--tiny", *arguments])
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_a_step_that_cannot_run_is_named(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(step.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ChildProcessError, match=r"reference failed.*signal 9, for want of memory"):
        step.in_a_process("reference", SMALL, tmp_path)


def test_without_arguments_the_two_settings_of_the_targets_are_run():
    chosen = [(s.batch, s.classes, s.steps) for s in step.settings(step.parse([]))]
    assert chosen == list(step.DEFAULT_SET) == [(4, 100, 2), (32, 100, 3)]
    assert len(step.settings(step.parse(["--batch", "4,32", "--steps", "2,3"]))) == 4
