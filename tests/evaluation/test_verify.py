"""What worst-case images show, and that nothing which a forged file can do reads as verified."""

from dataclasses import replace

import pytest
import torch
from helpers import TINY_CLIP
from safetensors.torch import load_file, save_file
from toy_models import make_model, some_images

from capt_peft import PGD, ThreatModel, ZeroShotClassifier, evaluate, load_task, parse_attack
from capt_peft.defences import Defended, parse_defence
from capt_peft.evaluation import Accuracy, Evaluation, verify
from capt_peft.evaluation import loop as loop_module
from capt_peft.results.kept import KeptImages

THREATS = ThreatModel("linf", "4/255"), ThreatModel("l2", "0.2")
ATTACKS = [PGD(THREATS[0], steps=1), PGD(THREATS[0], steps=5), PGD(THREATS[1], steps=3)]
PIXELS = some_images(40)
NAME = str(THREATS[0])


@pytest.fixture(scope="module")
def model():
    return make_model(scale=3.0)


@pytest.fixture(scope="module")
def labels(model):
    """The answers of the model, but for two images that it gets wrong."""
    found = model(PIXELS).argmax(1)
    found[:2] = (found[:2] + 1) % 5
    return found


@pytest.fixture(scope="module")
def folder(model, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    measure(model, labels, folder / "r.json")
    return folder


@pytest.fixture
def evaluation(folder):
    return Evaluation.load(folder / "r.json")


@pytest.fixture
def tensors(folder):
    return load_file(folder / "r.safetensors")


def measure(model, labels, output, **settings):
    return evaluate(
        model, (PIXELS, labels), ATTACKS, output=output, save_images=True, batch_size=16, progress=False, **settings
    )


def forged(tensors, evaluation, tmp_path, **changes):
    """A record that names the hash of a file of these tensors, as whoever forges one writes it, and the file."""
    path = tmp_path / "forged.safetensors"
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return replace(evaluation, images=KeptImages.of(path), **changes), path


def assert_refused(result, why):
    assert not result.verified and "Not verified." in str(result) and "verified upper bound" not in str(result)
    assert why in " ".join((*result.problems, *result.broken, *result.unchecked))


def test_the_images_of_an_honest_evaluation_verify_its_figures(model, labels, folder, evaluation):
    result = verify(model, evaluation, folder / "r.safetensors", (PIXELS, labels), batch_size=7)
    assert result.verified, result
    assert result.bounds == evaluation.worst_case and result.clean == evaluation.clean
    assert 0 < evaluation.worst_case[THREATS[0]].correct < evaluation.clean.correct == 38
    assert f"At most {evaluation.worst_case[THREATS[0]]} robust under L-inf 4/255: verified upper bound" in str(result)


def test_of_several_attacks_the_image_that_breaks_is_kept(model, evaluation, tensors):
    """One step breaks some, five steps more; each image is wrong if any attack of its threat model broke it."""
    rows = evaluation.examples.to_pylist()
    for threat in THREATS:
        wrong = {r["index"] for r in rows if r["threat_model"] == str(threat) and r["prediction"] != r["label"]}
        answers = model(tensors[str(threat)]).argmax(1)
        assert {i for i in range(40) if answers[i] != tensors["labels"][i]} == wrong
    by_steps = [{r["index"] for r in rows if r["attack"] == name and r["broken"]} for name in ("pgd-1", "pgd-5")]
    assert by_steps[0] < by_steps[1]


def test_a_killed_evaluation_keeps_the_same_bytes(model, labels, folder, tmp_path, monkeypatch):
    calls, attack_batch = [], loop_module.attack_batch

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return attack_batch(*args)

    monkeypatch.setattr(loop_module, "attack_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(model, labels, tmp_path / "r.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.partial"]
    next((tmp_path / "r.partial" / "images").iterdir()).unlink()  # a piece that is lost is made again
    measure(model, labels, tmp_path / "r.json")
    assert (tmp_path / "r.safetensors").read_bytes() == (folder / "r.safetensors").read_bytes()
    assert len(calls) == 5 + 1 + 5  # 9 pieces, 4 of them done and one of these lost


def test_without_the_data_nothing_is_verified(model, folder, evaluation):
    result = verify(model, evaluation, folder / "r.safetensors")
    assert result.bounds == evaluation.worst_case and result.problems == ()
    assert_refused(result, "neither the labels nor whether the images lie within their threat model is known")


def test_another_file_than_the_record_names_is_not_scored(model, labels, folder, evaluation, tmp_path):
    _, path = forged(load_file(folder / "r.safetensors") | {"labels": labels.flip(0)}, evaluation, tmp_path)
    result = verify(model, evaluation, path, (PIXELS, labels))
    assert result.bounds == {}
    assert_refused(result, "the hash of forged.safetensors is not the one in the record")


FORGERIES = {
    "clean images": (lambda t: {**t, NAME: PIXELS}, "are the clean images themselves: nothing attacked them"),
    "outside the ball": (lambda t: {**t, NAME: (PIXELS + 5 / 255).clamp(0, 1)}, "lie outside of L-inf 4/255"),
    "one pixel outside": (lambda t: {**t, NAME: moved_by(t[NAME], 1e-4)}, "1 of 40 images lie outside"),
    "the other ball": (lambda t: {**t, NAME: t[str(THREATS[1])]}, "lie outside of L-inf 4/255"),
    "other labels": (lambda t: {**t, "labels": (t["labels"] + 1) % 5}, "the labels of the images are not those of the data"),
    "labels of no class": (lambda t: {**t, "labels": t["labels"] + 5}, "of 5 classes"),
    "negative labels": (lambda t: {**t, "labels": t["labels"] - 5}, "of 5 classes"),
    "fewer images": (lambda t: {n: v[:20] for n, v in t.items()}, "has 20 images, the record is of 40"),
    "no images": (lambda t: {n: v[:0] for n, v in t.items()}, "one label for each place"),
    "one image many times": (lambda t: {**t, "index": torch.zeros_like(t["index"])}, "one label for each place"),
    "other order": (lambda t: {n: v.flip(0) for n, v in t.items()}, "one label for each place"),
    "images of others": (lambda t: {**t, NAME: t[NAME].roll(1, 0)}, "lie outside of L-inf 4/255"),
    "not a number": (lambda t: {**t, NAME: t[NAME] * torch.nan}, "not pixels in [0, 1]"),
    "one pixel not a number": (lambda t: {**t, NAME: t[NAME].clone().index_fill_(3, torch.tensor(0), torch.nan)}, "not pixels"),
    "infinite": (lambda t: {**t, NAME: t[NAME] + torch.inf}, "not pixels in [0, 1]"),
    "negative": (lambda t: {**t, NAME: t[NAME] - 1e-6}, "not pixels in [0, 1]"),
    "doubles": (lambda t: {**t, NAME: t[NAME].double()}, "not float32"),
    "other size": (lambda t: {**t, NAME: t[NAME][:, :, :4]}, "the images cannot be scored"),
    "threat model left out": (lambda t: {n: v for n, v in t.items() if n != NAME}, f"has no images for {NAME}"),
    "threat model too many": (lambda t: {**t, "L-inf 0": PIXELS}, "that the record has no worst case for: L-inf 0"),
    "weaker images": (lambda t: {**t, NAME: PIXELS * 0.9999}, "the record says"),
}  # fmt: skip


def moved_by(images, distance):
    """Images of which one pixel lies farther than epsilon from the clean one."""
    images = images.clone()
    inside = PIXELS[5, 0, 0, 0] < 0.5
    images[5, 0, 0, 0] = PIXELS[5, 0, 0, 0] + (4 / 255 + distance) * (1 if inside else -1)
    return images


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_with_its_own_hash_is_not_verified(model, labels, evaluation, tensors, tmp_path, name):
    forge, why = FORGERIES[name]
    record, path = forged(forge(tensors), evaluation, tmp_path)
    assert_refused(verify(model, record, path, (PIXELS, labels)), why)


def test_the_union_of_threat_models_is_compared(model, labels, folder, evaluation):
    record = replace(evaluation, union=Accuracy(evaluation.union.correct - 1, 40))
    told = f"{evaluation.union.correct} of 40 images are right under every threat model; the record says"
    assert_refused(verify(model, record, folder / "r.safetensors", (PIXELS, labels)), told)


@pytest.mark.parametrize("change", [-3, 3])
def test_a_worst_case_other_than_the_images_show_is_not_verified(model, labels, folder, evaluation, change):
    told = {threat: Accuracy(of.correct + change, of.n) for threat, of in evaluation.worst_case.items()}
    result = verify(model, replace(evaluation, worst_case=told), folder / "r.safetensors", (PIXELS, labels))
    assert_refused(result, f"the record says {told[THREATS[0]].correct} of 40")


class Shifted(torch.nn.Module):
    """A classifier with one number added to all logits, which changes no answer."""

    def __init__(self, model, by):
        super().__init__()
        self.model = model
        self.register_buffer("by", torch.tensor(float(by)))

    def forward(self, pixels):
        return self.model(pixels) + self.by


@pytest.mark.parametrize("by", [0, 1e4, 1e5])
def test_a_number_added_to_all_logits_leaves_no_image_to_the_record(model, labels, tmp_path, by):
    shifted = Shifted(model, by)
    record = measure(shifted, labels, tmp_path / "r.json")
    arguments = tmp_path / "r.safetensors", (PIXELS, labels)
    assert verify(shifted, record, *arguments).bounds == record.worst_case
    for more in (2, record.clean.correct - record.worst_case[THREATS[0]].correct):
        told = {threat: Accuracy(of.correct + more, of.n) for threat, of in record.worst_case.items()}
        told = {threat: min(of, record.clean, key=lambda each: each.correct) for threat, of in told.items()}
        result = verify(shifted, replace(record, worst_case=told), *arguments)
        assert_refused(result, f"the record says {told[THREATS[0]].correct} of 40")
        assert result.bounds == record.worst_case


def test_close_images_may_be_broken_in_the_record_and_hardly_any_robust(model, folder, evaluation, tensors, tmp_path):
    """Where two classes get nearly the same logit everywhere, either answer is within rounding."""
    twins = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)).eval()
    twins[1].weight.data.zero_()
    twins[1].bias.data = torch.tensor([1.0, 1.0 + 1e-6, -1.0])
    ones = torch.ones(40, dtype=torch.int64)
    record = evaluate(
        twins, (PIXELS, ones), PGD(THREATS[0], steps=1), output=tmp_path / "t.json", save_images=True, progress=False
    )
    arguments = tmp_path / "t.safetensors", (PIXELS, ones)
    assert record.robust.correct == 40
    moved = load_file(arguments[0])
    moved[NAME] = (PIXELS + 1e-3).clamp(0, 1)  # without a gradient nothing has moved them
    record, path = forged(moved, record, tmp_path, worst_case={THREATS[0]: Accuracy(5, 40)})
    assert verify(twins, record, path, arguments[1]).verified
    zeros = torch.zeros(40, dtype=torch.int64)  # the other twin: all wrong, by as little
    wrong = evaluate(twins, (PIXELS, zeros), PGD(THREATS[0], steps=1), progress=False)
    for told, agrees in ((0, True), (1, True), (2, False)):
        other, path = forged({**moved, "labels": zeros}, wrong, tmp_path, worst_case={THREATS[0]: Accuracy(told, 40)})
        assert verify(twins, other, path, (PIXELS, zeros)).verified is agrees


def test_images_outside_of_their_ball_lower_no_bound(model, labels, evaluation, tensors, tmp_path):
    record, path = forged({**tensors, NAME: 1 - PIXELS}, evaluation, tmp_path)
    assert verify(model, record, path, (PIXELS, labels)).bounds[THREATS[0]] == evaluation.clean


def test_a_protocol_that_the_attacks_are_not_is_not_verified(model, labels, folder, evaluation):
    def with_protocol(name):
        record = replace(evaluation, configuration={**evaluation.configuration, "protocol": name})
        return verify(model, record, folder / "r.safetensors", (PIXELS, labels))

    assert_refused(with_protocol("tecoa"), "names the protocol tecoa, but its attacks under L-inf 4/255 are not")
    assert_refused(with_protocol(["x"]), "which this version does not know")


def test_the_closing_line_says_what_was_not_checked(model, labels, folder, evaluation):
    told = str(verify(model, evaluation, folder / "r.safetensors", (PIXELS, labels))).splitlines()[-1]
    assert told.startswith("Verified: clean accuracy and the worst case agree")
    assert told.endswith("signs and all other figures are the record's own.")


@pytest.mark.parametrize("told", [["x"], "x", 5])
def test_a_record_whose_model_is_no_object_is_not_verified(model, labels, folder, evaluation, told):
    record = replace(evaluation, configuration={**evaluation.configuration, "model": told})
    assert_refused(verify(model, record, folder / "r.safetensors", (PIXELS, labels)), "its model is not a JSON object")


def test_clean_accuracy_of_the_record_is_compared(model, labels, folder, evaluation):
    record = replace(evaluation, clean=Accuracy(40, 40))
    assert_refused(verify(model, record, folder / "r.safetensors", (PIXELS, labels)), "the record says 100.0%")


def test_images_that_look_robust_and_are_wrong_without_an_attack_do_not_count(
    model, labels, evaluation, tensors, tmp_path
):
    """Images that the classifier gets wrong can be moved until it gets them right: they are not robust for that."""
    answers, other = model(tensors[NAME]).argmax(1), labels.clone()
    turned = [i for i in range(40) if answers[i] != labels[i] == model(PIXELS[i : i + 1]).argmax()][:2]
    other[turned] = answers[turned]
    told = evaluate(model, (PIXELS, other), ATTACKS, progress=False)
    record, path = forged({**tensors, "labels": other}, evaluation, tmp_path)
    record = replace(record, configuration=told.configuration, clean=told.clean)
    result = verify(model, record, path, (PIXELS, other))
    robust = evaluation.worst_case[THREATS[0]]
    assert int((answers == other).sum()) == robust.correct + 2 and len(turned) == 2
    assert result.bounds[THREATS[0]] == robust


def test_other_data_and_other_weights_are_not_verified(model, labels, folder, evaluation):
    path = folder / "r.safetensors"
    assert_refused(verify(model, evaluation, path, (PIXELS.flip(3), labels)), "the record is of other data than these")
    assert_refused(
        verify(model, evaluation, path, (PIXELS[:20], labels[:20])), "the record is of other data than these"
    )
    other = make_model(scale=3.0)
    other[1].bias.data[0] += 1e-4
    assert_refused(
        verify(other, evaluation, path, (PIXELS, labels)), "the record is of another model: model.fingerprint"
    )


def test_a_model_that_answers_at_random_is_not_verified(model, labels, folder, evaluation):
    def at_random(pixels):
        return model(pixels) + torch.randn(len(pixels), 5)

    record = replace(
        evaluation, configuration={**evaluation.configuration, "model": {"callable": at_random.__qualname__}}
    )
    assert_refused(verify(at_random, record, folder / "r.safetensors", (PIXELS, labels)), "answers at random")


@pytest.mark.parametrize(("defence", "verified"), [("lowpass-0.5", True), ("noise-0.1", False)])
def test_a_defended_model_is_verified_with_its_own_defence_unless_that_is_random(tmp_path, defence, verified):
    digits = [str(digit) for digit in range(10)]
    bare = ZeroShotClassifier.from_pretrained(TINY_CLIP, class_names=digits, template="a photo of the digit {}.")
    data, path = load_task("digits")["test"].select(range(8)), tmp_path / "r.safetensors"
    model = Defended(bare, parse_defence(defence)).eval()
    attack = PGD(ThreatModel("linf", "8/255"), steps=3)
    record = evaluate(model, data, attack, output=tmp_path / "r.json", save_images=True, signs=False, progress=False)
    result = verify(model, record, path, data)
    if verified:
        assert result.verified and result.bounds == record.worst_case, result
    else:
        assert_refused(result, "the defence noise-0.1 is random")
        assert result.problems == () and result.clean.decisions == record.clean.decisions == 8
        assert_refused(verify(model, record, path), "the data are not here")
        assert_refused(verify(model, replace(record, clean=Accuracy(32, 8, 8)), path, data), "clean accuracy is")
        lied = replace(record, worst_case=dict.fromkeys(record.worst_case, Accuracy(8 * 8, 8, 8)))
        assert_refused(verify(model, lied, path, data), "the record says 8 of 8")
        _, other_file = forged({**load_file(path), "labels": torch.zeros(8).long()}, record, tmp_path)
        assert_refused(verify(model, record, other_file, data), "the hash of forged.safetensors")
    assert_refused(verify(bare, record, path, data), f"the record is of the defence {defence}")
    other = Defended(bare, parse_defence("lowpass-0.4")).eval()
    assert_refused(verify(other, record, path, data), f"the record is of the defence {defence}")


def test_an_attack_finds_what_the_records_own_was_too_weak_for(model, labels, tmp_path):
    weak = evaluate(
        model, (PIXELS, labels), PGD(THREATS[0], steps=1, step_size=1e-4), output=tmp_path / "r.json", save_images=True,
        progress=False,
    )  # fmt: skip
    arguments = model, weak, tmp_path / "r.safetensors", (PIXELS, labels)
    assert verify(*arguments).verified
    result = verify(*arguments, attacks=[parse_attack("pgd-20", THREATS[0])])
    strong = evaluate(model, (PIXELS, labels), PGD(THREATS[0], steps=20), progress=False)
    assert result.bounds[THREATS[0]].correct <= strong.robust.correct < weak.robust.correct
    assert_refused(result, "pgd-20 breaks")
    assert not result.problems and "A stronger attack: pgd-20" in str(result) and "Does not agree" not in str(result)
    with pytest.raises(ValueError, match=r"has no images for pgd-20, L2 0\.2"):
        verify(*arguments, attacks=[parse_attack("pgd-20", THREATS[1])])


def test_an_evaluation_that_kept_nothing_is_refused(model, labels, folder):
    bare = evaluate(model, (PIXELS, labels), ATTACKS[0], progress=False)
    with pytest.raises(ValueError, match="kept no images"):
        verify(model, bare, folder / "r.safetensors")
