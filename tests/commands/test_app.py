"""The page as users and strangers meet it: its functions, the running app's API, and the page in a real browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import TINY_CLIP
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import ThreatModel, ZeroShotClassifier, load_task, parse_attack
from capt_peft.clip.calibration import texts_digest
from capt_peft.commands.app.attack import (
    CAPT,
    CLIP,
    DECISIONS,
    DIGITS_TEMPLATE,
    Cancelled,
    Page,
    Refused,
    example_files,
)
from capt_peft.commands.app.defences import NO_DEFENCE, OFFERS
from capt_peft.commands.train import main as train
from capt_peft.defences import DEFENCES, Defended, Identity, parse_defence
from capt_peft.randomness import example_generator
from capt_peft.results.hub import update_config
from capt_peft.tuner.fingerprint import adapter_fingerprint, base_fingerprint

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
NAMES = ", ".join("0123456789")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    quick = ["--num_train_epochs", "15", "--eval_limit", "10", "--eval_attack", "pgd-2", "--save_strategy", "no"]
    train([*quick, "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(folder)])
    return str(folder)


@pytest.fixture(scope="module")
def page(adapter):
    return Page(adapter)


@pytest.fixture(scope="module")
def digits(page, tmp_path_factory):
    return [row[0] for row in example_files(str(tmp_path_factory.mktemp("digits")), page)]


@pytest.fixture(scope="module")
def withstood(page, digits):
    """A digit that CLIP loses to the attack and the adapter does not."""
    for digit, path in enumerate(digits):
        (clip, capt), _ = page.run(path, NAMES, DIGITS_TEMPLATE, 10, 20, str(digit))
        if capt.held and not clip.held and max(clip.clean, key=clip.clean.get) == str(digit):
            return digit
    pytest.fail("The adapter withstands no attack that CLIP falls to.")


# ------------------------------------------------------------------------------------------------------ functions


def test_each_model_is_attacked_itself_and_clip_alone_is_fooled(page, digits, withstood):
    outcomes, description = page.run(digits[withstood], NAMES, DIGITS_TEMPLATE, 10, 20, str(withstood))
    assert [o.name for o in outcomes] == [CLIP, CAPT]
    clip, capt = outcomes
    assert clip.sentence.startswith("is fooled") and capt.sentence.startswith("holds")
    assert "white box" in description and "PGD-20" in description and "L-inf 10/255" in description
    for o in outcomes:
        assert list(o.clean) == list(o.attacked) == list("0123456789")
        assert sum(o.clean.values()) == pytest.approx(1, abs=1e-5)
        image, attacked, noise = (np.asarray(p, dtype=int) for p in o.images)
        assert image.shape == (256, 256, 3)
        assert 0 < np.abs(attacked - image).max() <= 11  # 10 levels, and half a level of rounding on each side
        assert noise.min() < 64 and noise.max() > 191  # visible
    assert outcomes[0].images[1].tobytes() != outcomes[1].images[1].tobytes()


def test_scores_are_those_of_the_package(page, digits, adapter):
    (_, capt), _ = page.run(digits[3], NAMES, DIGITS_TEMPLATE, 4, 5, "3")
    classifier = ZeroShotClassifier.from_pretrained(adapter)
    pixels = classifier.transform.batch([digits[3]])
    attack = parse_attack("pgd-5", ThreatModel("linf", "4/255"))
    attacked = attack(classifier, pixels, torch.tensor([3]), [example_generator(0, 0, stream="evaluation")])
    with torch.no_grad():
        clean, after = classifier(pixels).softmax(-1)[0], classifier(attacked).softmax(-1)[0]
    assert list(capt.clean.values()) == pytest.approx(clean.tolist(), abs=1e-5)
    assert list(capt.attacked.values()) == pytest.approx(after.tolist(), abs=1e-3)


@pytest.mark.parametrize("defence", ["tte-10", "clipure"])
def test_a_defence_is_attacked_by_who_knows_it(page, digits, defence):
    (clip, _), description = page.run(digits[3], NAMES, DIGITS_TEMPLATE, 4, 5, "3", defence)
    classifier = ZeroShotClassifier(*page.models[CLIP], NAMES.split(", "), DIGITS_TEMPLATE)
    defended, pixels = Defended(classifier, parse_defence(defence)), classifier.transform.batch([digits[3]])
    attack, found = parse_attack("pgd-5", ThreatModel("linf", "4/255")), []
    for way in defended.defence.ways:
        generators = [example_generator(0, 0, stream="evaluation")]
        found.append(attack(defended.surface(way), pixels, torch.tensor([3]), generators))
    with torch.no_grad():
        clean, *attacked = (defended(each).softmax(-1)[0] for each in (pixels, *found))
    assert list(clip.clean.values()) == pytest.approx(clean.tolist(), abs=1e-5)
    shown = next((each for each in attacked if each.argmax() != 3), attacked[-1])
    assert list(clip.attacked.values()) == pytest.approx(shown.tolist(), abs=1e-3)
    label = OFFERS[defence].label
    assert f"white box, through the defence, {label}, which it knows" in description


def test_a_random_defence_shows_the_mean_of_several_answers(page, digits):
    torch.manual_seed(0)
    (clip, _), _ = page.run(digits[3], NAMES, DIGITS_TEMPLATE, 0, 1, "3", "noise-0.1")
    classifier = ZeroShotClassifier(*page.models[CLIP], NAMES.split(", "), DIGITS_TEMPLATE)
    pixels = classifier.transform.batch([digits[3]])
    torch.manual_seed(0)
    with torch.no_grad():
        answers = [classifier(pixels + 0.1 * torch.randn(pixels.shape)).softmax(-1)[0] for _ in range(DECISIONS)]
    assert list(clip.clean.values()) == pytest.approx((sum(answers) / DECISIONS).tolist(), abs=1e-5)
    assert sum(clip.attacked.values()) == pytest.approx(1, abs=1e-5)


def test_rtpt_without_words_to_tune_is_refused_with_a_sentence(digits):
    with pytest.raises(Refused, match="R-TPT tunes the words before the class name") as refusal:
        Page().run(digits[0], **{**GOOD, "defence": "rtpt-16", "template": "{} in a photo"})
    check_sentence(str(refusal.value))


def test_every_defence_has_its_sentence_and_its_name():
    for name, offer in OFFERS.items():
        assert offer.keeps.endswith(".") and (name == NO_DEFENCE or parse_defence(name).name == name)
    assert {type(parse_defence(name)) for name in OFFERS if name != NO_DEFENCE} == set(DEFENCES) - {Identity}


def test_a_calibrated_adapter_has_its_scores_and_says_none_of_these(page, digits, adapter):
    calibration = {
        "temperature": 0.5, "threshold": 1000.0, "false_rejection_rate": 0.05, "class_thresholds": [0.0] * 10,
        "false_positive_rate": 0.05, "images": 300, "task": "digits", "split": "validation", "class_names": list("0123456789"),
        "texts": texts_digest(ZeroShotClassifier(*page.models[CAPT], NAMES.split(", "), DIGITS_TEMPLATE)), "strength": 1.0,
        "fingerprint": adapter_fingerprint(adapter), "base": base_fingerprint(page.models[CAPT][0]), "precision": "float32",
    }  # fmt: skip
    model, _ = page.models[CAPT]
    (_, plain), _ = page.run(digits[3], NAMES, DIGITS_TEMPLATE, 10, 1, "3")
    for threshold, rejected in ((1000.0, (True, True)), (-1000.0, (False, False))):
        model.peft_config["default"].calibration = {**calibration, "threshold": threshold}
        try:
            (clip, capt), _ = page.run(digits[3], NAMES, DIGITS_TEMPLATE, 10, 1, "3")
            (_, other), _ = page.run(digits[3], "3, 4", DIGITS_TEMPLATE, 10, 1, "3")
        finally:
            model.peft_config["default"].calibration = None
        assert capt.rejected == rejected and clip.rejected == other.rejected == (False, False)
        assert ("answers “none of these” before any attack" in capt.sentence) == rejected[0]
        assert max(capt.clean.values()) > max(plain.clean.values()) and capt.held == (plain.held and not rejected[0])


def test_without_a_true_class_each_models_own_answer_counts(page, digits):
    outcomes, description = page.run(digits[8], NAMES, DIGITS_TEMPLATE, 0, 1)
    assert all(o.true_class == max(o.clean, key=o.clean.get) for o in outcomes)
    assert all(o.held for o in outcomes)  # epsilon 0 changes nothing
    assert "No true class was chosen" in description


def test_without_an_adapter_there_is_clip_alone(digits):
    (clip,), description = Page().run(digits[0], "cat\n dog \n", "a photo of a {}.", 255, 1, " dog ")
    assert clip.name == CLIP and list(clip.clean) == ["cat", "dog"] and clip.true_class == "dog"
    assert "1 step up" in description and "L-inf 1 " in description


def test_examples_and_epsilon_are_those_of_the_adapters_record(page, adapter, tmp_path):
    """Tuned on shapes, or on data that only a file has; without a record, and at another norm, the page is as for no adapter."""
    assert page.examples.name == "digits" and page.epsilon == 10

    def made(name, source=None, **threat):
        folder = shutil.copytree(adapter, tmp_path / name)
        shapes = load_task("shapes").class_names[:2]
        update_config(folder, class_names=[*shapes, "a dog, or so"], template="a drawing of a {}.")
        record = json.loads((folder / "results.json").read_text())
        record["adapter"]["fingerprint"] = adapter_fingerprint(folder)
        record["training"]["attack"]["threat_model"] |= threat
        record["task"]["source"] = source
        (folder / "results.json").write_text(json.dumps(record))
        return folder, Page(str(folder)), shapes

    _, one, names = made("tuned", "shapes", epsilon=4 / 255)
    assert one.epsilon == 4 and one.examples.name == "shapes"
    rows = example_files(str(tmp_path), one)
    assert [row[1:] for row in rows] == [["\n".join([*names, "a dog, or so"]), "a drawing of a {}.", n] for n in names]
    with Image.open(rows[1][0]) as picture:
        test = load_task("shapes")["test"]
        assert picture.tobytes() == test[test["label"].index(1)]["image"].tobytes()
    for source in ("digits", str(tmp_path), "someone/images"):  # other classes; a place here; a download
        _, other, _ = made(source.replace("/", "_"), source, norm="l2", epsilon=1.0)
        assert other.examples is None and other.epsilon == 10
        assert [row[1:] for row in example_files(str(tmp_path), other)] == [
            [NAMES, DIGITS_TEMPLATE, n] for n in "0123456789"
        ]
    folder, _, _ = made("forgotten", "shapes", epsilon=4 / 255)
    (folder / "results.json").unlink()
    bare = Page(str(folder))
    assert bare.examples is None and bare.epsilon == 10


def test_a_class_name_may_hold_a_comma(page, digits):
    (clip, _), _ = page.run(digits[0], "bee, honey\nbee, bumble", DIGITS_TEMPLATE, 1, 1)
    assert list(clip.clean) == ["bee, honey", "bee, bumble"]


def test_an_adapter_from_another_machine_finds_tiny_clip(page, adapter, tmp_path, digits):
    moved = move(adapter, tmp_path / "moved")
    here, _ = page.run(digits[0], NAMES, DIGITS_TEMPLATE, 4, 2)
    there, _ = Page(str(moved)).run(digits[0], NAMES, DIGITS_TEMPLATE, 4, 2)
    assert [o.attacked for o in here] == [o.attacked for o in there]


def move(adapter, folder):
    """Copies an adapter as if it had been tuned in a folder that is not here."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == TINY_CLIP
    config["base_model_name_or_path"] = "/somewhere/else/capt_peft/toy/tiny_clip"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


GOOD = {
    "class_names": "a, b",
    "template": "a photo of a {}.",
    "epsilon_levels": 10,
    "steps": 2,
    "true_class": None,
    "defence": "none",
}
LONG = {**GOOD, "steps": 200}
HOSTILE = {
    "no classes": ({"class_names": ",,"}, "2 to 100 class names are needed, got 0"),
    "one class": ({"class_names": "a,, "}, "got 1"),
    "101 classes": ({"class_names": ",".join(map(str, range(101)))}, "got 101"),
    "thousands of classes": ({"class_names": ",".join(map(str, range(5000)))}, "up to 100 class names"),
    "a novel": ({"class_names": "a" * 10_000_000}, "up to 100 class names"),
    "a list of classes": ({"class_names": ["a", "b"]}, "must be a text"),
    "a long name": ({"class_names": "a" * 101 + ", b"}, "has 101 characters"),
    "a name too long for the model": ({"class_names": "zq" * 50 + ", b"}, "tokens, but the model takes"),
    "the same twice": ({"class_names": "a, b, a "}, "“a” is there twice"),
    "half a character": ({"class_names": "a, \ud800"}, "cannot be shown"),
    "a control character": ({"class_names": "a\x00, b"}, "cannot be shown"),
    "no place for the name": ({"template": "a photo"}, "must hold {} once"),
    "an attribute in the template": ({"template": "a photo of {.__class__}"}, "must hold {} once"),
    "attributes beside it": ({"template": "a photo of {} {0.__class__}"}, "must hold {} once"),
    "a template of many words": ({"template": "a photo of a {}" + " x" * 200}, "up to 200 characters"),
    "a template that prompts would overwrite": ({"template": "{}"}, "Put more words before"),
    "no template": ({"template": None}, "must be one line"),
    "an unknown defence": ({"defence": "tte-9999"}, "The defence 'tte-9999' is not one of none, ttc"),
    "a list of defences": ({"defence": ["ttc"]}, "is not one of none, ttc"),
    "more passes than a request may take": (
        {"defence": "rtpt-16", "steps": 63},
        "16 times in a step: take up to 62 steps",
    ),
    "an unknown true class": ({"true_class": "c"}, "is not among the class names"),
    "a number as true class": ({"true_class": 10**400}, "is not among the class names"),
    "epsilon beyond 1": ({"epsilon_levels": 255.5}, "0 to 255 levels"),
    "a negative epsilon": ({"epsilon_levels": -1}, "got -1"),
    "epsilon nan": ({"epsilon_levels": float("nan")}, "got nan"),
    "an infinite epsilon": ({"epsilon_levels": float("inf")}, "got inf"),
    "a huge epsilon": ({"epsilon_levels": 10**400}, "got a huge number"),
    "a word as epsilon": ({"epsilon_levels": "much" * 99}, "got 'much"),
    "true as epsilon": ({"epsilon_levels": True}, "got True"),
    "no steps": ({"steps": 0}, "from 1 to 200, got 0"),
    "too many steps": ({"steps": 201}, "got 201"),
    "half a step": ({"steps": 2.5}, "got 2.5"),
    "infinitely many steps": ({"steps": float("inf")}, "got inf"),
    "nan steps": ({"steps": float("nan")}, "got nan"),
    "a list of steps": ({"steps": [1]}, "whole number of steps"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_values_are_refused_with_a_sentence(page, digits, case):
    change, words = HOSTILE[case]
    with pytest.raises(Refused, match=re.escape(words)) as refusal:
        page.run(digits[0], **{**GOOD, **change})
    check_sentence(str(refusal.value))


def check_sentence(message):
    assert message.endswith(".") and "Traceback" not in message and "\n" not in message and len(message) < 400


def png_that_claims(width, height):
    """A PNG of a few bytes whose header claims any size."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    data = b"IDAT" + zlib.compress(b"\x00" * 100)
    chunks = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


IMAGES = {
    "a bomb": (png_that_claims(60_000, 60_000), "too large"),
    "a large image": (png_that_claims(4097, 4096), "4097 x 4096 pixels; up to 4096"),
    "a thread": (png_that_claims(4096, 1), "one side may be 20 times"),
    "a hollow image": (png_that_claims(512, 512), "damaged or cut short"),
    "a text": (b"hello", "cannot be read as an image"),
    "nothing": (b"", "cannot be read as an image"),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as an image"),
    "eleven megabytes": (b"\x89PNG" + b"0" * 11_000_000, "11.0 MB"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_bad_images_are_refused_with_a_sentence(page, tmp_path, case):
    content, words = IMAGES[case]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(Refused, match=words) as refusal:
        page.run(str(path), **GOOD)
    check_sentence(str(refusal.value))


@pytest.mark.parametrize("image", [None, "/no/such/file.png", "/", 3, "\x00", b"png"])
def test_what_is_not_a_file_is_refused(page, image):
    with pytest.raises(Refused, match="There is no image"):
        page.run(image, **GOOD)


def test_every_cut_of_a_jpeg_is_shown_or_refused(page, tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    content = path.read_bytes()
    for end in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:end])
        with pytest.raises(Refused):
            page.run(str(path), **GOOD)


def test_an_attack_ends_when_it_is_cancelled(page, digits):
    asked = iter([False] * 5)
    with pytest.raises(Cancelled):
        page.run(digits[0], NAMES, DIGITS_TEMPLATE, 10, 200, "0", "none", lambda: next(asked, True))


def test_an_adapter_of_another_method_is_called_that(tmp_path, page):
    pytest.importorskip("gradio")
    from capt_peft.commands.app import page as pages

    lora = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    other = Page(str(tmp_path), base=str(TINY_CLIP))
    assert (other.called(CAPT), page.called(CAPT)) == ("Tiny CLIP + LoRA", "Tiny CLIP + CAPT")
    built = [pages.build(of, [], pages.Visitors()).config["components"] for of in (other, page)]
    values = [str(block["props"].get("value")) for of in built for block in of]
    texts = [value for value in values if "under attack" in value]
    assert ["CAPT" in text for text in texts] == [False, True] and "LoRA is a small adapter" in texts[0]


def test_an_adapter_is_not_shown_as_clip(adapter):
    with pytest.raises(ValueError, match="is an adapter"):
        Page(base=adapter)


def user(i, digits):
    """What user i of 20 asks for: an image, class names and settings that no other user has."""
    names = ", ".join(f"thing {i} {letter}" for letter in "abcdefghij"[: 2 + i % 9])
    return digits[i % 10], names, f"a photo of the {{}} number {i}.", 2 + i % 5, 2 + i % 3


def test_20_users_at_once_get_what_each_would_get_alone(page, digits):
    requests = [user(i, digits) for i in range(20)]
    alone = [page.run(*request)[0] for request in requests]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda request: page.run(*request)[0], requests))
    for a, b in zip(alone, together, strict=True):
        for one, other in zip(a, b, strict=True):
            assert (one.name, one.true_class) == (other.name, other.true_class)
            assert one.images[0].tobytes() == other.images[0].tobytes()
            assert other.clean == pytest.approx(one.clean, abs=1e-5)
            assert other.attacked == pytest.approx(one.attacked, abs=1e-2)


def test_requests_do_not_change_the_shared_tokenizer_under_each_other(page):
    def texts(i):
        names = [f"thing {i} {j}" for j in range(2 + 4 * i)]
        return [len(classifier.input_ids) for _, classifier in page._classifiers(names, [DIGITS_TEMPLATE], None)]

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(texts, 10 * list(range(20)))) == 10 * [2 * [2 + 4 * i] for i in range(20)]


# -------------------------------------------------------------------------------------------- the app, as a Space


@pytest.fixture(scope="module")
def app(adapter, tmp_path_factory):
    """The address of the app, started in a Space that was made as its README says."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'capt-peft[app]'")
    home = tmp_path_factory.mktemp("space")
    space, moved = home / "space", move(adapter, home / "adapter")
    (commands,) = re.findall(r"```bash\n(.*?)```", (SPACE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    environment = {**os.environ, "SPACE": str(space), "ADAPTER": str(moved), "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "-euc", commands], cwd=ROOT, env=environment, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"GRADIO_TEMP_DIR": str(home / "uploads"), "HF_HUB_OFFLINE": "1"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    log = home / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--host", "127.0.0.1", "--port", str(port)],
            cwd=space, env=environment, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "Running on local URL" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


class Api:
    """The app's API over plain HTTP, as anybody may call it."""

    def __init__(self, address):
        self.http = pytest.importorskip("httpx").Client(base_url=f"{address}/gradio_api", timeout=120, trust_env=False)

    def upload(self, path):
        (stored,) = self.http.post("/upload", files={"files": Path(path).read_bytes()}).json()
        return {"path": stored, "meta": {"_type": "gradio.FileData"}}

    def attack(self, *values, session=None):
        """Returns what the API answers: the event, and its data."""
        return self.listen(self.send(*values, session=session))

    def send(self, *values, session=None):
        """Sends a request, and returns its number; a session is who sends it."""
        # not json=..., which could not send half a character, nan or a number of 400 digits
        content = json.dumps({"data": values, "session_hash": session})
        request = self.http.post("/call/attack", content=content, headers={"content-type": "application/json"})
        assert request.status_code == 200, request.text
        return request.json()["event_id"]

    def listen(self, number):
        """Waits for the answer to a request."""
        text = self.http.get(f"/call/attack/{number}").text
        event, data = re.fullmatch(r"event: (\w+)\ndata: (.*)", text.strip()).groups()
        return event, json.loads(data)


@pytest.fixture
def api(app):
    return Api(app)


@pytest.mark.parametrize("case", HOSTILE)
def test_the_api_refuses_bad_values_with_a_sentence(api, digits, case):
    change, words = HOSTILE[case]
    event, data = api.attack(api.upload(digits[0]), *{**GOOD, **change}.values())
    assert event == "error" and words.replace("\x00", "") in data["error"]
    check_sentence(data["error"])


@pytest.mark.parametrize("case", [case for case in IMAGES if case != "eleven megabytes"])
def test_the_api_refuses_bad_images_with_a_sentence(api, tmp_path, case):
    content, words = IMAGES[case]
    (tmp_path / "image.png").write_bytes(content)
    event, data = api.attack(api.upload(tmp_path / "image.png"), *GOOD.values())
    assert event == "error" and words in data["error"]
    check_sentence(data["error"])


def test_large_files_are_not_even_stored(api):
    answer = api.http.post("/upload", files={"files": b"0" * 10_000_001})
    assert answer.status_code == 413 and "exceeded" in answer.text and "Traceback" not in answer.text


def test_the_api_opens_no_file_that_was_not_uploaded_and_no_address(api, digits):
    meta = {"meta": {"_type": "gradio.FileData"}}
    own = {"path": digits[0]}
    address = {"path": f"{api.http.base_url}/info", **meta}
    data_url = {"url": "data:image/png;base64,AAAA", **meta}
    stream = {**own, **meta, "is_stream": True}
    for image in (own, {**own, **meta}, stream, address, data_url, "a", 3, [digits[0]], {"path": 3}, {"path": "\x00"}):
        event, data = api.attack(image, *GOOD.values())
        assert event == "error", image
        check_sentence(data["error"])
        assert digits[0] not in data["error"]


def test_the_api_refuses_too_few_values_with_a_sentence(api):
    event, data = api.attack(None)
    assert event == "error"
    check_sentence(data["error"])


@pytest.mark.parametrize("whose", ["of one address", "of as many sessions"])
def test_requests_that_nobody_waits_for_do_not_hold_the_page(api, digits, whose):
    image, alone = api.upload(digits[0]), timed(api, digits)
    for i in range(30):
        api.send(image, *LONG.values(), session=f"ghost {i}" if "sessions" in whose else None)
    assert timed(api, digits) < alone + 8  # all of them would take a minute


def test_clients_that_listen_and_leave_do_not_hold_the_page(api, digits):
    image, alone = api.upload(digits[0]), timed(api, digits)
    for i in range(30):
        api.send(image, *LONG.values(), session=f"leaving {i}")
        with api.http.stream("GET", "/queue/data", params={"session_hash": f"leaving {i}"}) as stream:
            assert stream.is_success
    assert timed(api, digits) < alone + 8


def test_a_user_has_one_request_running_and_three_waiting_and_is_told_so_of_more(api, digits):
    image = api.upload(digits[0])
    for _ in range(6):
        api.send(image, *{**GOOD, "steps": 60}.values(), session="busy")
    with api.http.stream("GET", "/queue/data", params={"session_hash": "busy"}) as stream:
        messages = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
    answers = [message for message in messages if message["msg"] == "process_completed"]
    assert [answer["success"] for answer in answers] == [False] * 2 + [True] * 4  # the refused ones hear of it at once
    for answer in answers[:2]:
        check_sentence(answer["output"]["error"])
        assert "3 wait, which is the most" in answer["output"]["error"]


def timed(api, digits):
    start = time.monotonic()
    event, _ = api.attack(api.upload(digits[0]), *GOOD.values(), session="timed")
    assert event == "complete"
    return time.monotonic() - start


def test_20_users_of_the_api_at_once_get_their_own_results(app, api, page, digits):
    def ask(i):
        path, *settings = user(i, digits)
        mine = Api(app)
        return mine.attack(mine.upload(path), *settings, None, NO_DEFENCE, session=f"user {i}")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    for i, (event, data) in enumerate(answers):
        assert event == "complete"
        outcomes, description = page.run(*user(i, digits))
        assert data[0] == description
        for k, outcome in enumerate(outcomes):
            clean, attacked = data[5 + 6 * k], data[6 + 6 * k]
            assert clean["label"] == max(outcome.clean, key=outcome.clean.get)
            for shown, scores in ((clean, outcome.clean), (attacked, outcome.attacked)):
                for entry in shown["confidences"]:
                    assert entry["confidence"] == pytest.approx(scores[entry["label"]], abs=1e-2)


# ------------------------------------------------------------------------------------------------------ a browser


@pytest.fixture
def browser(app):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium from the system's packages: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        view = chromium.new_page(viewport={"width": 1200, "height": 800})
        view.set_default_timeout(60_000)
        view.strange = []
        view.on(
            "request", lambda r: view.strange.append(r.url) if not r.url.startswith((app, "data:", "blob:")) else None
        )
        view.on("pageerror", lambda error: view.strange.append(str(error)))
        view.on("dialog", lambda dialog: view.strange.append(dialog.message))
        view.goto(app)
        view.wait_for_selector("#examples img")
        yield view
        chromium.close()


def test_a_browser_shows_how_clip_is_fooled_and_the_adapter_holds(browser, withstood):
    browser.locator("#examples img").nth(withstood).click()
    browser.wait_for_selector("#upload img")
    browser.wait_for_function(f"document.querySelector('#true_class input').value == '{withstood}'")
    browser.click("#attack")
    assert browser.inner_text("#clip_verdict .fooled").startswith(f"Tiny CLIP is fooled: “{withstood}”")
    assert browser.inner_text("#capt_verdict .held").startswith(f"Tiny CLIP + CAPT holds: “{withstood}”")
    for model, before, after in (("clip", True, False), ("capt", True, True)):
        for part, right in (("before", before), ("after", after)):
            heading = browser.inner_text(f"#{model}_{part} h2").strip()
            assert (heading == str(withstood)) == right
        for part in ("image", "attacked", "noise"):
            assert browser.locator(f"#{model}_{part} img").evaluate("i => i.decode().then(() => i.naturalWidth)") >= 256
    assert "white box" in browser.inner_text("#description") and "L-inf 10/255" in browser.inner_text("#description")
    assert browser.strange == []


def test_a_browser_shows_names_as_they_were_written_and_errors_as_sentences(browser):
    name = "<img src=x onerror=alert(1)>"
    browser.locator("#examples img").nth(3).click()
    browser.wait_for_selector("#upload img")
    browser.fill("#names textarea", f"{name}, b")
    browser.wait_for_function("document.querySelector('#true_class input').value == ''")  # "3" is no class any more
    browser.click("#attack")
    browser.wait_for_selector("#capt_verdict div.held, #capt_verdict div.fooled")
    assert name in browser.inner_text("body")
    browser.fill("#names textarea", f"{name}, {name}")
    browser.click("#attack")
    toast = browser.wait_for_selector(".toast-body")
    assert f"“{name}” is there twice; class names must differ." in toast.inner_text()
    assert "Traceback" not in browser.inner_text("body")
    assert browser.strange == []


def test_a_browser_attacks_once_there_is_an_image_and_shows_an_error_once(browser, tmp_path):
    button = browser.locator("#attack")
    assert button.is_disabled()
    browser.locator("#examples img").nth(3).click()
    browser.wait_for_function("!document.querySelector('#attack').disabled")
    browser.fill("#names textarea", "alone")
    button.click()
    browser.wait_for_selector(".toast-body")
    browser.wait_for_timeout(500)
    assert browser.locator(".toast-body").count() == 1
    assert (
        not browser.locator(".wrap span.error").filter(visible=True).count()
    )  # Gradio's stamp, which would hide the image
    browser.click("#upload button[aria-label='Remove Image']")
    browser.wait_for_function("document.querySelector('#attack').disabled")


def start_long_attack(browser):
    """Returns the seconds that an attack took, and starts it again."""
    browser.locator("#examples img").nth(3).click()
    browser.locator("#steps input[type=number]").fill("200")
    browser.locator("#steps input[type=number]").press("Tab")
    browser.wait_for_function("!document.querySelector('#attack').disabled")
    start = time.monotonic()
    browser.click("#attack")
    browser.wait_for_selector("#capt_verdict div.held, #capt_verdict div.fooled")
    took = time.monotonic() - start
    browser.click("#attack")
    browser.wait_for_selector("#upload .wrap:has-text('steps')")
    return took


@pytest.mark.parametrize("how", ["by removing the image", "by choosing another"])
def test_a_browser_cancels_its_attack(browser, how):
    took, before = start_long_attack(browser), browser.inner_html("#clip_verdict")
    start = time.monotonic()
    if "removing" in how:
        browser.click("#upload button[aria-label='Remove Image']")
    else:
        browser.locator("#examples img").nth(4).click()
    browser.wait_for_selector("#upload .wrap:has-text('steps')", state="hidden")
    assert time.monotonic() - start < took / 2
    assert browser.inner_html("#clip_verdict") == before and not browser.locator(".toast-body").count()
    assert browser.locator("#attack").is_disabled() == ("removing" in how)


def test_a_browser_that_asks_again_gets_the_last_answer_alone(browser):
    start_long_attack(browser)
    browser.evaluate(
        """() => {
          window.events = new Set();
          const look = () => events.add(document.querySelector("#clip_verdict [data-event]")?.dataset.event);
          look();
          new MutationObserver(look).observe(document.body, { childList: true, subtree: true, attributes: true });
        }"""
    )
    browser.locator("#steps input[type=number]").fill("7")
    browser.locator("#steps input[type=number]").press("Tab")
    browser.click("#attack")
    browser.wait_for_selector("#description:has-text('PGD-7')")
    browser.wait_for_timeout(1000)
    assert browser.evaluate("events.size") == 2  # the first answer, and the last
    assert not browser.locator(".toast-body").count()


def test_a_browser_that_leaves_cancels_its_attack(browser, api, digits):
    start_long_attack(browser)
    for _ in range(3):
        browser.click("#attack")
    browser.wait_for_timeout(300)
    browser.goto("about:blank")
    assert timed(api, digits) < 15


def test_a_browser_refuses_a_broken_upload_with_a_sentence(browser, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(png_that_claims(512, 512))
    browser.set_input_files("#upload input[type=file]", broken)
    browser.wait_for_selector("#upload img")
    browser.click("#attack")
    toast = browser.wait_for_selector(".toast-body")
    assert "The image is damaged or cut short" in toast.inner_text()


@pytest.mark.parametrize("width, height", [(1366, 768), (390, 844)])
def test_image_button_and_results_can_be_seen_on_a_laptop_and_on_a_phone(browser, width, height):
    browser.set_viewport_size({"width": width, "height": height})
    browser.locator("#examples img").nth(3).click()
    browser.wait_for_function("!document.querySelector('#attack').disabled")
    image, button = (browser.locator(name).bounding_box() for name in ("#upload", "#attack"))
    assert image["y"] + image["height"] <= button["y"] and button["y"] + button["height"] <= height
    browser.evaluate("scrollTo(0, document.body.scrollHeight)")
    browser.click("#attack")  # which scrolls up to it
    browser.wait_for_selector("#capt_verdict div.held, #capt_verdict div.fooled")
    browser.wait_for_function("document.querySelector('#clip_verdict').getBoundingClientRect().top >= 0")
    browser.wait_for_function("document.querySelector('#clip_attacked').getBoundingClientRect().bottom <= innerHeight")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    for part in ("image", "attacked", "noise"):
        assert browser.locator(f"#clip_{part} img").bounding_box()["width"] >= 150


# ------------------------------------------------------------------------------------------------------ the Space


def test_the_space_installs_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    assert set(needed) <= set((SPACE / "requirements.txt").read_text().splitlines())


def test_the_front_matter_of_the_space_names_the_app_and_the_tested_gradio():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and len(front["short_description"]) <= 60
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text()
