"""examples/train.py as users run it: plain, from a file, under accelerate, in two processes, and with bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY_CLIP
from PIL import Image
from safetensors.torch import load_file

from capt_peft import CaptTrainer, ZeroShotClassifier, load_task
from capt_peft.commands.calibrate import main as calibrate_main
from capt_peft.commands.card import main as card_main
from capt_peft.commands.evaluate import main as evaluate_main
from capt_peft.commands.strength import main as strength_main
from capt_peft.commands.train import main, parse_args

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
QUICK = [
    "--shots", "2", "--num_train_epochs", "2", "--per_device_train_batch_size", "10", "--eval_limit", "20",
    "--eval_attack", "pgd-2", "--attack_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--use_cpu",
    "--disable_tqdm", "true", "--epsilon", "4/255", "--learning_rate", "0.05",
]  # fmt: skip


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return folder, main([*QUICK, "--output_dir", str(folder)]).to_dict()


def test_everything_that_is_promised_is_written(run):
    folder, results = run
    assert {p.name for p in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "results.json",
    }
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results, default=str))
    for stage in ("before", "after"):
        for kind in ("clean", "robust"):
            accuracy = results["evaluation"][stage][kind]
            assert accuracy["n"] == 20
            assert accuracy["interval_95"][0] <= accuracy["accuracy"] <= accuracy["interval_95"][1]
    assert results["evaluation"]["attack"]["name"] == "pgd-2"
    assert (
        results["versions"]["torch"] == torch.__version__.split("+")[0]
        or results["versions"]["torch"] == torch.__version__
    )
    assert results["configuration"]["training"]["epsilon"] == "4/255"
    assert results["adapter"]["bytes"] == (folder / "adapter_model.safetensors").stat().st_size


def test_the_numbers_of_the_card_are_those_of_the_results(run):
    folder, results = run
    card = (folder / "README.md").read_text()
    for stage in ("before", "after"):
        for kind in ("clean", "robust"):
            assert f"| {100 * results['evaluation'][stage][kind]['accuracy']:.1f} (" in card
    assert "import capt_peft" in card
    assert "| L-inf 4/255 | pgd-2 |" in card


def test_the_saved_adapter_classifies(run):
    folder, _ = run
    classifier = ZeroShotClassifier.from_pretrained(str(folder))
    assert classifier.class_names == tuple("0123456789")
    assert len(classifier.predict(Image.new("RGB", (8, 8)))[0]) == 10


def test_a_folder_of_images_is_a_users_real_job(tmp_path):
    for split, count in (("train", 4), ("test", 3)):
        for name, colour in (
            ("red_thing", (200, 30, 30)),
            ("green_thing", (30, 200, 30)),
            ("blue_thing", (30, 30, 200)),
        ):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 24), colour).save(folder / f"{i}.png")
    results = main([
        *QUICK, "--dataset_name", str(tmp_path / "images"), "--template", "a photo of a {} here.", "--method", "adv-vlp",
        "--output_dir", str(tmp_path / "out"), "--epsilon", "8/255", "--seed", "3",
    ])  # fmt: skip
    assert results.task.class_names == ["blue thing", "green thing", "red thing"]
    assert results.adapter.config["coupling"] == "none"
    assert results.evaluation.attack["threat_model"]["epsilon"] == 8 / 255


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"shots": "4", "epsilon": "2/255", "coupling": "none"}))
    script, args = parse_args(["--config", str(tmp_path / "run.yaml"), "--epsilon", "1/255"])
    assert (script.shots, script.coupling, args.epsilon) == ("4", "none", "1/255")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magic"], "Unknown method 'magic'"),
        (["--shots", "500"], "shots=500: the smallest class, '8', has 77 training images. Give 1 to 77, or 'all'."),
        (["--shots", "78"], "shots=78: the smallest class, '8', has 77"),
        (["--shots", "0"], "Give 1 to 77, or 'all'."),
        (["--eval_limit", "0"], "eval_limit=0"),
        (["--root", "./nowhere"], "There is no folder ./nowhere (--root)"),
        (["--shots", "many"], "shots='many'"),
        (["--dataset_name", "no/such/dataset"], "no/such/dataset"),
        (["--template", "digit"], "{}"),
        (["--template", "{}."], "would overwrite"),
        (["--epsilon", "x"], "x"),
        (["--coupling", "sideways"], "sideways"),
        (["--class_specific", "true", "--text_depth", "0"], "class_specific=True needs text prompts"),
        (["--text_depth", "40", "--vision_depth", "40"], "text_depth=40"),
        (["--eval_split", "holdout"], "holdout"),
        (["--model_name_or_path", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, arguments, words):
    with pytest.raises((ValueError, KeyError, OSError)) as caught:
        main([*QUICK, "--output_dir", str(tmp_path / "out"), *arguments])
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_model_named_with_hyphens_is_a_named_model_too():
    script, args = parse_args(["--model-name-or-path", "some/clip"])
    assert script.model_name_or_path == "some/clip" and args.num_train_epochs == 50  # not the digits' settings


def test_unknown_arguments_are_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("epsilonn: 1/255\n")
    with pytest.raises(SystemExit):
        parse_args(["--config", str(tmp_path / "run.yaml")])
    assert "unknown arguments epsilonn" in capsys.readouterr().err
    with pytest.raises((SystemExit, ValueError)):
        parse_args(["--epsilonn", "1/255"])


def test_two_processes_follow_one_with_the_same_global_batch(tmp_path):
    common = [str(SCRIPT), *QUICK, "--save_strategy", "epoch", "--seed", "5"]
    one, two = tmp_path / "one", tmp_path / "two"
    launch(sys.executable, *common, "--output_dir", str(one))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613"]
    launch(*torchrun, *common, "--per_device_train_batch_size", "5", "--output_dir", str(two))
    losses = []
    for folder in (one, two):
        last = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        losses.append([entry["loss"] for entry in history(last) if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-4)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[1]["training"]["processes"] == 2
    assert results[0]["evaluation"]["before"] == results[1]["evaluation"]["before"]


def test_the_same_command_begins_a_run_and_goes_on_with_it(tmp_path, caplog, monkeypatch):
    folder = str(tmp_path / "out")
    command = [*QUICK, "--save_strategy", "epoch", "--resume_from_checkpoint", "true", "--output_dir", folder]
    first = main(command)
    assert f"There is no checkpoint in {tmp_path / 'out'} yet: the run starts from the beginning." in caplog.text
    whole = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    last = tmp_path / "out" / "checkpoint-4" / "optimizer.pt"
    last.write_bytes(last.read_bytes()[:100])
    second = main(command)
    assert f"{last.parent}: optimizer.pt has other bytes than were written" in caplog.text
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == whole
    assert second.evaluation == first.evaluation

    monkeypatch.setattr(CaptTrainer, "evaluate", lambda *_, **__: pytest.fail("a long evaluation came first"))
    with pytest.raises(ValueError, match="epsilon: 8/255 here, 4/255 in the checkpoint"):
        main([*command, "--epsilon", "8/255"])


def test_accelerate_launches_the_script(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(SCRIPT)]
    output = launch(*command, *QUICK, "--max_steps", "1", "--output_dir", str(tmp_path / "out"))
    assert "| zero-shot |" in output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "steps", "size", "evaluated", "loss"),
    [("fap", 2, 1 / 255, 1 / 255, "kl"), ("apt", 3, 2 / 3 * 4 / 255, 1 / 255, "ce")],
)
def test_the_published_protocols_are_what_their_papers_say(name, steps, size, evaluated, loss):
    _, args = parse_args(["--config", str(SCRIPT.parent / "configs" / f"{name}.yaml")])
    attack = args.train_attack
    assert (attack.steps, attack.loss) == (steps, loss) and attack.resolved_step_size == pytest.approx(size)
    assert args.evaluation_attack.steps == 100
    assert args.evaluation_attack.resolved_step_size == pytest.approx(evaluated)


@pytest.mark.parametrize(("name", "class_specific"), [("fap", False), ("apt", False), ("apt", True)])
def test_a_published_protocol_runs(name, class_specific, tmp_path):
    config = yaml.safe_load((SCRIPT.parent / "configs" / f"{name}.yaml").read_text())
    few = {"shots": 1, "max_steps": 1, "eval_limit": 4, "eval_attack": "pgd-1", "model_name_or_path": TINY_CLIP}
    shallow = {key: 2 for key in ("text_depth", "vision_depth") if key in config}
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({**config, **few, **shallow}))
    results = main([
        "--config", str(tmp_path / "quick.yaml"), "--use_cpu", "--output_dir", str(tmp_path / "out"),
        "--class_specific", str(class_specific).lower(),
    ])  # fmt: skip
    assert results.method == config["method"] and results.training.steps == 1
    assert results.adapter.config["num_text_tokens"] == config["num_text_tokens"]
    assert results.task.shots == "1"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    inputs = next(tensor for name, tensor in tensors.items() if "token_embedding" in name)
    assert inputs.shape[:-1] == (*[10] * class_specific, config["num_text_tokens"])


def test_without_shots_a_class_gives_16_images_or_what_it_has(tmp_path, monkeypatch, capsys):
    """A folder of 9 images per class: half of them are training images."""
    monkeypatch.chdir(tmp_path)
    digits = load_task("digits")["train"]
    for label in range(10):
        for i in [i for i, found in enumerate(digits["label"]) if found == label][:9]:
            path = tmp_path / "images" / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digits[i]["image"].save(path)
    quick = ["--max_steps", "1", "--eval_limit", "4", "--eval_attack", "pgd-1", "--use_cpu", "--save_strategy", "no"]
    results = main(["--model_name_or_path", TINY_CLIP, "--dataset_name", "images", "--output_dir", "out", *quick])
    out = capsys.readouterr().out
    assert (
        "Fewer than 16 training images: 0, 1, 2, 3, 4 and 5 more. All that there are of them are used (--shots)." in out
    )
    assert results.task.shots == "up to 16" and "up to 16 images per class" in Path("out", "README.md").read_text()
    assert main(["--output_dir", "digits", *quick]).task.shots == "16"
    with pytest.raises(ValueError, match="shots=16: the smallest class"):
        main(
            [
                "--model_name_or_path",
                TINY_CLIP,
                "--dataset_name",
                "images",
                "--output_dir",
                "out",
                *quick,
                "--shots",
                "16",
            ]
        )


def test_lora_from_the_command_line_is_evaluated_described_and_refuses_what_is_about_prompts(tmp_path):
    folder = tmp_path / "lora"
    main([*QUICK, "--peft", "lora", "--peft_kwargs", '{"r": 2}', "--output_dir", str(folder)])
    assert {p.name for p in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "zero_shot.json",
        "README.md",
        "results.json",
    }
    classifier, digits = ZeroShotClassifier.from_pretrained(str(folder)), load_task("digits")
    assert (classifier.class_names, classifier.template) == (digits.class_names, digits.template)
    assert classifier.model.peft_config["default"].r == 2
    evaluate_main(["--adapter", str(folder), "--attacks", "clean,pgd-2", "--limit", "20", "--use_cpu", "--update_card"])
    assert (folder / "evaluation.json").is_file()
    card_main(["--adapter", str(folder), "--license", "mit"])
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "# LoRA adapter for digits" in card and "prompts" not in card
    for command, words in ((strength_main, "no other has a strength"), (calibrate_main, "no other has a strength")):
        with pytest.raises(ValueError, match=words):
            command(["--adapter", str(folder)])
