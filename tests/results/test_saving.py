"""However an adapter is saved or shared, the README.md beside its weights is our card, and true."""

import contextlib
import json
import logging
import types
from pathlib import Path

import pytest
import torch
from helpers import TINY_CLIP, shake
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from records import run_record
from safetensors.torch import load_file
from transformers import AutoProcessor, CLIPModel

import capt_peft.results.hub as hub
from capt_peft import CaptConfig, CaptTrainer, CaptTrainingArguments, load_task, push_adapter
from capt_peft.evaluation import Accuracy
from capt_peft.results.card import MARK, is_replaceable, write_card
from capt_peft.results.hub import save_run
from capt_peft.results.run import RunResults
from capt_peft.tuner.fingerprint import adapter_fingerprint

WEIGHTS = "adapter_model.safetensors"
TEMPLATE = "a photo of the digit {}."


@pytest.fixture(scope="module")
def base():
    return CLIPModel.from_pretrained(TINY_CLIP)


@pytest.fixture
def model(base):
    adapted = get_peft_model(base, CaptConfig(template=TEMPLATE, class_names=["cat", "dog"]))
    shake(adapted)
    yield adapted
    adapted.unload()


@pytest.fixture(scope="module")
def task():
    return load_task("digits").few_shot(1, seed=0)


@pytest.fixture
def trainer(model, task, tmp_path):
    args = CaptTrainingArguments(
        str(tmp_path / "run"), use_cpu=True, max_steps=1, attack_steps=1, save_steps=1, save_strategy="steps",
        disable_tqdm=True, learning_rate=0.3, eval_attack="pgd-1",
    )  # fmt: skip
    return CaptTrainer(model, args, task=task, processor=AutoProcessor.from_pretrained(TINY_CLIP))


@pytest.fixture
def sent(monkeypatch):
    """What was sent to a Hub: files by name, and under "deleted" the names of those deleted."""
    files = {}

    class Api:
        def create_repo(self, repo_id, **_):
            return types.SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def file_exists(self, *_, **__):
            return True

        def create_commit(self, repo_id, operations, **_):
            files.clear()
            files["deleted"] = [o.path_in_repo for o in operations if not hasattr(o, "path_or_fileobj")]
            added = [o for o in operations if hasattr(o, "path_or_fileobj")]
            for operation in added:
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            return types.SimpleNamespace(repo_url=types.SimpleNamespace(repo_id=repo_id))

    monkeypatch.setattr(hub, "HfApi", Api)
    return files


@contextlib.contextmanager
def warnings_of(name):
    """The messages that a logger of the package warns with; transformers may have switched propagation off."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def is_ours(folder, figures=False):
    text = Path(folder, "README.md").read_text()
    local = str(Path(folder).parent) in text or TINY_CLIP in text
    return MARK in text and ("43.6 (" in text) == figures and ("**Not known.**" in text) != figures and not local


def put_results(folder, fingerprint):
    """Writes a record of a run into a folder."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "results.json").write_text(json.dumps(run_record(fingerprint, source="/home/me/digits")))


# ------------------------------------------------------------------------------------------------------------- saving


def test_every_way_to_save_writes_our_card(model, trainer, tmp_path):
    model.save_pretrained(str(tmp_path / "peft"))
    assert is_ours(tmp_path / "peft")
    model.save_pretrained(str(tmp_path / "peft"))  # PEFT adds to the card that is there
    assert is_ours(tmp_path / "peft") and "Framework versions" not in (tmp_path / "peft" / "README.md").read_text()
    loaded = CLIPModel.from_pretrained(str(tmp_path / "peft"))
    for _ in range(2):
        loaded.save_pretrained(str(tmp_path / "transformers"))
        assert is_ours(tmp_path / "transformers") and (tmp_path / "transformers" / WEIGHTS).exists()
    trainer.train()
    assert is_ours(tmp_path / "run" / "checkpoint-1")
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert is_ours(tmp_path / "run") and is_ours(tmp_path / "elsewhere")
    assert 'from_pretrained("elsewhere")' in (tmp_path / "elsewhere" / "README.md").read_text()
    put_results(tmp_path / "elsewhere", adapter_fingerprint(model))
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert is_ours(tmp_path / "elsewhere", figures=True)
    (tmp_path / "elsewhere" / "README.md").write_text("# Mine\n\nMy words.\n")
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "README.md").read_text() == "# Mine\n\nMy words.\n"


def test_adapters_with_names_have_their_own_cards_and_no_blank_one_lies_above(model, tmp_path):
    model.add_adapter("b", CaptConfig(template=TEMPLATE))
    model.save_pretrained(str(tmp_path / "both"))
    assert is_ours(tmp_path / "both") and is_ours(tmp_path / "both" / "b")
    cards = {(folder / "README.md").read_text() for folder in (tmp_path / "both", tmp_path / "both" / "b")}
    assert len(cards) == 2
    model.save_pretrained(str(tmp_path / "both"), selected_adapters=["b"])
    assert is_ours(tmp_path / "both") and (tmp_path / "both" / "README.md").read_text() in cards
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["b"])
    assert is_ours(tmp_path / "one" / "b") and not (tmp_path / "one" / "README.md").exists()


def test_the_cards_of_other_methods_stay_as_peft_writes_them(tmp_path):
    other = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), LoraConfig(target_modules=["q_proj"]))
    other.save_pretrained(str(tmp_path))
    assert "Framework versions" in (tmp_path / "README.md").read_text()


def test_a_card_that_a_person_wrote_is_kept_without_the_folder_that_peft_writes_into_it(model, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\n---\n\n# Mine\n\nWith words of my own.\n")
    model.save_pretrained(str(tmp_path))
    assert "With words of my own." in readme.read_text() and MARK not in readme.read_text()
    assert TINY_CLIP not in readme.read_text() and ModelCard.load(readme).data.license == "mit"
    write_card(tmp_path)  # asked for
    assert is_ours(tmp_path)


@pytest.mark.parametrize("words", [{}, {"model_description": "It is mine."}])
def test_only_a_template_that_nobody_filled_in_is_replaced(tmp_path, words):
    path = tmp_path / "README.md"
    ModelCard.from_template(ModelCardData(library_name="peft"), **words).save(path)
    assert is_replaceable(path) == (not words)


def test_figures_are_shown_beside_their_own_weights_only(model, tmp_path):
    put_results(tmp_path, adapter_fingerprint(model))
    model.save_pretrained(str(tmp_path))
    assert is_ours(tmp_path, figures=True) and "/home/me" not in (tmp_path / "README.md").read_text()
    shake(model, 2)
    with warnings_of("capt_peft.results.card") as warned:
        model.save_pretrained(str(tmp_path))
    assert is_ours(tmp_path) and "results.json has the figures of other weights" in (tmp_path / "README.md").read_text()
    assert "figures of other weights" in warned[0]
    for damaged in ("{", "{}", "[1]"):
        (tmp_path / "results.json").write_text(damaged)
        model.save_pretrained(str(tmp_path))
        assert is_ours(tmp_path) and "- results.json is " in (tmp_path / "README.md").read_text()


def test_transformers_saves_weights_after_the_card_so_that_it_shows_no_figures(model, tmp_path):
    model.save_pretrained(str(tmp_path / "a"))
    put_results(tmp_path / "a", adapter_fingerprint(model))
    write_card(tmp_path / "a")
    assert is_ours(tmp_path / "a", figures=True)
    CLIPModel.from_pretrained(str(tmp_path / "a")).save_pretrained(str(tmp_path / "a"))
    assert "was not compared with them" in (tmp_path / "a" / "README.md").read_text() and is_ours(tmp_path / "a")
    write_card(tmp_path / "a")
    assert is_ours(tmp_path / "a", figures=True)


# ------------------------------------------------------------------------------------------------------------ sharing


def test_what_the_quickstart_saves_is_pushed_with_our_card(model, sent, tmp_path):
    model.save_pretrained(str(tmp_path / "digits"))
    data = ["ylecun/mnist", "/home/me/x"]
    with warnings_of("capt_peft.results.hub") as warned:
        push_adapter(
            tmp_path / "digits",
            "tiny",
            license="mit",
            tags=["x"],
            language="en",
            dataset_name=data,
        )
    card = sent["README.md"].decode()
    assert 'from_pretrained("me/tiny")' in card and "/home/me" not in card and TINY_CLIP not in card
    data = ModelCard(card).data
    assert (data.license, data.language, data.datasets) == ("mit", ["en"], ["ylecun/mnist"]) and "x" in data.tags
    assert data.base_model is None
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "tiny_clip" and not warned
    assert set(sent) == {WEIGHTS, "adapter_config.json", "README.md", "deleted"}


def test_a_base_of_a_folder_that_others_do_not_have_is_warned_of(model, sent, tmp_path):
    model.peft_config["default"].base_model_name_or_path = "/home/me/clip"
    model.save_pretrained(str(tmp_path))
    with warnings_of("capt_peft.results.hub") as warned:
        push_adapter(tmp_path, "me/x")
    assert "others cannot load it from there" in warned[0]
    assert "/home/me" not in sent["README.md"].decode()


def test_a_folder_with_results_of_other_weights_is_not_pushed(model, sent, tmp_path):
    put_results(tmp_path, "0" * 16)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"results\.json has the figures of other weights"):
        push_adapter(tmp_path, "me/x")
    assert not sent
    put_results(tmp_path, None)
    push_adapter(tmp_path, "me/x")
    assert (
        sent["deleted"] == ["results.json", "evaluation.json", "evaluation.safetensors", "strength.json"]
        and "results.json" not in sent
    )
    put_results(tmp_path, adapter_fingerprint(model))
    push_adapter(tmp_path, "me/x")
    assert b"43.6 (" in sent["README.md"] and "results.json" in sent


def test_words_without_a_place_in_the_card_are_refused_by_name(model, trainer, sent):
    for push in (trainer.push_to_hub, trainer.create_model_card, lambda **k: push_adapter(model, "me/x", **k)):
        with pytest.raises(TypeError, match=r"datasets_name is unknown here: a card takes .*dataset_name"):
            push(datasets_name="x")
        with pytest.raises(TypeError, match="tags=3 must be a string or a list"):
            push(tags=3)
    assert not sent


@pytest.mark.parametrize("kind", ["peft", "transformers"])
def test_of_a_model_the_active_adapter_is_pushed_whatever_its_name(base, sent, tmp_path, kind):
    torch.manual_seed(0)
    config = {"template": TEMPLATE, "init": "random", "init_std": 0.5}
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CaptConfig(**config))
    model.add_adapter("b", CaptConfig(**config))
    model.set_adapter("b")
    expected = adapter_fingerprint(model)
    if kind == "transformers":
        model.save_pretrained(str(tmp_path / "saved"))
        model = CLIPModel.from_pretrained(TINY_CLIP)
        model.load_adapter(str(tmp_path / "saved"), adapter_name="a")
        model.load_adapter(str(tmp_path / "saved" / "b"), adapter_name="other")
        model.set_adapter("other")
    push_adapter(model, "me/x")
    assert write_and_hash(sent, tmp_path / "got") == expected


def write_and_hash(sent, folder):
    folder.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (folder / name).write_bytes(sent[name])
    return adapter_fingerprint(folder)


def test_a_model_without_an_adapter_is_refused(base, sent):
    with pytest.raises(ValueError, match="has no adapter to upload"):
        push_adapter(base, "me/x")


def test_the_trainer_pushes_as_every_script_of_trl_asks_it_to(trainer, model, sent, tmp_path):
    trainer.train()
    model.save_pretrained(str(tmp_path / "run"))
    put_results(tmp_path / "run", adapter_fingerprint(model))
    done = trainer.push_to_hub(
        "A message", False, dataset_name="ylecun/mnist", finetuned_from="openai/clip-vit-base-patch32"
    )
    assert done.result().repo_url.repo_id == "me/run"
    data = ModelCard(sent["README.md"].decode()).data
    assert data.base_model == "openai/clip-vit-base-patch32" and data.datasets == ["ylecun/mnist"]
    assert b"43.6 (" in sent["README.md"] and "results.json" in sent
    shake(model, 3)  # trained on: the results in the folder are of the weights before
    trainer.push_to_hub(tags="mine", tasks="image-classification", language="en")
    assert b"**Not known.**" in sent["README.md"] and "results.json" in sent["deleted"]
    assert write_and_hash(sent, tmp_path / "got") == adapter_fingerprint(model)
    model.save_pretrained(str(tmp_path / "run"))
    trainer.push_to_hub()  # the weights are those of the folder, but the results in it are not of them
    assert b"43.6 (" not in sent["README.md"] and "results.json" in sent["deleted"]


def test_the_trainers_card_is_ours_and_keeps_what_was_said_for_it(trainer, model, tmp_path):
    trainer.create_model_card(license="mit", tags=["mine"], dataset_name="ylecun/mnist", model_name="m")
    readme = tmp_path / "run" / "README.md"
    assert MARK in readme.read_text() and ModelCard.load(readme).data.license == "mit"
    trainer.save_model()
    assert ModelCard.load(readme).data.license == "mit"
    put_results(tmp_path / "run", adapter_fingerprint(model))
    trainer.create_model_card("en", "apache-2.0", dataset="ylecun/mnist")
    data = ModelCard.load(readme).data
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en"], ["ylecun/mnist"])
    assert is_ours(tmp_path / "run", figures=True)
    put_results(tmp_path / "run", "0" * 16)
    with pytest.raises(ValueError, match="figures of other weights"):
        trainer.create_model_card()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_uploads_while_training_are_refused_by_name(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}'"):
        CaptTrainingArguments(str(tmp_path), use_cpu=True, push_to_hub=True, hub_strategy=strategy)


# ------------------------------------------------------------------------------------------------------------ the record


def test_a_run_is_saved_as_documented_and_refused_once_the_weights_are_others(trainer, model, task, tmp_path):
    images = task["test"].select(range(6))
    with trainer.classifier.frozen():
        before = trainer.evaluate(images, metric_key_prefix="before")
    seconds = trainer.train().metrics["train_runtime"]
    after = trainer.evaluate(images, metric_key_prefix="after")
    results = RunResults.of(trainer, before, after, method="capt", split="test", seconds=seconds)
    save_run(model, results, tmp_path / "saved", "me/x")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| capt | clean |" in card and "10 training images" in card and 'from_pretrained("me/x")' in card
    assert results.fingerprint == adapter_fingerprint(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / WEIGHTS)
    shake(model, 4)
    with pytest.raises(ValueError, match="figures of other weights"):
        save_run(model, results, tmp_path / "saved", "me/x")
    assert all(torch.equal(weights[name], tensor) for name, tensor in load_file(tmp_path / "saved" / WEIGHTS).items())
    assert (tmp_path / "saved" / "README.md").read_text() == card
    trainer.state.global_step += 1
    with pytest.raises(ValueError, match="measured after step 1, but the model was trained to step 2"):
        RunResults.of(trainer, before, after, method="capt", split="test", seconds=seconds, shots=1)


def test_a_run_of_an_adapter_with_a_name_is_saved_flat(base, trainer, model, tmp_path):
    model.add_adapter("b", CaptConfig(template=TEMPLATE))
    model.set_adapter("b")
    half = dict(zip(("", "_low", "_high"), (0.5, *Accuracy(2, 4).interval), strict=True))
    share = {f"{kind}_accuracy{end}": value for kind in ("clean", "robust") for end, value in half.items()}
    before, after = (
        {f"{when}_{name}": value for name, value in {**share, "n": 4}.items()} for when in ("before", "after")
    )
    results = RunResults.of(trainer, before, after, method="capt", split="test", seconds=1.0, shots="all")
    save_run(model, results, tmp_path / "saved", "me/x")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        "README.md",
        "results.json",
    }
    assert "all images per class (10 in all)" in (tmp_path / "saved" / "README.md").read_text()
