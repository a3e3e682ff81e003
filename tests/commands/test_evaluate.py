"""examples/evaluate.py as users run it: base, adapter, two processes, killed and resumed, and with bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from capt_peft import CaptConfig, load_task
from capt_peft.commands.evaluate import main
from capt_peft.commands.train import main as train
from capt_peft.commands.tuned import read_record
from capt_peft.evaluation import Evaluation

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"
QUICK = [
    "--dataset_name",
    "digits",
    "--limit",
    "23",
    "--batch_size",
    "5",
    "--use_cpu",
    "--epsilon",
    "2/255,4/255",
    "--attacks",
    "clean,pgd-3,square-20",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    digits = load_task("digits")
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    config = CaptConfig(template=digits.template, class_names=list(digits.class_names))
    model = get_peft_model(base, config)
    shake(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}


def launch(*command):
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_texts_go_from_files_into_the_adapter_its_record_and_its_evaluations(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    own = {"seven": ["a photo of the digit 7", "a photo of seven"]}
    Path("texts.json").write_text(json.dumps(own))
    Path("templates.txt").write_text("a photo of the {}.\n\na drawing of the {}\n")
    templates = ["a photo of the {}.", "a drawing of the {}"]
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    quick = ["--max_steps", "1", "--eval_limit", "4", "--eval_attack", "pgd-1", "--save_strategy", "no", "--use_cpu"]
    data = ["--dataset_name", "digits", "--shots", "1", "--class_names", *names]
    texts = ["--template", "templates.txt", "--class_texts", "texts.json"]
    train(["--model_name_or_path", TINY_CLIP, "--output_dir", "mine", *quick, *data, *texts, "--learning_rate", "0.01"])
    assert "as 'a photo of the zero.' and so on, 20 texts in all" in capsys.readouterr().out
    record = json.loads(Path("mine/results.json").read_text())
    assert record["task"]["template"] == templates and record["task"]["class_texts"] == own
    Path("texts.json").unlink()
    Path("templates.txt").unlink()
    few = ["--limit", "3", "--signs", "false", "--use_cpu", "--attacks", "clean"]
    found = main(["--adapter", "mine", *few, "--update_card", "--split", "test"]).configuration["model"]
    assert found["template"] == templates and found["class_texts"] == own and "its own template" not in caplog.text
    other = main(["--adapter", "mine", *few, "--template", "a photo of {} there", *data[:2], *data[4:]]).configuration[
        "model"
    ]
    assert other["template"] == "a photo of {} there" and "class_texts" not in other
    kept = main(["--adapter", "mine", *few, *data[:2], *data[4:]]).configuration["model"]
    assert kept["template"] == templates and kept["class_texts"] == own


def test_an_adapter_is_measured_at_every_epsilon(adapter, tmp_path, capsys, caplog):
    output = tmp_path / "results.json"
    result = main(["--adapter", adapter, *QUICK, "--output", str(output)])
    shown = capsys.readouterr().out
    assert result.table() in shown and "Signs of masked gradients, none raised:" in shown and "L-inf 2/255" in shown
    content = json.loads(output.read_text())
    assert [(row["attack"]["name"], row["kind"]) for row in content["attacks"]] == 2 * [
        ("pgd-3", "robust"), ("square-20", "robust"),
    ]  # fmt: skip
    assert content["clean"]["n"] == 23 and len(content["worst_case"]) == 2
    assert content["configuration"]["task"] == {"name": "digits", "source": "digits", "split": "test", "limit": 23}
    assert content["configuration"]["model"]["adapter"]["fingerprint"]
    main(["--adapter", adapter, *QUICK, "--attacks", "clean", "--output", str(output)])
    assert "attacks has 0 entries now and had 4" in caplog.text
    assert json.loads((tmp_path / "results.old1.json").read_text()) == content


def test_every_evaluation_has_a_file_of_its_own_beside_the_adapter(adapter, tmp_path):
    one, other = (Path(shutil.copytree(adapter, tmp_path / name)) for name in ("one", "other"))
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, other / "adapter_model.safetensors")
    clean = ["--attacks", "clean", "--use_cpu", "--limit", "4", "--dataset_name", "digits"]
    main(["--adapter", str(other), *clean])
    for settings in ([], ["--limit", "5"], ["--split", "validation"], ["--seed", "1"], ["--template", "the digit {}."]):
        main(["--adapter", str(one), *clean, *settings])
    found = sorted(path.name for path in (one / "evaluations").glob("*.json"))
    assert len(found) == 5 and all(name.startswith(("digits-test-", "digits-validation-4-clean-")) for name in found)
    shutil.copy(other / "adapter_model.safetensors", one)  # tuned again into the same folder
    main(["--adapter", str(one), *clean])
    assert len(list((one / "evaluations").glob("*.json"))) == 6
    main(["--adapter", str(one), *clean, "--epsilon", "2/255,4/255", "--attacks", "clean,pgd-1"])
    assert list((one / "evaluations").glob("digits-test-4-linf-2of255+4of255-clean+pgd-1-*.json"))


def test_a_tuned_adapter_needs_no_more_than_its_name(tmp_path, monkeypatch, capsys, caplog):
    """It is measured on the data, the split and with the threat model that it was tuned with, unless others are named."""
    monkeypatch.chdir(tmp_path)
    quick = ["--max_steps", "1", "--eval_limit", "4", "--eval_attack", "pgd-1", "--save_strategy", "no", "--use_cpu"]
    own = [
        "--dataset_name",
        "textures",
        "--eval_split",
        "validation",
        "--epsilon",
        "0.5",
        "--norm",
        "l2",
        "--shots",
        "1",
    ]
    train(["--model_name_or_path", TINY_CLIP, "--output_dir", "mine", *quick, *own, "--learning_rate", "0.01"])
    few = ["--limit", "3", "--signs", "false", "--use_cpu"]
    for adapter in ("mine", "mine"):  # the second time it is there already
        main(["--adapter", adapter, *few])
        shown = capsys.readouterr().out
        assert "As mine was tuned: --norm l2 --epsilon 0.5 --dataset_name textures --split validation" in shown
        assert "| robust | L2 0.5 | pgd-20 |" in shown and "mine on textures" in shown
    main(["--adapter", "mine", *few, "--dataset_name", "digits", "--epsilon", "0.25"])
    assert "| robust | L2 0.25 | pgd-20 |" in capsys.readouterr().out
    assert len(list(Path("mine", "evaluations").glob("*.json"))) == 2
    record = json.loads(Path("mine", "results.json").read_text())
    record["configuration"]["script"]["dataset_name"] = record["task"]["source"] = "moved"
    Path("mine", "results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="mine was tuned on moved, which is not here: give --dataset_name"):
        main(["--adapter", "mine", *few])
    weights = load_file("mine/adapter_model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, "mine/adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"mine: results\.json has the figures of other weights: .* give --dataset_name"
    ):
        main(["--adapter", "mine", *few])
    main(["--adapter", "mine", *few, "--dataset_name", "digits", "--attacks", "clean"])
    assert "Nothing is taken over from it." in caplog.text
    monkeypatch.setattr("capt_peft.commands.tuned.hf_hub_download", lambda _, name: str(Path("mine", name)))
    assert read_record("someone/mine").unshown and read_record("someone/mine").results is None
    Path("mine", "results.json").unlink()
    with pytest.raises(ValueError, match=r"mine has no results\.json, which would say what it was tuned on"):
        main(["--adapter", "mine", *few])


def test_without_a_folder_of_its_own_a_model_has_one_in_outputs(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--base", TINY_CLIP, "--attacks", "clean", "--limit", "4", "--use_cpu"])
    (found,) = (tmp_path / "outputs" / "evaluation").glob("*/*.json")
    assert found.parent.name.endswith("tiny_clip") and found.name.startswith("digits-test-4-clean-")


def test_a_base_is_measured_zero_shot(tmp_path, capsys):
    result = main(["--base", TINY_CLIP, *QUICK, "--attacks", "clean", "--output", str(tmp_path / "r.json")])
    assert result.attacks == () and result.clean.correct > 15
    assert result.configuration["model"]["adapter"] is None
    assert "robust" not in capsys.readouterr().out


def test_two_processes_count_each_example_once_and_end_in_the_same_file(adapter, tmp_path):
    one, two = tmp_path / "one" / "r.json", tmp_path / "two" / "r.json"
    arguments = [str(SCRIPT), "--adapter", adapter, *QUICK]
    launch(sys.executable, *arguments, "--output", str(one))
    out = launch(
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *arguments,
        "--output", str(two),
    )  # fmt: skip
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".parquet").read_bytes() == two.with_suffix(".parquet").read_bytes()
    assert out.count("n = 23 images of the") == 1
    assert not two.with_suffix(".partial").exists()


def test_a_killed_process_goes_on_where_it_was(adapter, tmp_path):
    whole, killed = tmp_path / "whole" / "r.json", tmp_path / "killed" / "r.json"
    arguments = [str(SCRIPT), "--adapter", adapter, *QUICK, "--attacks", "clean,pgd-3,square-300", "--epsilon", "1/255"]
    launch(sys.executable, *arguments, "--output", str(whole))
    jobs = killed.with_suffix(".partial") / "jobs"
    for at in (2, 7, 11):
        process = subprocess.Popen(
            [sys.executable, *arguments, "--output", str(killed)],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(jobs.glob("*.json"))) < at and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not killed.exists()
    kept = {path: path.stat().st_mtime_ns for path in jobs.glob("*.json")}
    assert len(kept) >= 7
    launch(sys.executable, *arguments, "--output", str(killed))
    assert killed.read_bytes() == whole.read_bytes()
    assert not jobs.exists()


def test_curves_are_drawn(adapter, tmp_path, monkeypatch):
    from capt_peft.evaluation import curve

    monkeypatch.setattr(curve, "EPSILONS", (0, 4))
    monkeypatch.setattr(curve, "STEPS", (1, 2))
    few = ["--dataset_name", "digits", "--limit", "6", "--attacks", "clean", "--curve", "--use_cpu"]
    main(["--adapter", adapter, *few, "--output", str(tmp_path / "r.json")])
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "r.json",
        "r.curve.json",
        "r.curve.png",
        "r.curve.svg",
        "r.curve.zero-shot.json",
        "r.curve.CAPT.json",
    } <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "cw"], r"unknown attack 'cw'. Known: .*autoattack"),
        (["--epsilon", "4"], "more than the whole range of a pixel.*'4/255'"),
        (["--epsilon=-1/255"], "must be finite and at least 0"),
        (["--epsilon", ""], "'' is not a number"),
        (["--norm", "l3"], "unknown norm 'l3'"),
        (
            ["--norm", "patch", "--epsilon", "1/4"],
            "'pgd-3': PGD is built for linf, l2, l1, not for patch 0.25: use .*patch",
        ),
        (["--corruptions", "rain"], "'rain' is not a corruption: write all, or a kind"),
        (["--retrieval", "--corruptions", "fog"], "--corruptions has no effect with --retrieval"),
        (["--attacks", "patch"], "'patch': Patch is built for patch, not for L-inf"),
        (["--threats", "linf:1/255"], "--threats says norms and radii: leave --epsilon out"),
        (["--split", "holdout"], "no split 'holdout'"),
        (["--dtype", "int8"], "dtype='int8' must be"),
        (["--dtype", "tf32"], "is for CUDA GPUs"),
        (["--limit", "0"], "no images to evaluate"),
        (["--limit", "-3"], "limit=-3"),
        (["--seed", "-1"], "seed=-1 must be a whole number from 0 to 4294967295"),
        (["--seed", "4294967296"], "seed=4294967296 must be a whole number from 0"),
        (["--attacks", "pgd-0"], "attack 'pgd-0': steps=0 must be 1 or more"),
        (["--attack_target", "clip"], "attack_target='clip' is unknown"),
        (["--attack_template", "a photo"], r"must hold exactly one \{\}"),
        (["--attack_target", "frozen"], "--attack_target frozen needs --adapter"),
        (["--attacks", "clean", "--save_images"], "--save_images has no effect on clean accuracy"),
        (["--attacks", ","], "names nothing"),
        (["--attacks", "pgd-2,pgd-2"], "names pgd-2 twice"),
        (["--epsilon", "4/255, 4/255"], "names L-inf 4/255 twice"),
        (["--batch_size", "0"], "batch_size=0"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_nothing(tmp_path, arguments, message):
    with pytest.raises((ValueError, KeyError), match=message):
        main(["--base", TINY_CLIP, *QUICK, "--output", str(tmp_path / "r.json"), *arguments])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("threats", "attacks", "message"),
    [
        ("linf", "pgd-2", "'linf' must be a norm and an epsilon, such as linf:4/255"),
        ("linf:4", "pgd-2", "more than the whole range of a pixel"),
        ("l2:1", "pgd-2 --protocol fap", "--protocol fap says norm and radii: leave --threats out"),
        ("l2:1,l2:1", "pgd-2", "--threats names L2 1 twice"),
        ("l3:1", "pgd-2", "unknown norm 'l3'"),
        ("l2:1,patch:1/4", "pgd-2", "'pgd-2': PGD is built for linf, l2, l1, not for patch 0.25"),
        ("l2:1,l1:3", "pgd-2,patch", "'patch': Patch is built for patch, not for L2 1"),
    ],
)
def test_threat_models_that_an_attack_cannot_have_are_refused(tmp_path, threats, attacks, message):
    few = ["--limit", "4", "--use_cpu", "--output", str(tmp_path / "r.json")]
    with pytest.raises(ValueError, match=message):
        main(["--base", TINY_CLIP, *few, "--threats", threats, "--attacks", *attacks.split(" ")])
    assert list(tmp_path.iterdir()) == []


def test_a_published_protocol_does_not_measure_a_defence(tmp_path):
    few = ["--dataset_name", "digits", "--use_cpu", "--output", str(tmp_path / "r.json")]
    with pytest.raises(
        ValueError, match="--protocol cannot go with --defence: a published protocol has no attacks on one"
    ):
        main(["--base", TINY_CLIP, *few, "--protocol", "fap", "--defence", "ttc"])
    assert list(tmp_path.iterdir()) == []


def test_several_threat_models_have_their_attacks_and_a_union(tmp_path, capsys):
    output = tmp_path / "r.json"
    few = ["--limit", "20", "--use_cpu", "--signs", "false", "--output", str(output)]
    threats = ["--threats", "linf:2/255,l2:0.2,l1:2,patch:1/8", "--attacks", "clean,pgd-3,patch-3x2"]
    result = main(["--base", TINY_CLIP, *few, *threats])
    names = [(outcome.name, str(outcome.threat_model)) for outcome in result.attacks]
    balls = [("pgd-3", "L-inf 2/255"), ("pgd-3", "L2 0.2"), ("pgd-3", "L1 2")]
    assert names == [*balls, ("patch-3x2", "patch 0.125")]
    assert len(result.worst_case) == 4
    assert result.union.correct < min(worst.correct for worst in result.worst_case.values()) < 20
    told = f"| **robust** | L-inf 2/255, L2 0.2, L1 2, patch 0.125 | union | **{result.union.percent}** |"
    assert told in capsys.readouterr().out
    assert Evaluation.load(output).union == result.union


def test_an_adapter_is_not_measured_as_a_base_nor_a_base_as_an_adapter(adapter, tmp_path):
    few = ["--attacks", "clean", "--limit", "4", "--use_cpu", "--output", str(tmp_path / "r.json")]
    with pytest.raises(ValueError, match=r"is an adapter\. Measure it with --adapter"):
        main(["--base", adapter, *few])
    with pytest.raises(ValueError, match="is a CLIP without an adapter"):
        main(["--adapter", TINY_CLIP, *few])
    assert not list(tmp_path.iterdir())


def test_a_folder_without_an_adapter_and_an_adapter_on_a_task_with_another_template_are_told(adapter, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"is not an adapter: it has no adapter_config\.json \(--adapter\)"):
        main(["--adapter", str(tmp_path), *QUICK])
    few = ["--attacks", "clean", "--limit", "2", "--signs", "false", "--use_cpu", "--output", str(tmp_path / "r.json")]
    main(["--adapter", adapter, "--dataset_name", "shapes", *few])
    assert "classifies with its own template, 'a photo of the digit {}.'; the task's is" in caplog.text


def test_a_model_must_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"Give --adapter .* or --base"):
        main([*QUICK, "--output", str(tmp_path / "r.json")])
