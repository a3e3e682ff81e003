"""benchmarks/precision.py: modes are what they are called, their differences from float32 are found, and the record is whole."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import precision  # noqa: E402
from precision_modes import MODES, Mode  # noqa: E402
from step_reference import Setting  # noqa: E402

SMALL = Setting(batch=8, steps=2, attack_loss="ce", tiny=True)


def layer_precisions(mode):
    """In which precision a step's image tower runs."""
    seen = set()
    linear = mode.trainer.classifier.base_model.vision_model.encoder.layers[0].mlp.fc1
    hook = linear.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    mode.step()
    hook.remove()
    return seen


def test_modes_stay_what_they_are_beside_each_other():
    names = ("float32", "bf16", "fp16", "bf16_full_precision_attack")
    modes = {name: Mode(name, SMALL) for name in names}  # Accelerate's state is that of the last one
    for mode in modes.values():
        mode.step()  # the frozen model, which is float32's, has its turn in the first
    assert {name: layer_precisions(mode) for name, mode in modes.items()} == {
        "float32": {torch.float32}, "bf16": {torch.bfloat16}, "fp16": {torch.float16},
        "bf16_full_precision_attack": {torch.float32, torch.bfloat16},
    }  # fmt: skip


def test_all_modes_see_the_same_images_and_the_gradients_are_taken_where_float32s_attack_went():
    points = []
    exact, half = Mode("float32", SMALL), Mode("bf16", SMALL)
    first, second = exact.values(points), half.values(points)
    assert torch.equal(exact.inputs["pixels"], half.inputs["pixels"]) and len(points) == 2
    assert first[2].shape == second[2].shape == (2, 8, 3, 32, 32)
    pixels = exact.inputs["pixels"]
    assert all(0 < (point - pixels).abs().max() <= 10 / 255 + 1e-6 for point in points)
    assert torch.equal(first[2], exact.values(points)[2])  # again at these points
    found = precision.compare(first, second)
    assert 0.98 < found["equal_signs"] < 1 and 0 < found["loss_difference"] < 0.1
    assert precision.compare(first, first) == {
        "equal_signs": 1, "equal_signs_by_attack_step": [1, 1], "vanished": 0, "loss_difference": 0,
        "gradient_cosine": pytest.approx(1),
    }  # fmt: skip


def test_lost_gradients_are_counted():
    gradient = torch.ones(2, 1, 3, 2, 2)
    lost = gradient.clone()
    lost[1, 0, 0] = 0
    values = torch.tensor(2.0), torch.tensor([1.0, 0.0]), gradient
    found = precision.compare(values, (torch.tensor(3.0), torch.tensor([0.0, 1.0]), lost))
    assert found == {
        "equal_signs": pytest.approx(5 / 6), "equal_signs_by_attack_step": [1, pytest.approx(2 / 3)],
        "vanished": pytest.approx(1 / 6), "loss_difference": 0.5, "gradient_cosine": 0,
    }  # fmt: skip


def test_the_record_holds_everything_that_the_table_says(tmp_path, capsys):
    file = tmp_path / "precision.json"
    arguments = [
        "--tiny",
        "--batch",
        "4",
        "--steps",
        "1",
        "--modes",
        "bf16,fp16",
        "--repetitions",
        "2",
        "--json",
        str(file),
    ]
    record = precision.main([*arguments, "--skip_accuracy"])
    assert json.loads(file.read_text()) == record
    assert {"model", "machine", "versions", "date", "attack_loss", "repetitions"} < record.keys()
    assert (record["batch"], record["classes"], record["steps"], record["device"]) == (4, 10, 1, "cpu")
    assert list(record["modes"]) == ["float32", "bf16", "fp16"]
    for name, found in record["modes"].items():
        assert len(found["rounds"]) == 2 and min(*found["rounds"], found["first_step_seconds"]) > 0
        assert found["seconds"] == sum(found["rounds"]) / 2
        assert found["times_float32"] == found["seconds"] / record["modes"]["float32"]["seconds"]
        assert (found["equal_signs"] == 1) == (name == "float32") and "accuracies" not in found
        assert found["gradient_cosine"] > 0.5
    shown = capsys.readouterr().out
    assert f"| bf16 | {record['modes']['bf16']['seconds']:.3g} |" in shown and "| clean |" not in shown
    assert "Accelerate runs it in float32 on a CPU" in shown and record["versions"]["torch"] in shown


def test_accuracies_are_those_of_tuned_models(monkeypatch, capsys):
    monkeypatch.setattr(precision, "TEST_IMAGES", 20)
    arguments = ["--tiny", "--batch", "2", "--steps", "1", "--modes", "float32", "--repetitions", "1"]
    record = precision.main([*arguments, "--seeds", "0,1", "--tuning_steps", "2"])
    accuracies = record["modes"]["float32"]["accuracies"]
    assert len(accuracies) == 2 and all(0 <= one["robust"] <= one["clean"] <= 1 for one in accuracies)
    assert min(one["clean"] for one in accuracies) > 0.3  # guessing is 0.1
    shown = capsys.readouterr().out
    assert "| clean | robust |" in shown and " ± " in shown and "after 2 steps" in shown and "seeds 0, 1" in shown


def test_a_mode_whose_scaler_overflows_lowers_its_scale():
    mode = Mode("fp16", Setting(batch=2, steps=1, attack_loss="ce", tiny=True))
    mode.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
    assert mode.values([])[1].isfinite().all() and mode.trainer.accelerator.scaler.get_scale() < 2.0**19


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modes", "float32,fp8"], "--modes fp8: there is no such mode. Allowed: float32, bf16, "),
        (["--seeds", "0,x"], "--seeds 0,x must be whole numbers"),
        (["--repetitions", "0"], "--repetitions 0 must be at least 1"),
        (["--batch", "161"], "--batch 161 is more than the 160 digits"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_bad_arguments_give_one_sentence(arguments, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        precision.main(["--tiny", *arguments])
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_without_arguments_all_modes_are_run():
    args = precision.parse([])
    assert args.modes == list(MODES) and (args.batch, args.classes, args.seeds) == (4, 100, [0, 1])
