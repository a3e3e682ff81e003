"""Recall@k of image-text retrieval: its counts by hand, its attacks, its files."""

import json

import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from transformers import CLIPModel

from capt_peft import CaptConfig, ThreatModel, ZeroShotClassifier
from capt_peft.attacks import PGD, parse_attack
from capt_peft.data import CaptionedImages, load_captions
from capt_peft.evaluation import retrieval
from capt_peft.evaluation.retrieval import QueryAttack, evaluate_retrieval, parse_query_attack
from capt_peft.results.accuracy import wilson_interval
from capt_peft.results.retrieval import DIRECTIONS, Recall, Retrieval, retrieval_table
from capt_peft.utils.files import DamagedFileError

THREAT = ThreatModel("linf", "4/255")
ATTACKS = [parse_query_attack(name, THREAT) for name in ("feature-pgd-3", "caption-pgd-3", "contrast-pgd-3")]


@pytest.fixture(scope="module")
def classifier(processor):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    return ZeroShotClassifier(base.eval(), processor, ("image", "text"))


@pytest.fixture(scope="module")
def data():
    return load_captions("captions", split="validation").select(range(60))


@pytest.fixture(scope="module")
def measured(classifier, data):
    return evaluate_retrieval(classifier, data, ATTACKS, progress=False)


def counts(row, direction):
    return [recall.found for recall in getattr(row, direction)]


def by_hand(images, texts, owners, attacked=None):
    """Ranks by loops: of each image's best caption, and of each caption's image; `attacked` features stand in one at a time."""
    attacked = images if attacked is None else attacked
    of_images, of_texts = [], []
    for i, feature in enumerate(attacked):
        scores = [float(feature @ text) for text in texts]
        best = max(score for score, owner in zip(scores, owners, strict=True) if owner == i)
        of_images.append(1 + sum(s >= best - 1e-6 for s, owner in zip(scores, owners, strict=True) if owner != i))
    for text, owner in zip(texts, owners, strict=True):
        own = float(attacked[owner] @ text)
        of_texts.append(1 + sum(float(images[j] @ text) >= own - 1e-6 for j in range(len(images)) if j != owner))
    return np.array(of_images), np.array(of_texts)


def with_features(monkeypatch, images, texts, captions):
    """A gallery with these features in place of a model's."""
    texts, images = (torch.tensor(rows, dtype=torch.float32) for rows in (texts, images))
    owners = torch.tensor([i for i, n in enumerate(captions) for _ in range(n)])
    empty = torch.empty(0)
    return retrieval._Gallery(None, None, texts, owners, images, empty, empty)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_counted_by_hand(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    captions = rng.integers(1, 4, 15)
    images, texts, attacked = (rng.standard_normal((n, 4)) for n in (15, captions.sum(), 15))
    images, texts, attacked = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts, attacked))
    gallery = with_features(monkeypatch, images, texts, captions)
    owners = gallery.owners.tolist()
    for features in (images, attacked):
        expected = by_hand(*(rows.astype(np.float32) for rows in (images, texts)), owners, features.astype(np.float32))
        whole = gallery.ranks(torch.tensor(features, dtype=torch.float32), list(range(15)))
        for ranks, right in zip(whole, expected, strict=True):
            assert ranks.tolist() == right.tolist()
        parts = [
            gallery.ranks(torch.tensor(features[i : i + 4], dtype=torch.float32), list(range(15))[i : i + 4])
            for i in range(0, 15, 4)
        ]
        assert torch.cat([part[1] for part in parts]).tolist() == expected[1].tolist()


def test_a_tie_counts_against_the_query(monkeypatch):
    row = [1.0, 0.0]
    gallery = with_features(monkeypatch, [row, row, row], [row, row, row, row], [2, 1, 1])
    images, texts = gallery.ranks(gallery.images, [0, 1, 2])
    assert images.tolist() == [3, 4, 4]  # of an image's own captions, the best counts, and no other of its own
    assert texts.tolist() == [3, 3, 3, 3]


def test_the_same_caption_of_another_image_is_a_tie(classifier, data):
    twice = CaptionedImages("twice", data.images, (data.captions[1], *data.captions[1:]))
    row = evaluate_retrieval(classifier, twice, progress=False).clean
    before = evaluate_retrieval(classifier, data, progress=False).clean
    assert row.image_to_text[0].found < before.image_to_text[0].found


def test_recall_at_the_number_of_captions_is_everything(classifier, data):
    few = CaptionedImages("few", data.images, tuple(own[:1] for own in data.captions))
    row = evaluate_retrieval(classifier, few, ks=(1, 60), progress=False).clean
    assert counts(row, "image_to_text")[1] == counts(row, "text_to_image")[1] == 60


def test_clean_recall_is_that_of_embeddings(classifier, data, measured):
    images = classifier.embed_images(data.images["image"])
    assert 50 < counts(measured.clean, "image_to_text")[0] < 60  # chance is 1 of 60
    texts = classifier.embed_texts([f"a photo of {text}" for text in data.texts])
    of_images, of_texts = by_hand(images, texts, data.owners.tolist())
    for k, image, text in zip((1, 5, 10), *(counts(measured.clean, each) for each in DIRECTIONS), strict=True):
        assert image == (of_images <= k).sum() and text == (of_texts <= k).sum()


def test_attacks_find_what_they_look_for_and_never_help(measured):
    clean, feature, caption, contrast, worst = measured.rows
    for direction in DIRECTIONS:
        for row in (feature, caption, contrast):
            assert all(a <= b for a, b in zip(counts(row, direction), counts(clean, direction), strict=True))
            assert all(a >= b for a, b in zip(counts(row, direction), counts(worst, direction), strict=True))
    assert (
        counts(contrast, "image_to_text")[0] < counts(feature, "image_to_text")[0] < counts(clean, "image_to_text")[0]
    )
    assert counts(caption, "text_to_image")[0] < counts(clean, "text_to_image")[0]
    assert feature.cosine < min(caption.cosine, contrast.cosine) < 1
    assert measured.worst_case == {THREAT: worst}


def test_without_a_radius_nothing_changes(classifier, data):
    nothing = parse_query_attack("feature-pgd-2", ThreatModel("linf", 0))
    clean, attacked = evaluate_retrieval(classifier, data, nothing, progress=False).rows
    assert all(counts(clean, direction) == counts(attacked, direction) for direction in DIRECTIONS)
    assert attacked.cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("goal", retrieval.GOALS)
def test_attacked_images_stay_in_the_ball_and_the_loss_rises(classifier, data, norm, goal):
    threat = ThreatModel(norm, "4/255" if norm == "linf" else 0.5)
    gallery = retrieval._Gallery.of(classifier, data, "a photo of {}", 8)
    places = [3, 1, 4]
    pixels, loss = gallery.batch(places), gallery.loss(goal, places)
    attack = PGD(threat, steps=5)
    adversarial = attack(retrieval.two_logits(loss), pixels, torch.zeros(3, dtype=torch.int64), 0)
    assert threat.norm_of(adversarial - pixels).max() <= threat.epsilon + 1e-6
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert (loss(adversarial) > loss(pixels)).all()


def test_losses_are_those_of_their_formulas(classifier, data):
    gallery = retrieval._Gallery.of(classifier, data, "a photo of {}", 8)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    feature = classifier.image_features(pixels).detach()[0]
    logits = (gallery.texts @ feature).double() * classifier.base_model.logit_scale.exp().double()
    own = gallery.owners == 5
    expected = {
        "feature": ((feature - gallery.images[5]) ** 2).sum(),
        "caption": -logits[own].mean(),
        "contrast": logits[~own].logsumexp(0) - logits[own].logsumexp(0),
    }
    for goal, value in expected.items():
        assert gallery.loss(goal, [5])(pixels).item() == pytest.approx(value.item(), rel=1e-4)


def test_the_same_seed_gives_the_same_figures_in_any_batches(classifier, data, measured):
    again = evaluate_retrieval(classifier, data, ATTACKS, progress=False)
    assert again == measured
    parts = evaluate_retrieval(classifier, data, ATTACKS, batch_size=17, progress=False)
    for row, other in zip(measured.rows, parts.rows, strict=True):
        assert all(counts(row, direction) == counts(other, direction) for direction in DIRECTIONS)
        assert row.cosine == pytest.approx(other.cosine, abs=1e-4)
    other = evaluate_retrieval(classifier, data, ATTACKS, seed=1, progress=False)
    assert [row.cosine for row in other.rows] != [row.cosine for row in measured.rows]


def test_an_adapter_is_measured_with_its_prompts_and_its_base_without(processor, data, measured):
    base = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    model = get_peft_model(base, CaptConfig())
    shake(model)
    classifier = ZeroShotClassifier(model.eval(), processor, ("image", "text"))
    tuned = evaluate_retrieval(classifier, data, ATTACKS[:1], progress=False)
    assert tuned.configuration["model"]["adapter"]["fingerprint"]
    assert counts(tuned.clean, "image_to_text") != counts(measured.clean, "image_to_text")
    with classifier.frozen():
        frozen = evaluate_retrieval(classifier, data, ATTACKS[:1], progress=False)
    assert frozen.rows == measured.rows[:2] and frozen.configuration["model"]["adapter"] is None
    with pytest.raises(ValueError, match="does not begin with 'a photo'"):
        evaluate_retrieval(classifier, data, caption_template="{}", progress=False)
    table = retrieval_table({"zero-shot": frozen, "CAPT": tuned}).splitlines()
    of_first = [line for line in table if line.startswith("| image → text |  | clean |")]
    assert [line.split(" | ")[3] for line in of_first] == ["zero-shot", "CAPT"]
    assert of_first[1].endswith(" | ".join(recall.percent for recall in tuned.clean.image_to_text) + " |")


def test_an_interval_counts_images_and_not_captions():
    assert Recall(1, 30, 60, 60).interval == wilson_interval(30, 60)
    assert Recall(1, 30, 60, 20).interval == wilson_interval(10, 20)
    with pytest.raises(ValueError, match="are not a recall"):
        Recall(1, 61, 60, 20)


# ---------------------------------------------------------------------------------------------------------- files


def test_results_are_used_again_only_for_the_same_configuration(
    classifier, data, measured, tmp_path, monkeypatch, caplog
):
    output = tmp_path / "retrieval.json"
    assert evaluate_retrieval(classifier, data, ATTACKS, output=output, progress=False).rows == measured.rows
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["retrieval.json"]
    assert Retrieval.load(output).rows == measured.rows
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "_attacked", None)
        assert evaluate_retrieval(classifier, data, ATTACKS, output=output, progress=False).rows == measured.rows
    changed = CaptionedImages(data.name, data.images, (("a red star",), *data.captions[1:]), data.source)
    evaluate_retrieval(classifier, changed, ATTACKS[:1], output=output, progress=False)
    assert "data.fingerprint" in caplog.text and (tmp_path / "retrieval.old1.json").is_file()


def test_a_killed_measurement_goes_on_where_it_was(classifier, data, measured, tmp_path, monkeypatch):
    attacked, calls = retrieval._attacked, []

    def killed(*args):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(args[2])
        return attacked(*args)

    settings = {"output": tmp_path / "retrieval.json", "batch_size": 25, "progress": False}
    monkeypatch.setattr(retrieval, "_attacked", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_retrieval(classifier, data, ATTACKS, **settings)
    seen = []
    monkeypatch.setattr(retrieval, "_attacked", lambda *args: seen.append(args[2]) or attacked(*args))
    found = evaluate_retrieval(classifier, data, ATTACKS, **settings)
    assert len(calls) + len(seen) == 9
    whole = evaluate_retrieval(classifier, data, ATTACKS, batch_size=25, progress=False)
    assert found.rows == whole.rows


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["rows"][0]["image_to_text"][0].update(found=3),
        lambda content: content["rows"][1]["text_to_image"][0].update(content["rows"][0]["image_to_text"][2]),
        lambda content: content.pop("machine"),
        lambda content: content["rows"][0].pop("name"),
    ],
)
def test_files_whose_figures_cannot_be_true_are_refused(measured, tmp_path, damage):
    path = tmp_path / "retrieval.json"
    measured.save(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedFileError):
        Retrieval.load(path)


def test_files_of_another_kind_are_not_replaced(classifier, data, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"kind": "evaluation"}')
    with pytest.raises(ValueError, match="something else than an evaluation of this kind"):
        evaluate_retrieval(classifier, data, output=path, progress=False)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name", ["pgd-20", "feature", "feature-apgd-ce", "feature-square", "caption-", "Feature-pgd-2"]
)
def test_unknown_attacks_are_answered_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="is not an attack on retrieval"):
        parse_query_attack(name, THREAT) and pytest.fail()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("feature-fgsm", "the distance has no gradient"),
        ("caption-pgd-5x3", "restarts of its own"),
        ("caption-pgd-5-margin", "has a loss"),
    ],
)
def test_attacks_that_would_not_do_what_they_say_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_query_attack(name, THREAT)


def test_a_goal_must_be_known():
    with pytest.raises(ValueError, match=r"goal='other' is unknown\. Allowed: feature, caption, contrast"):
        QueryAttack("other", PGD(THREAT))


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"ks": (1, 61)}, ValueError, "from 1 to 60"),
        ({"ks": ()}, ValueError, "from 1 to 60"),
        ({"ks": (5, 1)}, ValueError, "ascending"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"caption_template": "no place"}, ValueError, "{}"),
        ({"attacks": [parse_attack("pgd-2", THREAT)]}, TypeError, "attacks class logits"),
        ({"attacks": ATTACKS[:1] * 2}, ValueError, "more than once"),
        ({"data": (torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))}, TypeError, "CaptionedImages"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(classifier, data, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        evaluate_retrieval(classifier, **{"data": data, "progress": False, **settings})


def test_one_image_and_another_precision_are_refused(classifier, data, processor):
    with pytest.raises(ValueError, match="at least two images"):
        evaluate_retrieval(classifier, data.select([0]), ks=(1,), progress=False)
    half = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="The model is in bfloat16"):
        evaluate_retrieval(ZeroShotClassifier(half.eval(), processor, ("a", "b")), data, progress=False)
