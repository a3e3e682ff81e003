"""What TensorBoard shows of a run: curves of both accuracies, the terms of the objective, and adversarial examples."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_helpers import adapter_of, make_trainer

from capt_peft.evaluation.pictures import image_grid
from capt_peft.randomness import example_generators
from capt_peft.training import arguments

SETTINGS = {"eval_strategy": "epoch", "eval_attack": "pgd-3", "epsilon": "10/255"}
TERMS = {"loss", "clean_loss", "consistency_tuned", "consistency_frozen", "alpha"}
ACCURACIES = {"clean_accuracy", "robust_accuracy"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, processor):
    """A run of two epochs, evaluated before it and after each, and what TensorBoard read of it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trainer = make_trainer(folder, processor, report_to="tensorboard", **SETTINGS)
        trainer.evaluate(metric_key_prefix="before")
        trainer.train()
    (runs,) = (folder / "out" / "runs").iterdir()
    return trainer, folder, EventAccumulator(str(runs), size_guidance={"images": 0}).Reload()


def test_the_curves_are_those_of_the_log(run):
    trainer, _, board = run
    curves = {name: {event.step: event.value for event in board.Scalars(name)} for name in board.Tags()["scalars"]}
    assert {f"train/{name}" for name in TERMS | ACCURACIES} < set(curves)
    assert {f"eval/{name}" for name in ACCURACIES} < set(curves)
    for place in ("train", "eval"):
        for name in (TERMS if place == "train" else set()) | ACCURACIES:
            key = name if place == "train" else f"eval_{name}"
            logged = {
                line["step"]: line[key] for line in trainer.state.log_history if key in line and "attack" not in key
            }
            assert len(logged) == (6 if place == "train" else 2)
            assert curves[f"{place}/{name}"] == pytest.approx(logged), name


def test_each_evaluation_shows_clean_and_adversarial_images_and_the_noise(run):
    trainer, _, board = run
    assert [event.step for event in board.Images("train/before_adversarial_examples")] == [0]
    pictures = board.Images("eval/adversarial_examples")
    assert [event.step for event in pictures] == [3, 6]
    picture = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
    clean, adversarial, noise = np.split(picture.astype(int), 3)
    split = trainer.eval_dataset
    places = range(0, 12, 2)
    pixels = torch.stack([split[i]["pixels"] for i in places])
    assert (clean == np.concatenate((pixels * 255).byte().permute(0, 2, 3, 1).numpy(), axis=1)).all()
    assert 8 <= abs(adversarial - clean).max() <= 11
    labels = torch.tensor([split[i]["labels"] for i in places])
    args, classifier = trainer.args, trainer.classifier
    attacked = args.evaluation_attack(
        classifier.with_fixed_texts(), pixels, labels, example_generators(args.seed, places, stream="evaluation")
    )
    grid = image_grid(classifier, pixels, labels, args.evaluation_attack, args.seed, places)
    assert torch.equal(grid[:, 32:64], torch.cat(list(attacked), dim=2))
    assert abs((grid.permute(1, 2, 0) * 255).byte().numpy().astype(int) - picture).max() <= 1
    assert noise.min() == 0 and noise.max() >= 254  # of both signs, and it fills the range


def test_all_of_it_lies_in_the_folder_of_the_run(run):
    _, folder, _ = run
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_watching_changes_nothing(run, tmp_path, processor):
    trainer, *_ = run
    unwatched = make_trainer(tmp_path, processor, **SETTINGS)
    unwatched.train()
    assert not (tmp_path / "out" / "runs").exists()
    for name, value in adapter_of(unwatched).items():
        assert torch.equal(value, adapter_of(trainer)[name])


@pytest.mark.parametrize(
    ("tracker", "words"),
    [("tensorboard", "needs a package that is not installed"), ("tensorbored", "is unknown")],
)
def test_a_tracker_that_is_not_there_is_said(tracker, words, tmp_path, processor, monkeypatch):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(ValueError, match=f"report_to='{tracker}' {words}. Trackers that are: wandb; pip install"):
        make_trainer(tmp_path, processor, report_to=tracker)
