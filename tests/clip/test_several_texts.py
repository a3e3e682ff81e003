"""Several texts per class: their mean, what is refused of them, and which of them a classifier has."""

import json
import string

import pytest
import torch
from helpers import TINY_CLIP, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoProcessor, CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier
from capt_peft.clip.texts import class_means, normalize, room_for_prompts
from capt_peft.data.texts import TEMPLATES, ClassText
from capt_peft.tuner import clip
from capt_peft.tuner.fingerprint import adapter_fingerprint

NAMES = ["red", "big green house", "seven"]
TEMPLATES_3 = ["a photo of a {}.", "a drawing of the big {}.", "a bad photo of the {} there"]
OWN = {
    "red": ["a photo of a red thing.", "a sketch of something red"],
    "big green house": ["a picture of a big green house", "a view of the Big  Green house", "a photo of a large home"],
    "seven": ["a photo of the number seven."],
}
PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def base():
    return CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()


def tuned(dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = get_peft_model(base(), CaptConfig(class_names=NAMES, **config))
    shake(model)
    return model.to(dtype).eval()


@pytest.fixture(params=["base", "one context", "coupled", "class-specific"])
def model(request):
    config = {"coupled": {"coupling": "text_to_vision"}, "class-specific": {"class_specific": True}}
    return base() if request.param == "base" else tuned(**config.get(request.param, {}))


def by_hand(model, processor, texts):
    """The normalised mean in float64 of the features of each class's texts, run one text of each class at a time."""
    rounds = []
    for number in range(max(map(len, texts.values()))):
        own = {name: those[number % len(those)] for name, those in texts.items()}
        rounds.append(ZeroShotClassifier(model, processor, NAMES, class_texts=own).encode_texts().double())
    means = [
        torch.stack([rounds[number][label] for number in range(len(texts[name]))]).mean(0)
        for label, name in enumerate(NAMES)
    ]
    return torch.stack([mean / mean.norm() for mean in means])


# ------------------------------------------------------------------------------------------------------------ the mean


@pytest.mark.parametrize("given", ["a photo of a {}.", ["a photo of a {}."], ("a photo of a {}.",)])
def test_one_text_per_class_is_run_as_ever_to_the_last_bit(model, processor, given):
    classifier = ZeroShotClassifier(model, processor, NAMES, given)
    inputs = processor.tokenizer([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        features = clip.text_features(model, dict(inputs))
    assert torch.equal(classifier.text_features(), features / features.norm(dim=-1, keepdim=True))
    assert classifier.template == "a photo of a {}." and classifier.text_parts() is None


@pytest.mark.parametrize("size", [None, 1, 2, 5])
@torch.no_grad()
def test_a_class_has_the_normalised_mean_of_its_texts(model, processor, size):
    templates = {name: [one.format(name) for one in TEMPLATES_3] for name in NAMES}
    of_templates = ZeroShotClassifier(model, processor, NAMES, TEMPLATES_3, text_chunk_size=size)
    own = ZeroShotClassifier(model, processor, NAMES, class_texts=OWN, text_chunk_size=size)
    for classifier, texts in ((of_templates, templates), (own, OWN)):
        expected = by_hand(model, processor, texts)
        assert (classifier.text_features() - expected).abs().max() < 1e-6
        assert (expected - ZeroShotClassifier(model, processor, NAMES).text_features()).abs().max() > 1e-3
        images = classifier.image_features(PIXELS)
        torch.testing.assert_close(classifier(PIXELS), classifier.logits(images, expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("size", [None, 2])
def test_gradients_go_through_the_mean(processor, class_specific, size):
    model, signs = tuned(torch.float64, class_specific=class_specific), torch.linspace(-1, 1, 3 * 128).view(3, 128)
    prompts = [p for name, p in model.named_parameters() if p.requires_grad and "text" in name]
    classifier = ZeroShotClassifier(model, processor, NAMES, class_texts=OWN, text_chunk_size=size)
    found, expected = (
        torch.autograd.grad((features * signs).sum(), prompts)
        for features in (classifier.encode_texts(), by_hand(model, processor, OWN))
    )
    for own, other in zip(found, expected, strict=True):
        assert other.norm() > 1e-3 and (own - other).norm() < 1e-9 * other.norm()


@torch.no_grad()
def test_the_order_of_the_texts_changes_nothing_but_rounding(model, processor):
    first = ZeroShotClassifier(model, processor, NAMES, TEMPLATES_3, class_texts={"red": OWN["red"]})
    again = ZeroShotClassifier(model, processor, NAMES, TEMPLATES_3[::-1], class_texts={"red": OWN["red"][::-1]})
    assert first.texts != again.texts and sorted(first.texts) == sorted(again.texts)
    torch.testing.assert_close(first.text_features(), again.text_features(), atol=5e-7, rtol=0)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=6), seed=st.integers(0, 9))
def test_means_are_those_of_float64_in_any_precision(counts, seed):
    features = normalize(torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(seed)))
    exact = torch.stack([texts.double().mean(0) for texts in features.split(counts)])
    exact /= exact.norm(dim=-1, keepdim=True)
    assert (class_means(features, counts) - exact).abs().max() < 1e-6
    half = class_means(features.bfloat16(), counts)
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 2**-6
    assert class_means(features.double(), counts).dtype == torch.float64


def test_the_frozen_side_has_the_mean_of_the_base_models_texts(processor):
    plain = ZeroShotClassifier(base(), processor, NAMES, TEMPLATES_3, class_texts={"red": OWN["red"]})
    adapted = ZeroShotClassifier(tuned(), processor, NAMES, TEMPLATES_3, class_texts={"red": OWN["red"]})
    with adapted.frozen():
        assert torch.equal(adapted.text_features(), plain.text_features())
    assert not torch.allclose(adapted.text_features(), plain.text_features(), atol=1e-3)


# -------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("template", "own", "words"),
    [
        (
            TEMPLATES_3,
            {"red": "a photo of a " + "long " * 80},
            r"'a photo of a long .* has \d+ tokens, but the model takes 77",
        ),
        (["{}", "a {} " + "x " * 80], None, r"The text .a big green house x .* has \d+ tokens, but the model takes 77"),
        (["{}", "a <|endoftext|> {}"], None, "holds the tokenizer.s special token"),
        (["a {}", "A  {}"], None, "texts 'a red' and 'A  red' of class 'red' are the same to the model's tokenizer"),
        (["a {}", "a {}"], None, r"template='a \{\}' is given twice"),
        ([], None, "has no template"),
        (["a {}", "a"], None, "template='a' must hold exactly one"),
        ("{}", {"red": ["x", "x"]}, "Class 'red' has the text 'x' twice"),
        ("{}", {"red": []}, "Class 'red' has no text"),
        ("{}", {"red": ["x", " "]}, "Class 'red' has an empty text"),
        ("{}", {"blue": ["x"]}, "class_texts has texts for 'blue', but the classes are 'red', 'big green house'"),
        ("{}", {"red": ["x", "y"], "seven": ["y", "x"]}, "names 'red' and 'seven' have the same 2 texts"),
        ("{}", {"red": "Seven"}, "names 'red' and 'seven' are the same text"),
        ("clip-imagenet", None, "Sets of templates have the names clip-imagenet-80, clip-imagenet-7"),
    ],
)
def test_texts_that_do_not_suit_are_refused_by_name(processor, template, own, words):
    with pytest.raises(ValueError, match=words):
        ZeroShotClassifier(base(), processor, NAMES, template, class_texts=own)


@pytest.mark.parametrize("own", [3, ["a red"], {"red": 3}, {"red": [3]}, {3: "red"}])
def test_texts_of_another_type_are_refused(processor, own):
    for make in (
        lambda: ZeroShotClassifier(base(), processor, NAMES, class_texts=own),
        lambda: CaptConfig(class_texts=own),
    ):
        with pytest.raises(TypeError, match=r"list(s)? of (texts|strings)"):
            make()


def test_classes_may_share_some_of_their_texts(processor):
    own = {"red": ["a thing", "a red thing"], "seven": ["a thing", "the number seven"]}
    features = ZeroShotClassifier(base(), processor, NAMES, class_texts=own).text_features()
    assert (features[0] - features[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("template", "own", "words"),
    [
        ("clip-imagenet-7", None, r"The template 'a \{\} in a video game.' has 1 token before the class name"),
        (
            "a photo of a {}.",
            {"red": ["a photo of red", "red paint"]},
            "The text 'red paint' of class 'red' has 0 tokens before",
        ),
        (
            "a photo of a {}.",
            {"seven": "a seven"},
            "The text 'a seven' of class 'seven' has 1 token before the words that tell",
        ),
        # without its name, what departs from the template tells the class
        ("a photo of a {}.", {"seven": "six plus one"}, "The text 'six plus one' of class 'seven' has 0 tokens before"),
    ],
)
def test_a_text_that_the_prompts_would_overwrite_is_named(processor, template, own, words):
    with pytest.raises(ValueError, match=words) as caught:
        ZeroShotClassifier(tuned(), processor, NAMES, template, class_texts=own)
    assert "2 text prompts of adapter 'default' would overwrite 2" in str(caught.value)
    ZeroShotClassifier(base(), processor, NAMES, template, class_texts=own)
    assert ZeroShotClassifier(tuned(num_text_tokens=1), processor, NAMES, "clip-imagenet-7")(PIXELS).shape == (4, 3)


def room(text, name, template="a photo of a {}."):
    """The tokens before the words that tell a class, start token not included."""
    _, processor = loaded(2)
    ids = processor.tokenizer([text], return_tensors="pt")["input_ids"]
    return room_for_prompts(processor.tokenizer, [name], [ClassText(0, text, None)], ids, template).tokens - 1


@pytest.mark.parametrize("name", [*string.ascii_uppercase, *string.ascii_lowercase])
def test_a_letter_is_told_from_the_words_before_it(name):
    assert room(f"a photo of the letter {name}.", name) >= 3  # "a photo of", and more unless it is "a"
    assert room(f"the letter {name}, as in a drawing of a scene", name) == 2
    assert room(f"{name} is a vowel", name) < 2
    assert room(f"the {name} of a word", name) == 1
    if name.isupper():
        assert room(f"A drawing of the letter {name}", name) == room(f"a drawing of the letter {name}.", name) == 5


@pytest.mark.parametrize(
    ("text", "name", "before"),
    [
        ("a caterpillar and a cat", "cat", "a caterpillar and a"),  # a whole word
        ("a tomcat", "cat", "a"),  # its name is not there: "a" is the template's
        ("two cats", "cat", "two"),  # a plural
        ("A CAT", "cat", "a"),
        ("a small crane on a large crane", "crane", "a small"),  # the first of several
        ("crane by crane", "crane", ""),
        ("Crane by crane", "crane", ""),
        ("a polish sausage of the Polish", "Polish", "a polish sausage of the"),  # its capital
        ("Polish off a Polish sausage", "Polish", "polish off a"),
        ("Polish off a polish sausage", "Polish", ""),
        ("may I see it in May", "May", "may i see it in"),
        ("a photo", "photo", "a"),  # the template's words tell the class if nothing else does
        ("a photo of photography", "photo", "a"),
        ("a photo of a photo", "photo", "a photo of a"),
        ("a photo of water_bird", "water bird", "a photo of"),
        ("a photo of a waterbird, the best", "water bird", "a photo of a"),
        ("a C plus of C++", "C++", "a c plus of"),
        ("a photo of _", "_", "a photo of"),
    ],
)
def test_where_a_text_tells_its_class(text, name, before):
    assert room(text, name) == len(loaded(2)[1].tokenizer.tokenize(before))


def test_short_names_are_classes_of_a_tuned_model(processor):
    names = list(string.ascii_uppercase)
    own = {"A": ["a photo of the letter A.", "A drawing of the letter A."], "I": "I saw a letter I"}
    torch.manual_seed(0)
    model = get_peft_model(base(), CaptConfig(class_names=names)).eval()
    shake(model)
    assert ZeroShotClassifier(model, processor, names, class_texts=own)(PIXELS).shape == (4, 26)
    with pytest.raises(
        ValueError, match="'A is a vowel' of class 'A' has 0 tokens before the words that tell the class"
    ):
        ZeroShotClassifier(model, processor, names, class_texts={"A": ["A is a vowel"]})


BEGINNINGS = ["", "a ", "the small ", "a photo of a ", "this is a ", "A Photo, of ", "five of the "]


@settings(max_examples=60, deadline=None)
@given(
    templates=st.lists(st.sampled_from([f"{begin}{{}}." for begin in BEGINNINGS]), min_size=1, max_size=3, unique=True),
    begin=st.sampled_from(BEGINNINGS),
    own=st.sampled_from(["{} thing", "Red", "reddish", "RED or {}", "x red", "infrared"]),
    n=st.integers(1, 4),
)
def test_prompts_never_stand_in_the_place_of_a_class_name(templates, begin, own, n):
    model, processor = loaded(n)
    try:
        classifier = ZeroShotClassifier(model, processor, NAMES, templates, class_texts={"red": begin + own})
    except ValueError as error:
        assert "would overwrite" in str(error)
        return
    tokens = classifier.input_ids[:, 1 : 1 + n]
    words = [processor.tokenizer.decode(row).lower() for row in tokens]
    for label, text in zip(classifier.text_labels, words, strict=True):
        assert NAMES[label].split()[0] not in text.split()


def loaded(n, known={}):  # noqa: B006
    if n not in known:
        known[n] = tuned(num_text_tokens=n), AutoProcessor.from_pretrained(TINY_CLIP)
    return known[n]


# --------------------------------------------------------------------------------------- which texts a classifier has


def test_a_class_without_texts_of_its_own_has_the_templates(processor):
    own = {"Big_Green_House": ["a {} there"]}  # its name in another spelling, which braces stand for as it is here
    classifier = ZeroShotClassifier(base(), processor, NAMES, ["a {}", "the {}"], class_texts=own)
    assert classifier.texts == ["a red", "the red", "a big green house there", "a seven", "the seven"]
    assert classifier.text_labels == [0, 0, 1, 2, 2] and classifier.class_texts == {"big green house": ["a {} there"]}


@torch.no_grad()
def test_predict_takes_other_texts_and_other_classes(processor, tmp_path):
    image = (PIXELS[0].permute(1, 2, 0).numpy() * 255).astype("uint8")
    classifier = ZeroShotClassifier(base(), processor, NAMES, TEMPLATES_3, class_texts=OWN)

    def scores(**settings):
        found = classifier.predict(image, **settings)[0]
        return {entry["label"]: entry["score"] for entry in found}

    def expected(names, template, own):
        other = ZeroShotClassifier(base(), processor, names, template, class_texts=own)
        return dict(zip(names, other(classifier.transform.batch([image])).softmax(-1)[0].tolist(), strict=True))

    assert scores() == pytest.approx(expected(NAMES, TEMPLATES_3, OWN))
    assert scores(template="a {}") == pytest.approx(expected(NAMES, "a {}", None))
    assert scores(template="clip-imagenet-7") == pytest.approx(expected(NAMES, TEMPLATES["clip-imagenet-7"], None))
    (tmp_path / "a.txt").write_text("a {}\nthe {}")
    (tmp_path / "b.json").write_text(json.dumps({"red": ["a {} thing"]}))
    several, other = ["a {}", "the {}"], {"red": ["a {} thing"]}
    assert scores(class_texts={}) == pytest.approx(expected(NAMES, TEMPLATES_3, None))
    assert scores(class_texts=other) == pytest.approx(expected(NAMES, TEMPLATES_3, other))
    assert scores(template=tmp_path / "a.txt", class_texts=str(tmp_path / "b.json")) == pytest.approx(
        expected(NAMES, several, other)
    )
    assert scores() == pytest.approx(expected(NAMES, TEMPLATES_3, OWN))
    with pytest.raises(ValueError, match="class_texts has texts for 'pink'"):
        scores(class_texts={"pink": "x"})
    names = ["blue", "red"]
    assert scores(class_names=names, class_texts=other) == pytest.approx(expected(names, TEMPLATES_3, other))
    assert scores(class_names=names) == pytest.approx(expected(names, TEMPLATES_3, {"red": OWN["red"]}))


@torch.no_grad()
def test_an_adapter_classifies_with_the_texts_that_it_stores(processor, tmp_path):
    model = tuned(template=TEMPLATES_3, class_texts={"red": OWN["red"]})
    model.peft_config["default"].base_model_name_or_path = str(TINY_CLIP)
    model.save_pretrained(tmp_path)
    expected = ZeroShotClassifier(model, processor, NAMES, TEMPLATES_3, class_texts={"red": OWN["red"]})(PIXELS)
    loaded = ZeroShotClassifier.from_pretrained(str(tmp_path))
    assert torch.equal(loaded(PIXELS), expected)
    assert adapter_fingerprint(tmp_path) == adapter_fingerprint(model)

    def texts(**settings):
        return ZeroShotClassifier.from_pretrained(str(tmp_path), **settings).texts

    assert texts(template="a small {}") == [f"a small {name}" for name in NAMES]
    assert len(texts(class_texts={})) == 9 and len(texts()) == 8
    assert texts(class_names=["blue", "Red"])[3:] == OWN["red"]
    assert texts(class_texts={"seven": "a number, seven"})[-1] == "a number, seven"
    plain = tuned()
    before = adapter_fingerprint(plain)
    plain.peft_config["default"].class_texts = {"red": OWN["red"]}
    assert adapter_fingerprint(plain) != before
