"""Backbones by name: the registry, and models of each layout that are fetched, held to their first hash, and converted."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY_CLIP
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from openai_clip import SMALL, assert_same_model, fine_tuned, openai_state_dict, vision_alone
from transformers import CLIPModel

import capt_peft
from capt_peft import ZeroShotClassifier, load_backbone
from capt_peft.backbones import BACKBONES, registry, store
from capt_peft.backbones.registry import LAYOUTS, read_registry, table
from capt_peft.clip.loading import load_model
from capt_peft.commands.backbones import main
from capt_peft.commands.places import check_places
from capt_peft.tuner.loading import load_pretrained
from capt_peft.utils.embedded import embedded_name, is_model_name, model_path, published_names, recorded_path


class FakeHub:
    """Repositories as folders; counts what is fetched, and goes offline on demand."""

    def __init__(self, root):
        self.root, self.fetched, self.offline = root, [], False

    def file(self, repo, name):
        if self.offline:
            raise LocalEntryNotFoundError("we cannot find the requested files in the local cache")
        path = self.root / repo / name
        if not path.is_file():
            raise EntryNotFoundError(f"404: {name}")
        self.fetched.append(name)
        return str(path)

    def snapshot(self, repo, allow_patterns):
        if self.offline:
            raise LocalEntryNotFoundError("we cannot find the requested files in the local cache")
        self.fetched += [repo]
        return str(self.root / repo)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(store, "hf_hub_download", fake.file)
    monkeypatch.setattr(store, "snapshot_download", fake.snapshot)
    monkeypatch.setattr(store.constants, "HF_HOME", str(tmp_path / "home"))
    return fake


@pytest.fixture
def known(base, monkeypatch):
    """Entries of the registry that go with the small base and tiny CLIP's tokenizer, by their layout."""

    def changed(name, **values):
        entry = dataclasses.replace(BACKBONES[name], processor=TINY_CLIP, **values)
        monkeypatch.setitem(store.BACKBONES, name, entry)
        return name

    return {
        "transformers": changed("leaf-vit-l14"),
        "open_clip": changed("fare4-vit-b32-laion2b"),
        "tecoa": changed("qtaft4-vit-b16", base=base),
        "image tower": changed("simclip4-vit-l14", base=base),
        "by hand": changed("tecoa-vit-b32", base=base),
    }


def publish(hub, name, tensors, layout):
    """Puts made-up weights where an entry says that its own lie, in its layout."""
    entry = store.BACKBONES[name]
    folder = hub.root / entry.where
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "open_clip":
        config = {"model_cfg": {"embed_dim": 48, "vision_cfg": {"width": 128}, "text_cfg": {"width": 64, "heads": 1}}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))  # without quick_gelu: it has gelu
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")  # the second name that is tried
    elif layout == "tecoa":
        entries = {"epoch": 3, "state_dict": {}, "add_prompter": {}, "optimizer": {"lr": 1e-4}, "best_acc1": 61.0}
        torch.save({**entries, "vision_encoder_state_dict": vision_alone(tensors)}, folder / entry.files[0])
    elif layout == "image tower":
        torch.save(vision_alone(tensors), folder / entry.files[0])
    return folder


def forget(name):
    """Removes the converted model, and leaves the record of its first use."""
    shutil.rmtree(store.cache_folder() / name)


# ------------------------------------------------------------------------------------------------------ the registry


def test_every_entry_says_all_that_is_needed_and_marks_what_is_not_verified():
    assert tuple(BACKBONES) == published_names() and len(BACKBONES) > 25
    assert {entry.layout for entry in BACKBONES.values()} == {*LAYOUTS}
    rows = table()
    for name, entry in BACKBONES.items():
        assert entry.name == name and entry.sources and all(source.startswith("https://") for source in entry.sources)
        assert name in rows and entry.activation in ("quick_gelu", "gelu")
        numerator, denominator = map(int, entry.epsilon.split("/"))
        assert denominator == 255 and numerator in (1, 2, 4)
        assert all(0 < value < 100 for value in entry.reported.values()) and bool(entry.reported) == bool(
            entry.reported_on
        )
        for field in entry.unverified:
            assert "(?)" in (entry.results if field == "reported" else entry.say(field)) or field == "files"
    assert BACKBONES["fare4-vit-l14"].reported == {"clean": 61.1, "2/255": 45.9, "4/255": 32.4}
    assert {entry.method.split(",")[0] for entry in BACKBONES.values()} >= {
        "FARE", "TeCoA", "LEAF on FARE", "QT-AFT", "Sim-CLIP", "Delta-CLIP", "AdvFLYP", "TGA-ZSR", "Comp-TGA",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "magic"}, "layout='magic'"),
        ({"base": None}, "base=None"),
        ({"colour": "red"}, "colour"),
        ({"unverified": ["colour"]}, "colour"),
        ({"method": ...}, "method"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_with_its_name(change, words, tmp_path):
    content = yaml.safe_load(registry.REGISTRY.read_text())["tecoa-vit-b32"] | change
    path = tmp_path / "registry.yaml"
    path.write_text(yaml.safe_dump({"mine": {key: value for key, value in content.items() if value is not ...}}))
    with pytest.raises(ValueError, match="mine") as caught:
        read_registry(path)
    assert words in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- loading


def test_a_tower_of_tecoas_layout_is_fetched_once_and_converted_exactly(hub, known, state):
    name, tuned = known["tecoa"], fine_tuned(state)
    publish(hub, name, tuned, "tecoa")
    model, processor = load_backbone(name)
    assert_same_model(model, tuned, SMALL, text_state=state)
    assert not model.training and processor.tokenizer is not None
    assert hub.fetched == [BACKBONES[name].files[0]]
    hub.offline = True
    again, _ = load_backbone(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_two_processes_may_convert_a_backbone_at_once(hub, known, state, monkeypatch):
    name, tuned, replace = known["tecoa"], fine_tuned(state), os.replace
    publish(hub, name, tuned, "tecoa")

    def second(made, folder):
        if Path(made).is_dir():
            shutil.copytree(made, folder)  # the first one's
        replace(made, folder)

    monkeypatch.setattr(store.os, "replace", second)
    assert_same_model(load_backbone(name)[0], tuned, SMALL, text_state=state)
    assert [path.name for path in store.cache_folder().iterdir() if path.is_dir()] == [name]


def test_robustvlms_layout_is_converted_exactly(hub, known, state):
    name, tuned = known["image tower"], fine_tuned(state)
    publish(hub, name, tuned, "image tower")
    assert_same_model(load_backbone(name)[0], tuned, SMALL, text_state=state)


def test_open_clips_layout_has_the_activation_that_its_configuration_says(hub, known, state):
    name = known["open_clip"]
    publish(hub, name, state, "open_clip")
    assert_same_model(load_backbone(name)[0], state, SMALL, activation=torch.nn.functional.gelu)
    assert hub.fetched == ["open_clip_config.json", "open_clip_pytorch_model.bin"]


def test_another_model_than_clip_is_refused_before_its_weights_are_fetched(hub, known, state):
    name = known["open_clip"]
    folder = publish(hub, name, state, "open_clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"no_causal_mask": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no_causal_mask=True makes this another model"):
        load_backbone(name)
    assert hub.fetched == ["open_clip_config.json"]


@pytest.mark.parametrize("shards", ["10GB", "300KB"])
def test_transformers_own_layout_gets_the_processor_that_its_card_names(hub, known, base, shards):
    name = known["transformers"]
    folder = hub.root / store.BACKBONES[name].where
    CLIPModel.from_pretrained(base).save_pretrained(folder, max_shard_size=shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) is (shards == "300KB")
    model, processor = load_backbone(name)
    theirs = CLIPModel.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    assert processor(text=["a star"], return_tensors="pt")["input_ids"].shape[0] == 1


def test_what_is_not_on_the_hub_says_where_it_lies_and_is_taken_from_its_file(hub, known, state, tmp_path):
    name, tuned = known["by hand"], fine_tuned(state)
    with pytest.raises(
        OSError, match=r"not on the Hub: get its file from https://cv\.cs\.columbia\.edu/.*--checkpoint FILE"
    ):
        load_backbone(name)
    torch.save({"vision_encoder_state_dict": vision_alone(tuned)}, tmp_path / "TeCoAmodel_best.pth.tar")
    model, _ = load_backbone(name, checkpoint=tmp_path / "TeCoAmodel_best.pth.tar")
    assert_same_model(model, tuned, SMALL, text_state=state)
    assert_same_model(load_backbone(name)[0], tuned, SMALL, text_state=state)
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pt does not exist"):
        load_backbone(name, checkpoint=tmp_path / "elsewhere.pt")


def test_without_a_network_it_is_said_what_would_be_fetched_from_where(hub, known, state):
    hub.offline = True
    for layout, words in (
        ("tecoa", "CLIP-ViT-B-16_QTAFT_eps4.pt of https://huggingface.co/futakw/clip-qt-aft, the text tower of"),
        (
            "open_clip",
            "open_clip_model.safetensors or open_clip_pytorch_model.bin of https://huggingface.co/chs20/FARE4-",
        ),
        ("transformers", "model.safetensors of https://huggingface.co/LEAF-CLIP/CLIP-ViT-L-rho50"),
    ):
        with pytest.raises(OSError, match="cannot be fetched") as caught:
            load_backbone(known[layout])
        assert words in str(caught.value) and "with a network" in str(caught.value)
    assert not store.cache_folder().exists()


def test_a_missing_base_is_named_beside_the_file_that_is_there(hub, known, state, monkeypatch):
    name = known["tecoa"]
    entry = dataclasses.replace(store.BACKBONES[name], base="someone/no-such-clip")
    monkeypatch.setitem(store.BACKBONES, name, entry)
    publish(hub, name, fine_tuned(state), "tecoa")
    with pytest.raises(OSError, match="needs the text tower of someone/no-such-clip"):
        load_backbone(name)
    assert not (store.cache_folder() / name).exists() and not (store.cache_folder() / f"{name}.json").exists()


# ---------------------------------------------------------------------------------------- the hash of the first use


def test_the_hash_of_the_first_use_is_recorded_and_another_file_is_refused(hub, known, state, tmp_path):
    name, tuned = known["tecoa"], fine_tuned(state)
    file = publish(hub, name, tuned, "tecoa") / BACKBONES[name].files[0]
    load_backbone(name)
    record = json.loads((store.cache_folder() / f"{name}.json").read_text())
    assert record["sha256"] == store.sha256_of(file) and record["file"] == file.name
    assert json.loads((store.cache_folder() / name / "backbone.json").read_text())["sha256"] == record["sha256"]
    forget(name)
    load_backbone(name)  # fetched again: the same file
    publish(hub, name, openai_state_dict(SMALL, seed=3), "tecoa")  # what the Hub has is another one now
    load_backbone(name)  # the converted one is at hand and is the first
    with pytest.raises(ValueError, match="is another qtaft4-vit-b16 than at first use"):
        load_backbone(name, checkpoint=file)
    forget(name)
    with pytest.raises(ValueError, match=f"SHA-256 is {store.sha256_of(file)}, that of the first {record['sha256']}"):
        load_backbone(name)
    assert not (store.cache_folder() / name).exists()


def test_a_converted_folder_of_another_file_is_refused_too(hub, known, state):
    name = known["tecoa"]
    publish(hub, name, fine_tuned(state), "tecoa")
    load_backbone(name)
    path = store.cache_folder() / name / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="than at first use"):
        load_backbone(name)


# ----------------------------------------------------------------------------------------------- wherever a model is named


def test_the_name_stands_wherever_a_model_is_named(hub, known, state, tmp_path):
    name, tuned = known["tecoa"], fine_tuned(state)
    publish(hub, name, tuned, "tecoa")
    model, _ = load_model(name)
    folder = str(store.cache_folder() / name)
    assert model.config._name_or_path == folder == model_path(name)
    assert embedded_name(folder) == embedded_name(name) == name
    assert recorded_path(f"/somewhere/else/capt_peft/backbones/{name}") == folder
    assert embedded_name(f"/somewhere/backbones/{name}") is None  # a folder that a user named so
    assert ZeroShotClassifier.from_pretrained(name, class_names=("a", "b"))(torch.rand(1, 3, 32, 32)).shape == (1, 2)
    check_places({"model_name_or_path": name, "teacher": "fare4-vit-l14"})
    assert load_pretrained(CLIPModel, name).config.projection_dim == 48


def test_an_adapter_on_a_named_backbone_finds_it_on_another_machine(hub, known, state, tmp_path, monkeypatch):
    from peft import get_peft_model

    name = known["tecoa"]
    publish(hub, name, fine_tuned(state), "tecoa")
    base_model, _ = load_backbone(name)
    config = capt_peft.CaptConfig(class_names=["one", "two"], text_depth=1, vision_depth=1, num_text_tokens=1)
    get_peft_model(base_model, config).save_pretrained(tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(store.cache_folder() / name)
    monkeypatch.setattr(store.constants, "HF_HOME", str(tmp_path / "another home"))
    Path(recorded).rename(tmp_path / "gone")
    found, _ = load_model(str(tmp_path / "adapter"))
    assert found.get_base_model().config._name_or_path == str(store.cache_folder() / name)


def test_a_folder_of_that_name_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fare4-vit-l14").mkdir()
    assert model_path("fare4-vit-l14") == "fare4-vit-l14"
    assert is_model_name("fare4-vit-l14") and not is_model_name("chs20/fare4-vit-l14") and not is_model_name("fare5")


def test_an_unknown_name_is_told_with_those_that_are_like_it():
    with pytest.raises(ValueError, match=r"Unknown backbone 'fare4-vitl14'\. Did you mean fare4-vit-l14"):
        load_backbone("fare4-vitl14")


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_lists_all_shows_one_and_converts_a_file(hub, known, state, tmp_path, capsys):
    main([])
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in BACKBONES) and "(?): not verified" in out
    name = known["by hand"]
    main(["--name", name])
    out = capsys.readouterr().out
    assert (
        "epsilon      1/255 (?)" in out and "TeCoAmodel_best.pth.tar" in out and "unverified   epsilon, reported" in out
    )
    torch.save({"vision_encoder_state_dict": vision_alone(fine_tuned(state))}, tmp_path / "tecoa.pt")
    main(["--name", name, "--checkpoint", str(tmp_path / "tecoa.pt")])
    assert f"Converted into {store.cache_folder() / name}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no effect without the name"):
        main(["--checkpoint", str(tmp_path / "tecoa.pt")])
