"""Sharing adapters: pushed with every method, loaded by id with every loader, against a Hub that fails.

The client is the real one of huggingface_hub, in processes of its own (`hub_client.py`); the Hub is on loopback
(`hub_server.py`).
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import transformers
import yaml
from helpers import TINY_CLIP
from hub_client import Client, StepFailed
from hub_server import Hub, Repo
from packaging.version import Version

from capt_peft.results.hub import UPLOADED

TOKEN, STRANGER = "hf_" + "Secret" * 5, "hf_" + "Stranger" * 4
BASE, ADAPTER = "someone/tiny-clip", "someone/tiny-capt"
WEIGHTS = "adapter_model.safetensors"
SAVED_BY_PEFT = {WEIGHTS, "adapter_config.json", "README.md"}
# an older client ends with an error, keeps what came, and goes on from there in the next call
GOES_ON_AT_ONCE = Version(huggingface_hub.__version__) >= Version("1.20")
LOADERS = ["PeftModel", "AutoPeftModel", "CLIPModel", "ZeroShotClassifier", "pipeline"]


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: "someone", STRANGER: "stranger"}) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def process(hub, folder):
    client = Client(folder / "log.txt", HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "home"), HF_TOKEN=TOKEN)
    yield client
    client.close()


@pytest.fixture(scope="module")
def shared(process, hub, folder):
    """The base model and two adapters: one on the main branch, one on `v1` and in the folder `deep` of `nested`.

    The logits are those of the models that were pushed.
    """
    process("push_base", BASE)
    logits = {name: process("save_adapter", BASE, seed, str(folder / name)) for seed, name in enumerate("ab")}
    process("push_adapter", str(folder / "a"), ADAPTER)
    process("push_adapter", str(folder / "b"), ADAPTER, revision="v1")
    process("push_adapter", str(folder / "b"), "someone/nested")
    nested = hub.repos["someone/nested"]
    nested.commit("main", {f"deep/{path}": content for path, content in nested.files().items()})
    return logits


@pytest.fixture
def client(process, shared, hub, tmp_path):
    """The client with an empty cache and the token of its environment."""
    process("in_fresh_cache", str(tmp_path / "cache"))
    process("set_token", TOKEN)
    yield process
    assert not hub.failures, "An injected failure never happened."
    assert not hub.after


def load(client, loader, name, **arguments):
    base = {"base": TINY_CLIP} if loader == "PeftModel" else {}
    return client("load", loader, name, **base, **arguments)


def files(hub, name, revision="main"):
    return {path: content for path, content in hub.repos[name].files(revision).items() if path != ".gitattributes"}


# ---------------------------------------------------------------------------------------------------------- the round trip


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_loads_by_its_id_bit_for_bit(client, shared, loader):
    assert load(client, loader, ADAPTER) == shared["a"]
    assert shared["a"] != shared["b"]


def test_a_pipeline_and_our_classifier_agree_by_id(client):
    theirs, ours = client("predictions", ADAPTER)
    assert [entry["label"] for entry in theirs] == [entry["label"] for entry in ours]
    assert [entry["score"] for entry in theirs] == pytest.approx([entry["score"] for entry in ours], abs=1e-6)


@pytest.mark.parametrize("loader", ["PeftModel", "AutoPeftModel", "ZeroShotClassifier"])
def test_a_revision_is_that_of_the_adapter_and_not_of_the_base(client, shared, hub, loader):
    assert load(client, loader, ADAPTER, revision="v1") == shared["b"]
    assert load(client, loader, ADAPTER, revision=hub.repos[ADAPTER].branches["main"]) == shared["a"]


def test_transformers_loaders_take_the_adapters_place_as_adapter_kwargs(client, shared):
    """Given plainly, transformers 5.23 looks for the same revision and folder in the base's repository."""
    assert load(client, "CLIPModel", ADAPTER, adapter_kwargs={"revision": "v1"}) == shared["b"]
    assert load(client, "pipeline", ADAPTER, model_kwargs={"adapter_kwargs": {"revision": "v1"}}) == shared["b"]
    assert load(client, "CLIPModel", "someone/nested", adapter_kwargs={"subfolder": "deep"}) == shared["b"]
    with pytest.raises(StepFailed, match="v1 is not a valid git identifier") as caught:
        load(client, "CLIPModel", ADAPTER, revision="v1")
    assert BASE in caught.value.message


@pytest.mark.parametrize("loader", ["PeftModel", "ZeroShotClassifier"])
def test_an_adapter_may_live_in_a_subfolder(client, shared, loader):
    assert load(client, loader, "someone/nested", subfolder="deep") == shared["b"]


def test_an_adapter_comes_from_one_commit_even_if_another_is_pushed_meanwhile(client, shared, hub):
    repo = hub.repos[ADAPTER]
    before = repo.branches["main"]
    hub.after[f"GET|{ADAPTER}/resolve/.*/adapter_config.json"] = lambda: repo.commit("main", repo.files("v1"))
    assert load(client, "ZeroShotClassifier", ADAPTER) == shared["a"]
    assert load(client, "ZeroShotClassifier", ADAPTER) == shared["b"]
    repo.branches["main"] = before


def test_a_lora_adapter_brings_its_classes_and_loads_bit_for_bit_offline_too(client, hub, folder, tmp_path):
    client("in_fresh_cache", str(tmp_path / "home" / "hub"))
    name = "someone/lora"
    expected = client("push_lora", BASE, name)
    assert files(hub, name).keys() == {*SAVED_BY_PEFT, "zero_shot.json"}
    assert b"# LoRA adapter for" in files(hub, name)["README.md"] and b"license: mit" in files(hub, name)["README.md"]
    assert load(client, "ZeroShotClassifier", name) == expected
    assert load(client, "PeftModel", name) == expected  # as with plain PEFT
    assert client("classes", name) == ["one", "two", "three", "a picture of {}."]
    offline = Client(folder / "lora.txt", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    try:
        assert offline("classes", name) == ["one", "two", "three", "a picture of {}."]
        assert load(offline, "ZeroShotClassifier", name) == expected
    finally:
        offline.close()


def test_what_was_loaded_once_loads_offline(client, shared, hub, folder, tmp_path):
    client("in_fresh_cache", str(tmp_path / "home" / "hub"))
    load(client, "ZeroShotClassifier", ADAPTER)
    before = len(hub.requests)
    offline = Client(
        folder / "offline.txt", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1"
    )
    try:
        for loader in LOADERS:
            assert load(offline, loader, ADAPTER) == shared["a"]
        assert offline("load", "ZeroShotClassifier", BASE, class_names=["one", "two"]) != shared["a"]
        with pytest.raises(StepFailed) as caught:
            load(offline, "ZeroShotClassifier", "someone/nested")
        assert caught.value.kind == "OSError"
        assert "someone/nested can be read neither from the Hub nor from the cache" in caught.value.message
        assert "offline mode is enabled" in caught.value.text
    finally:
        offline.close()
    assert len(hub.requests) == before


# ---------------------------------------------------------------------------------------------------------------- pushing


def test_an_adapter_is_uploaded_in_one_commit_and_nothing_beside_it(client, hub, folder):
    client("push_adapter", str(folder / "a"), "someone/whole")
    assert set(files(hub, "someone/whole")) == {*UPLOADED} - {
        "strength.json",
        "evaluation.safetensors",
        "zero_shot.json",
    }  # nothing was chosen, and it is one of CAPT
    for name, content in files(hub, "someone/whole").items():
        if name == "README.md":
            assert b"| capt | robust | L-inf 4/255 | pgd-2 | 43.6 (" in content
            assert b'from_pretrained("someone/whole")' in content
        else:
            assert content == (folder / "a" / name).read_bytes()
    assert len(hub.repos["someone/whole"].commits) == 2  # the Hub's own first one, and ours


def test_an_embedded_base_goes_by_its_name_and_not_by_its_place(client, hub, tmp_path):
    logits = client("save_adapter", TINY_CLIP, 5, str(tmp_path / "local"))
    client("push_adapter", str(tmp_path / "local"), "someone/on-tiny")
    assert client("push_model", TINY_CLIP, 5, "someone/on-tiny-by-peft") == logits
    for name in ("someone/on-tiny", "someone/on-tiny-by-peft"):
        uploaded = files(hub, name)
        assert json.loads(uploaded["adapter_config.json"])["base_model_name_or_path"] == "tiny_clip"
        assert not any(TINY_CLIP.encode() in content for content in uploaded.values())
        assert client("load", "ZeroShotClassifier", name) == logits
    assert "others cannot load it" not in client.log.read_text()
    local = json.loads((tmp_path / "local" / "adapter_config.json").read_text())
    assert local["base_model_name_or_path"] == TINY_CLIP  # where transformers' own loader finds it


def test_pushing_again_sends_nothing_and_commits_nothing(client, hub, folder):
    before = dict(hub.repos[ADAPTER].branches)
    puts = len(hub.log("PUT"))
    assert client("push_adapter", str(folder / "a"), ADAPTER) == before["main"]
    assert hub.repos[ADAPTER].branches == before
    assert len(hub.log("PUT")) == puts


def test_results_of_other_weights_do_not_stay(client, hub, folder):
    client("push_adapter", str(folder / "a"), "someone/moving")
    logits = client("push_adapter_model", BASE, 7, "someone/moving")
    assert set(files(hub, "someone/moving")) == SAVED_BY_PEFT
    assert b"**Not known.**" in files(hub, "someone/moving")["README.md"]
    assert load(client, "ZeroShotClassifier", "someone/moving") == logits


def test_pefts_own_push_to_hub_works(client, hub):
    logits = client("push_model", BASE, 8, "someone/by-peft", private=True)
    assert set(files(hub, "someone/by-peft")) == SAVED_BY_PEFT
    assert hub.repos["someone/by-peft"].private
    card = files(hub, "someone/by-peft")["README.md"].decode()
    assert "**Not known.**" in card and 'from_pretrained("someone/by-peft")' in card
    client("push_model", BASE, 8, "someone/by-peft", tags=["mine"])
    assert b"- mine\n" in files(hub, "someone/by-peft")["README.md"]
    assert load(client, "ZeroShotClassifier", "someone/by-peft") == logits


def test_the_trainer_pushes_the_adapter_but_no_checkpoints_and_no_pickles(client, hub, tmp_path):
    client("set_token", None)  # the arguments have it
    logits = client("train", TINY_CLIP, str(tmp_path / "run"), "someone/trained", TOKEN)
    assert (tmp_path / "run" / "checkpoint-2" / "training_args.bin").exists()
    assert set(files(hub, "someone/trained")) == SAVED_BY_PEFT
    repo = hub.repos["someone/trained"]
    assert repo.private
    assert len(repo.commits) == 2
    client("set_token", TOKEN)
    assert load(client, "ZeroShotClassifier", "someone/trained") == logits
    card = files(hub, "someone/trained")["README.md"].decode()
    assert "**Not known.**" in card and 'from_pretrained("someone/trained")' in card and TINY_CLIP not in card


def test_the_script_pushes_its_adapter_with_our_card(client, hub, tmp_path):
    out = tmp_path / "out"
    client(
        "train_script", "--model_name_or_path", BASE, "--shots", "2", "--max_steps", "1", "--eval_limit", "10",
        "--eval_attack", "pgd-1", "--attack_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--use_cpu",
        "--disable_tqdm", "true", "--output_dir", str(out), "--push_to_hub", "true", "--hub_model_id", "someone/scripted",
        "--hub_token", TOKEN,
    )  # fmt: skip
    uploaded = files(hub, "someone/scripted")
    assert set(uploaded) == SAVED_BY_PEFT | {"results.json"}
    assert all(content == (out / name).read_bytes() for name, content in uploaded.items())
    assert not any(TOKEN.encode() in content for content in uploaded.values())
    card = uploaded["README.md"].decode()
    assert 'from_pretrained("someone/scripted")' in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == BASE
    assert json.loads(uploaded["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert "Uploaded to" in client.log.read_text()


def test_a_damaged_adapter_is_not_uploaded(client, hub, folder, tmp_path):
    before = len(hub.requests)
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (tmp_path / "damaged" / name).write_bytes((folder / "a" / name).read_bytes()[:-100])
    (tmp_path / "damaged" / "adapter_config.json").write_bytes((folder / "a" / "adapter_config.json").read_bytes())
    with pytest.raises(StepFailed, match="not a whole safetensors file"):
        client("push_adapter", str(tmp_path / "damaged"), ADAPTER)
    with pytest.raises(StepFailed, match="There is no adapter in"):
        client("push_adapter", str(tmp_path / "empty"), ADAPTER)
    assert len(hub.requests) == before


# ------------------------------------------------------------------------------------------------------------ permissions


def test_a_private_adapter_needs_the_token_of_the_environment(client, shared, hub, folder):
    client("push_adapter", str(folder / "a"), "someone/private", private=True)
    assert hub.repos["someone/private"].private
    for token, status in ((None, "401"), (STRANGER, "404")):
        client("set_token", token)
        for loader in LOADERS:
            with pytest.raises(StepFailed) as caught:
                load(client, loader, "someone/private")
            assert "someone/private" in caught.value.message
            assert status in caught.value.text
            assert "private" in caught.value.text  # "If you are trying to access a private or gated repo, ..."
    assert load(client, "ZeroShotClassifier", "someone/private", token=TOKEN) == shared["a"]
    client("set_token", TOKEN)
    for loader in LOADERS:
        assert load(client, loader, "someone/private") == shared["a"]


def test_a_bad_token_is_refused_with_the_hubs_reason(client, hub, folder):
    before = hub.repos[ADAPTER].branches["main"]
    client("set_token", "hf_" + "Wrong" * 6)
    for loader in LOADERS:
        with pytest.raises(StepFailed) as caught:
            load(client, loader, ADAPTER)
        assert "Invalid credentials" in caught.value.text
    with pytest.raises(StepFailed, match="401") as caught:
        client("push_adapter", str(folder / "b"), ADAPTER)
    assert "Invalid credentials" in caught.value.text
    assert "pushing it again is safe" in caught.value.text
    client("set_token", STRANGER)
    with pytest.raises(StepFailed, match="403"):
        client("push_adapter", str(folder / "b"), ADAPTER)
    assert hub.repos[ADAPTER].branches["main"] == before


def test_a_private_adapter_is_never_pushed_to_a_public_repository(client, hub, folder):
    before = hub.repos[ADAPTER].branches["main"]
    with pytest.raises(StepFailed, match="exists already and is public"):
        client("push_adapter", str(folder / "b"), ADAPTER, private=True)
    assert hub.repos[ADAPTER].branches["main"] == before


@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_not_there_is_named(client, loader):
    with pytest.raises(StepFailed) as caught:
        load(client, loader, "someone/nothing")
    assert "someone/nothing" in caught.value.message
    with pytest.raises(StepFailed) as caught:
        load(client, loader, ADAPTER, revision="v9")
    assert ADAPTER in caught.value.message
    assert "v9" in caught.value.text


def test_a_base_that_is_not_there_is_named(client, hub):
    repo = hub.repos["someone/orphan"] = Repo()
    config = files(hub, ADAPTER)["adapter_config.json"].replace(BASE.encode(), b"someone/gone")
    repo.commit("main", {**files(hub, ADAPTER), "adapter_config.json": config})
    for loader in ("AutoPeftModel", "CLIPModel", "ZeroShotClassifier", "pipeline"):
        with pytest.raises(StepFailed, match="someone/gone"):
            load(client, loader, "someone/orphan")


# --------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("loader", LOADERS)
def test_a_lookup_that_fails_once_is_tried_again(client, shared, hub, loader):
    hub.fail("HEAD", f"{ADAPTER}/resolve/.*/{WEIGHTS}", status=500)
    assert load(client, loader, ADAPTER) == shared["a"]


def test_an_adapter_is_never_taken_for_a_bare_model_because_the_hub_failed(client, shared, hub):
    hub.repos["someone/both"] = Repo()
    hub.repos["someone/both"].commit("main", {**files(hub, BASE), **files(hub, ADAPTER)})
    reads = 1 if hasattr(transformers.utils.hub, "resolve_revision") else 2  # an older one: the commit, then the file
    hub.fail("GET", "someone/both/resolve/.*/adapter_config.json", status=500, times=reads)
    with pytest.raises(StepFailed, match=r"can be read neither from the Hub nor from the cache: .*500") as caught:
        load(client, "ZeroShotClassifier", "someone/both")
    assert caught.value.kind == "OSError"
    assert load(client, "ZeroShotClassifier", "someone/both") == shared["a"]


def load_cut(client):
    """Loads an adapter whose download is cut."""
    if not GOES_ON_AT_ONCE:
        with suppress(StepFailed):
            load(client, "PeftModel", ADAPTER)
    return load(client, "PeftModel", ADAPTER)


@pytest.mark.parametrize("path", ["adapter_config.json", "/storage/"])
def test_a_download_that_is_cut_starts_again(client, shared, hub, path):
    hub.fail("GET", path, cut=300)
    assert load_cut(client) == shared["a"]


def test_a_download_that_is_cut_goes_on_where_it_stopped(client, shared, hub):
    client("in_chunks", 1000)
    hub.fail("GET", "/storage/", cut=5500)
    assert load_cut(client) == shared["a"]
    client("in_chunks", 10 * 2**20)
    assert hub.log("GET", "/storage/")[-1].range == "bytes=5000-"


@pytest.mark.parametrize("loader", LOADERS[:-1])
def test_nothing_of_a_broken_download_is_kept(client, shared, hub, tmp_path, loader):
    hub.fail("GET", f"/storage/{weights_oid(hub)}", cut=5000, reset=True)
    with pytest.raises(StepFailed):
        load(client, loader, ADAPTER)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and "capt" in str(path)]
    assert not [path for path in kept if path.name == WEIGHTS]
    assert not [path for path in kept if path.name.endswith(".incomplete")] or not GOES_ON_AT_ONCE
    assert load(client, loader, ADAPTER) == shared["a"]


def test_a_pipeline_tries_a_broken_download_again_and_loads_the_whole_adapter(client, shared, hub):
    hub.fail("GET", f"/storage/{weights_oid(hub)}", cut=5000, reset=True)
    assert load(client, "pipeline", ADAPTER) == shared["a"]


def weights_oid(hub):
    return hashlib.sha256(files(hub, ADAPTER)[WEIGHTS]).hexdigest()


def test_an_upload_that_fails_on_the_way_is_tried_again(client, hub, folder):
    name = "someone/tried-again"
    hub.storage.clear()
    hub.fail("POST", f"{name}/preupload", status=500)
    hub.fail("POST", f"{name}.git/info/lfs", status=503)
    hub.fail("PUT", "/storage/", cut=2000, reset=True)
    client("push_adapter", str(folder / "b"), name)
    assert set(files(hub, name)) == {*UPLOADED} - {"strength.json", "evaluation.safetensors", "zero_shot.json"}
    assert [r.status for r in hub.log("PUT")][-2:] == [0, 200]


@pytest.mark.parametrize(
    ("step", "failure"),
    [
        ("/api/repos/create", {"status": 500}),
        ("/api/validate-yaml", {"status": 502, "body": "<html>Bad gateway</html>"}),
        (f"{ADAPTER}/commit", {"status": 500}),
        (f"{ADAPTER}/commit", {"cut": 100}),
        (f"{ADAPTER}/commit", {"cut": 100, "reset": True}),
    ],
)
def test_an_upload_that_fails_leaves_the_old_adapter(client, shared, hub, folder, step, failure):
    before = hub.repos[ADAPTER].branches["main"]
    hub.fail("POST", step, **failure)
    with pytest.raises(StepFailed) as caught:
        client("push_adapter", str(folder / "b"), ADAPTER)
    assert f"The upload to {ADAPTER} failed" in caught.value.text
    assert hub.repos[ADAPTER].branches["main"] == before
    client("push_adapter", str(folder / "b"), ADAPTER)
    assert load(client, "ZeroShotClassifier", ADAPTER) == shared["b"]
    hub.repos[ADAPTER].branches["main"] = before


# ------------------------------------------------------------------------------------------------------------ the token


def test_the_token_goes_to_the_hub_alone_and_into_no_log(client, hub, folder):
    """All tests of this file write to this log, at the level DEBUG and with every request."""
    client("push_adapter", str(folder / "a"), "someone/logged")
    load(client, "ZeroShotClassifier", "someone/logged")
    log = client.log.read_text()
    assert "authenticated: True" in log
    assert "<TOKEN>" in log
    for token in (TOKEN, STRANGER):
        assert token not in log
        assert not [r.path for r in hub.requests if token in r.path]
    assert not [r for r in hub.requests if "/storage/" in r.path and r.authorized]
    written = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
