"""`capt-peft push`, against a Hub on loopback (`hub_server.py`)."""

import pytest
import yaml
from hub_client import Client, StepFailed
from hub_server import Hub, Repo

from capt_peft.results.hub import UPLOADED

TOKEN = "hf_" + "Secret" * 5


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: "someone"}) as server:
        yield server


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs a command in a process with a token, and returns what it printed."""
    folder = tmp_path_factory.mktemp("client")
    client = Client(folder / "log.txt", HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "home"), HF_TOKEN=TOKEN)
    yield lambda *words: client("command", *map(str, words))
    client.close()


def test_an_adapter_is_uploaded_with_its_card_and_figures_and_nothing_else(run, hub, adapter):
    told = run("push", adapter, "someone/tiny")
    files = hub.repos["someone/tiny"].files()
    assert {*files} == {*UPLOADED, ".gitattributes"} - {
        "strength.json",
        "evaluation.safetensors",
        "zero_shot.json",
    } and not hub.repos["someone/tiny"].private
    commit = hub.repos["someone/tiny"].branches["main"]
    assert told == f"Uploaded to {hub.endpoint}/someone/tiny/commit/{commit}\n"
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


def test_the_licence_that_the_card_was_given_is_uploaded(run, hub, adapter):
    run("card", adapter, "--license", "mit", "--tags", "x-ray")
    run("push", adapter, "someone/licensed")
    card = hub.repos["someone/licensed"].files()["README.md"].decode()
    data = yaml.safe_load(card.split("---")[1])
    assert data["license"] == "mit" and "x-ray" in data["tags"] and 'from_pretrained("someone/licensed")' in card


def test_a_persons_card_is_uploaded_as_it_is(run, hub, adapter):
    (adapter / "README.md").write_text("# My adapter\n\nFor lungs.\n")
    run("push", adapter, "someone/own-words")
    assert hub.repos["someone/own-words"].files()["README.md"] == b"# My adapter\n\nFor lungs.\n"


def test_private_makes_a_private_repository_and_refuses_a_public_one(run, hub, adapter):
    run("push", adapter, "someone/secret", "--private")
    assert hub.repos["someone/secret"].private
    hub.repos["someone/public"] = Repo()
    hub.repos["someone/public"].commit("main", {})
    with pytest.raises(StepFailed, match="exists already and is public"):
        run("push", adapter, "someone/public", "--private")
    assert hub.repos["someone/public"].files() == {}


def test_a_branch_is_made_and_the_main_one_stays(run, hub, adapter):
    run("push", adapter, "someone/branches", "--revision", "v1")
    assert "adapter_model.safetensors" in hub.repos["someone/branches"].files("v1")
    assert "adapter_model.safetensors" not in hub.repos["someone/branches"].files("main")


def test_what_cannot_be_uploaded_is_said_before_the_hub_is_asked(run, hub, adapter):
    before = len(hub.requests)
    with pytest.raises(StepFailed, match=r"Give the name that .* gets on the Hub"):
        run("push", adapter)
    with pytest.raises(StepFailed, match="a b"):
        run("push", adapter, "a b")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(StepFailed, match="is not the folder of a CAPT adapter"):
        run("push", adapter, "someone/none")
    assert len(hub.requests) == before
