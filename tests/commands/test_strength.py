"""`capt-peft strength`, and the strength in `train` and `evaluate`, as users run them."""

import json
import shutil
from dataclasses import replace

import pytest
from helpers import TINY_CLIP
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier, load_task
from capt_peft.attacks.registry import known_attack
from capt_peft.commands.calibrate import main as calibrate
from capt_peft.commands.data import DataArguments, measured
from capt_peft.commands.evaluate import main as evaluate_command
from capt_peft.commands.strength import main, told
from capt_peft.commands.train import main as train
from capt_peft.evaluation import evaluate
from capt_peft.evaluation.strength import strength_front
from capt_peft.results.card import write_card
from capt_peft.results.hub import UPLOADED
from capt_peft.results.run import RecordError, Records, RunResults
from capt_peft.results.strength import StrengthFront
from capt_peft.tuner.fingerprint import adapter_fingerprint

QUICK = [
    "--shots", "2", "--num_train_epochs", "2", "--per_device_train_batch_size", "10", "--eval_limit", "40",
    "--eval_attack", "pgd-2", "--attack_steps", "2", "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "true",
    "--epsilon", "8/255", "--learning_rate", "0.5",
]  # fmt: skip
FRONT = ["--strengths", "0,0.5,1", "--limit", "20", "--use_cpu"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adapter"
    train([*QUICK, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def adapter(tuned, tmp_path):
    return shutil.copytree(tuned, tmp_path / "adapter")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def accuracies(folder):
    measured = RunResults.load(folder).evaluation
    return measured.before, measured.after


def test_it_measures_chooses_and_writes_into_the_configuration_alone(adapter, capsys):
    before, weights = config_of(adapter), (adapter / "adapter_model.safetensors").read_bytes()
    strength = main(["--adapter", str(adapter), *FRONT])
    front = StrengthFront.load(adapter)
    assert [point.strength for point in front.points] == [0, 0.5, 1] and front.base.clean.n == 20
    assert strength == front.chosen.strength == front.choose().strength
    assert config_of(adapter) == {**before, "strength": strength}
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights
    assert front.attack == "pgd-2, L-inf 8/255"  # those of the tuning
    assert front.images == "20 images of the validation split of digits"
    assert ZeroShotClassifier.from_pretrained(str(adapter)).strength == strength
    shown = capsys.readouterr().out
    assert front.table() in shown and f"strength is {strength:g} now" in shown
    with Image.open(adapter / "strength.png") as picture:
        assert picture.width > 800
    card = (adapter / "README.md").read_text()
    assert f"| strength | {strength:g}, chosen on 20 images of the validation split of digits under pgd-2" in card
    records = Records.read(adapter, adapter_fingerprint(adapter))
    assert records.front == front and records.results.strength == strength and records.unshown == ()


def test_it_goes_on_where_it_was(adapter, monkeypatch):
    first = main(["--adapter", str(adapter), *FRONT, "--no_evaluate"])
    monkeypatch.setattr("capt_peft.attacks.pgd.PGD.run", None)
    assert main(["--adapter", str(adapter), *FRONT, "--no_evaluate"]) == first
    assert main(["--adapter", str(adapter), *FRONT, "--no_evaluate", "--keep_clean", "1"]) in (0, 0.5, 1)
    assert "keeps 100% of the base" in (adapter / "README.md").read_text()


def test_a_given_strength_is_written_and_the_accuracies_are_measured_at_it(adapter):
    zero_shot, whole = accuracies(adapter)
    main(["--adapter", str(adapter), "--set", "0.5", "--use_cpu"])
    before, after = accuracies(adapter)
    assert before == zero_shot and after != whole
    classifier = ZeroShotClassifier.from_pretrained(str(adapter))
    assert classifier.strength == 0.5
    record = RunResults.load(adapter)
    data = measured(load_task("digits"), "test", 40)
    attack = known_attack(record.evaluation.attack)
    alone = evaluate(classifier, data, attack, seed=record.seed, signs=False, progress=False)
    assert (after.clean, after.robust) == (alone.clean, alone.robust)
    assert record.fingerprint == adapter_fingerprint(adapter) and record.adapter.config["strength"] == 0.5
    card = (adapter / "README.md").read_text()
    assert "| strength | 0.5, set by hand (0: the base model, 1: the whole adapter) |" in card
    assert f"| {after.robust.percent} |" in card
    # and back: `capt-peft train` has measured the same
    main(["--adapter", str(adapter), "--set", "1", "--use_cpu"])
    assert accuracies(adapter) == (zero_shot, whole)
    assert "| strength |" not in (adapter / "README.md").read_text()
    main(["--adapter", str(adapter), "--set", "0", "--use_cpu"])
    assert accuracies(adapter) == (zero_shot, zero_shot)


def test_figures_of_another_strength_are_never_shown(adapter, capsys):
    whole = accuracies(adapter)[1]
    evaluate_command(
        ["--adapter", str(adapter), "--attacks", "pgd-1", "--limit", "20", "--use_cpu", "--no_signs", "--update_card"]
    )
    assert (adapter / "evaluation.json").is_file()
    (adapter / "model.onnx").touch()
    main(["--adapter", str(adapter), "--set", "1", "--no_evaluate"])
    assert "Exported before" not in capsys.readouterr().out
    main(["--adapter", str(adapter), "--set", "0.5", "--no_evaluate"])
    shown, again = capsys.readouterr().out, f"capt-peft strength {adapter} --set 0.5"
    assert f"results.json are of strength 1, so the card does not show them; {again}" in shown
    assert "Exported before this change, and still as it was then: model.onnx." in shown
    card = (adapter / "README.md").read_text()
    assert whole.robust.percent not in card
    assert "**Not known.** Clean and robust accuracy were not measured at strength 0.5, so" in card
    assert "results.json has the figures of strength 1, and the adapter is stored with strength 0.5, so" in card
    assert f"capt-peft strength {RunResults.load(adapter).name.split('/')[-1]} --set 0.5." in " ".join(card.split())
    assert "The run that tuned it is in `results.json`, with the figures of another strength." in card
    assert (adapter / "evaluation.old1.json").is_file() and not (adapter / "evaluation.json").exists()
    write_card(adapter)  # no error: they are of these prompts
    assert (adapter / "README.md").read_text() == card
    # data and threat model of the tuning are taken over all the same
    evaluation = evaluate_command(
        ["--adapter", str(adapter), "--attacks", "pgd-1", "--limit", "20", "--use_cpu", "--no_signs"]
    )
    assert evaluation.robust and evaluation.attacks[0].threat_model.epsilon == 8 / 255
    assert evaluation.configuration["model"]["adapter"]["config"]["strength"] == 0.5


def test_what_does_not_depend_on_the_strength_stays_in_the_card(adapter):
    def facts():
        rows = [line for line in (adapter / "README.md").read_text().splitlines() if line.startswith("| ")]
        names = ("dataset", "template", "method", "prompts", "training attack", "optimiser", "seed", "time", "versions")
        return {name: [row for row in rows if row.startswith(f"| {name} |")] for name in names}

    before, words = facts(), "tuned on digits with the method capt of"
    assert all(len(rows) == 1 for rows in before.values()) and words in (adapter / "README.md").read_text()
    main(["--adapter", str(adapter), "--set", "0.5", "--no_evaluate"])
    assert facts() == before and words in (adapter / "README.md").read_text()


def test_a_calibration_of_another_strength_is_told_and_so_is_strength_0(adapter, capsys):
    calibrate(["--adapter", str(adapter), "--limit", "60", "--use_cpu"])
    lost = f"Its calibration held for strength 1 and no longer holds; capt-peft calibrate {adapter} fits one again."
    for strength, loses, base in (("0.5", True, False), ("1", False, False), ("0", True, True)):
        capsys.readouterr()
        main(["--adapter", str(adapter), "--set", strength, "--no_evaluate"])
        shown = capsys.readouterr().out
        assert f"The adapter's strength is {strength} now" in shown
        assert (lost in shown) == loses and ("It acts as the base model" in shown) == base


def test_another_strength_by_hand_leaves_the_front_and_says_so(adapter):
    main(["--adapter", str(adapter), *FRONT, "--no_evaluate"])
    front = StrengthFront.load(adapter)
    main(["--adapter", str(adapter), "--set", "0.3", "--no_evaluate"])
    assert StrengthFront.load(adapter) == front
    words = f"| strength | 0.3, set by hand; on 20 images of the validation split of digits under pgd-2, L-inf 8/255, strength {front.chosen.strength:g} has the best"  # noqa: E501
    assert words in (adapter / "README.md").read_text()


def test_an_adapter_that_is_tuned_again_has_nothing_of_the_old_front(adapter, capsys):
    main(["--adapter", str(adapter), *FRONT, "--no_evaluate"])
    (adapter / "model.pt2").touch()
    assert {path.name for path in adapter.glob("strength.*")} == {"strength.json", "strength.png", "strength.svg"}
    train([*QUICK, "--output_dir", str(adapter)])
    assert not list(adapter.glob("strength.*"))
    assert "still as it was then: model.pt2." in capsys.readouterr().out


def test_a_front_of_other_weights_is_refused(adapter, tuned):
    main(["--adapter", str(adapter), *FRONT, "--no_evaluate"])
    content = json.loads((adapter / "strength.json").read_text())
    content["configuration"]["model"]["adapter"]["fingerprint"] = "0" * 16
    (adapter / "strength.json").write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"strength\.json has the figures of other weights"):
        Records.read(adapter, adapter_fingerprint(adapter))
    with pytest.raises(RecordError, match=r"strength\.json has"):
        write_card(adapter)
    assert "strength.json" in UPLOADED


def test_what_a_person_added_to_the_card_stays(adapter):
    card = adapter / "README.md"
    write_card(adapter)
    card.write_text(card.read_text().replace("tags:\n", "license: mit\ntags:\n- medical\n", 1))
    main(["--adapter", str(adapter), "--set", "0.5", "--no_evaluate"])
    assert "license: mit" in card.read_text() and "- medical" in card.read_text()
    card.write_text("mine")
    main(["--adapter", str(adapter), "--set", "0.25", "--no_evaluate"])
    assert card.read_text() == "mine" and config_of(adapter)["strength"] == 0.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "test"], "chosen on test images makes their accuracy too high"),
        (["--split", "train"], "has the images that it was tuned on"),
        (["--strengths", "0,2"], "strength=2.0 must be from 0"),
        (["--strengths", "0,x"], "must be numbers from 0 to 1 with commas"),
        (["--strengths", "0.5,0.5"], "twice"),
        (["--set", "1.5"], r"strength=1\.5 must be from 0"),
        (["--set", "0.5", "--split", "validation"], "--split has no effect with --set"),
        (["--keep_clean", "0"], r"keep_clean=0\.0 must be above 0"),
        (["--limit", "0"], "limit=0 must be at least 1"),
        (["--attacks", "pgd-x"], "unknown attack"),
        (["--split", "other"], "has no other split to choose a strength on; it has train, validation, test"),
    ],
)
def test_what_cannot_be_chosen_is_refused_and_nothing_is_written(adapter, options, words):
    before = {path: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=words):
        main(["--adapter", str(adapter), "--use_cpu", *options])
    assert {path: path.read_bytes() for path in adapter.iterdir() if path.is_file()} == before


def test_a_place_that_cannot_be_written_is_refused_at_once(adapter):
    (adapter / "strength.json").mkdir()
    with pytest.raises(ValueError, match="Nothing can be written into adapter="):
        main(["--adapter", str(adapter), *FRONT])
    with pytest.raises(ValueError, match="is not the folder of a CAPT adapter"):
        main(["--adapter", "someone/mine"])


def test_test_images_choose_only_where_that_is_asked_for(adapter):
    main(["--adapter", str(adapter), *FRONT, "--split", "test", "--choose_on_test", "--no_evaluate"])
    assert "20 images of the test split of digits" in (adapter / "README.md").read_text()


def test_other_adapters_are_refused_and_one_without_a_record_needs_its_data(tmp_path):
    base = CLIPModel.from_pretrained(TINY_CLIP)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is not the folder of a CAPT adapter"):
        main(["--adapter", str(tmp_path / "lora")])
    digits = load_task("digits")
    config = CaptConfig(
        template=digits.template, class_names=list(digits.class_names), modules_to_save=["visual_projection"]
    )
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config).save_pretrained(tmp_path / "modules")
    with pytest.raises(ValueError, match="needs an adapter of prompts alone"):
        main(["--adapter", str(tmp_path / "modules")])
    config = CaptConfig(template=digits.template, class_names=list(digits.class_names))
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), config).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no results\.json, which would say what it was tuned on"):
        main(["--adapter", str(tmp_path / "plain")])
    named = ["--dataset_name", "digits", "--attacks", "pgd-1", "--epsilon", "1/255", "--strengths", "1"]
    main(["--adapter", str(tmp_path / "plain"), "--use_cpu", "--limit", "10", *named])
    assert StrengthFront.load(tmp_path / "plain").attack == "pgd-1, L-inf 1/255"


# ------------------------------------------------------------------------------------------------ evaluate and train


def test_an_evaluation_at_a_strength_writes_none(adapter):
    before = config_of(adapter)
    options = ["--adapter", str(adapter), "--attacks", "pgd-1", "--limit", "20", "--use_cpu", "--no_signs"]
    found = {s: evaluate_command([*options, *([] if s is None else ["--strength", str(s)])]) for s in (None, 0.5, 0)}
    assert config_of(adapter) == before
    classifier = ZeroShotClassifier.from_pretrained(str(adapter))
    for strength, evaluation in found.items():
        classifier.strength = 1 if strength is None else strength
        data = measured(load_task("digits"), "test", 20)
        attack = known_attack(evaluation.attacks[0].attack)
        alone = evaluate(classifier, data, attack, signs=False, progress=False)
        assert (evaluation.clean, evaluation.robust) == (alone.clean, alone.robust)
        config = evaluation.configuration["model"]["adapter"]["config"]
        assert config["strength"] == classifier.strength
    names = {path.name for path in (adapter / "evaluations").glob("*.json")}
    assert len(names) == 3 and any("-strength0.5-" in name for name in names)
    for wrong, words in (
        (["--adapter", str(adapter), "--strength", "2"], "must be from 0"),
        (
            ["--adapter", str(adapter), "--strength", "1", "--update_card"],
            r"that the adapter is stored with: .* capt-peft strength \S+adapter --set 1\.0",
        ),
        (["--base", TINY_CLIP, "--strength", "1"], "--strength needs --adapter"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_command(wrong)


def test_training_chooses_on_the_validation_images(tuned, tmp_path, monkeypatch, capsys):
    def fewer(classifier, data, attack, **settings):
        assert len(data) == len(load_task("digits")["validation"])
        return strength_front(classifier, data.select(range(20)), attack, (0, 0.5, 1), **settings)

    monkeypatch.setattr("capt_peft.commands.train.strength_front", fewer)
    folder = tmp_path / "out"
    results = train([*QUICK, "--strength", "auto", "--keep_clean", "0.9", "--output_dir", str(folder)])
    front = StrengthFront.load(folder)
    assert front.images == "20 images of the validation split of digits" and front.keep_clean == 0.9
    chosen = front.choose(0.9).strength
    assert told(chosen) in capsys.readouterr().out.splitlines()[-1]
    assert results.strength == config_of(folder)["strength"] == chosen
    classifier = ZeroShotClassifier.from_pretrained(str(folder))
    attack, data = known_attack(results.evaluation.attack), measured(load_task("digits"), "test", 40)
    alone = evaluate(classifier, data, attack, seed=results.seed, signs=False, progress=False)
    assert (results.evaluation.after.clean, results.evaluation.after.robust) == (alone.clean, alone.robust)
    assert f"| strength | {chosen:g}, chosen on" in (folder / "README.md").read_text()
    assert (folder / "strength.png").is_file()
    # the prompts are those of the same run without it
    weights = [(each / "adapter_model.safetensors").read_bytes() for each in (folder, tuned)]
    assert weights[0] == weights[1]


def test_training_stores_a_given_strength_and_forgets_an_old_front(tmp_path, tuned, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "strength.json").write_text("{}")
    results = train([*QUICK, "--strength", "0.5", "--output_dir", str(folder)])
    assert results.strength == config_of(folder)["strength"] == 0.5
    assert not (folder / "strength.json").exists()
    assert capsys.readouterr().out.endswith(f"{told(0.5)}\n")
    assert (folder / "adapter_model.safetensors").read_bytes() == (tuned / "adapter_model.safetensors").read_bytes()
    assert "| strength | 0.5, set by hand" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "much"], "must be a number from 0 to 1, or 'auto'"),
        (["--strength", "2"], "strength=2.0 must be from 0"),
        (["--strength", "auto", "--keep_clean", "2"], "must be above 0 and at most 1"),
        (["--keep_clean", "0.9"], r"keep_clean=0\.9 has no effect without --strength auto"),
    ],
)
def test_a_strength_that_cannot_be_had_is_refused_before_training(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("capt_peft.commands.train.make_trainer", None)
    with pytest.raises(ValueError, match=words):
        train([*QUICK, *options, "--output_dir", str(tmp_path)])


def test_images_to_choose_on_are_needed(tmp_path, monkeypatch):
    digits = load_task("digits")
    splits = {name: split for name, split in digits.splits.items() if name != "validation"}
    monkeypatch.setattr(DataArguments, "load", lambda self: replace(digits, splits=splits))
    monkeypatch.setattr("capt_peft.commands.train.make_trainer", None)
    with pytest.raises(ValueError, match="digits has no validation split to choose a strength on; it has train, test"):
        train([*QUICK, "--strength", "auto", "--output_dir", str(tmp_path)])
