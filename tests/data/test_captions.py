"""Captioned images: sources, columns, splits, equal images, and what is refused."""

import io
import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from capt_peft.data import CaptionedImages, load_captions


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(shade):
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def table(shades, **columns):
    """Images in these shades of red, and columns of texts or of lists of them."""
    kinds = {n: List(Value("string")) if isinstance(v[0], list) else Value("string") for n, v in columns.items()}
    images = [{"bytes": png(shade), "path": None} for shade in shades]
    return Dataset.from_dict({"image": images, **columns}, features=Features({"image": Image(), **kinds}))


def shades_of(found):
    return [image.getpixel((0, 0))[0] for image in found.images["image"]]


def parquet(path, *given, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table(*given, **columns).to_parquet(str(path))
    return path


def test_a_parquet_file_with_a_text_or_a_list_for_each_image(tmp_path):
    parquet(tmp_path / "one" / "test-0.parquet", [1, 2], caption=["a", "b"])
    parquet(tmp_path / "lists" / "test-0.parquet", [1, 2], caption=[["a", "b"], ["c"]])
    assert load_captions(tmp_path / "one").captions == (("a",), ("b",))
    found = load_captions(tmp_path / "lists")
    assert found.captions == (("a", "b"), ("c",)) and shades_of(found) == [1, 2]
    assert found.texts == ["a", "b", "c"] and found.owners.tolist() == [0, 0, 1]


def test_rows_with_the_same_image_are_one_image_with_several_captions(tmp_path):
    path = parquet(tmp_path / "test.parquet", [7, 9, 7, 9, 7], caption=list("abcde"))
    found = load_captions(path)
    assert found.captions == (("a", "c", "e"), ("b", "d")) and shades_of(found) == [7, 9]


def test_several_columns_and_several_files(tmp_path):
    parquet(tmp_path / "test-0.parquet", [1], first=["a"], second=[["b", "c"]], name=["x"])
    parquet(tmp_path / "test-1.parquet", [2], first=["d"], second=[["e"]], name=["y"])
    found = load_captions(tmp_path, caption_column="first, second")
    assert found.captions == (("a", "b", "c"), ("d", "e")) and shades_of(found) == [1, 2]


def test_the_usual_name_is_preferred_where_several_columns_hold_texts(tmp_path):
    path = parquet(tmp_path / "test.parquet", [1], caption=["a"], file=["x"])
    assert load_captions(path).captions == (("a",),)
    path = parquet(tmp_path / "other" / "test.parquet", [1], words=["a"], file=["x"])
    with pytest.raises(ValueError, match=r"Several columns could be the caption: words, file\. Set `caption_column`"):
        load_captions(path)
    path = parquet(tmp_path / "both" / "test.parquet", [1], text=["a"], caption=["x"])
    with pytest.raises(ValueError, match="Several columns could be the caption"):
        load_captions(path)


def test_a_saved_dataset_and_a_folder_with_metadata(tmp_path):
    DatasetDict({"train": table([1], caption=["a"]), "testing": table([2], caption=["b"])}).save_to_disk(
        str(tmp_path / "saved")
    )
    assert load_captions(tmp_path / "saved").captions == (("b",),)
    assert load_captions(tmp_path / "saved", split="train").captions == (("a",),)
    folder = tmp_path / "folder" / "test"
    folder.mkdir(parents=True)
    for shade, name in ((1, "x.png"), (2, "y.png")):
        (folder / name).write_bytes(png(shade))
    lines = [{"file_name": "y.png", "text": "two"}, {"file_name": "x.png", "text": "one"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_captions(tmp_path / "folder")
    assert dict(zip(shades_of(found), found.captions, strict=True)) == {1: ("one",), 2: ("two",)}


@pytest.mark.parametrize("captions", [[["a"], []], ["a", " "], ["a", None], [["a", None], ["b"]]])
def test_images_without_a_caption_are_refused_and_counted(tmp_path, captions):
    path = parquet(tmp_path / "test.parquet", [1, 2], caption=captions)
    with pytest.raises(ValueError, match="1 of the 2 images have no caption, or an empty one; the first is image"):
        load_captions(path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "validation"}, "has no split 'validation', but 'test'"),
        ({"caption_column": "words"}, "There is no column 'words'. Columns: image, caption. Set `caption_column`"),
        ({"caption_column": "image"}, "has no captions"),
        ({"image_column": "caption"}, "has no images but"),
    ],
)
def test_splits_and_columns_that_are_not_there_are_refused(tmp_path, settings, sentence):
    path = parquet(tmp_path / "test.parquet", [1], caption=["a"])
    with pytest.raises(ValueError, match=sentence):
        load_captions(path, **settings)


def test_nothing_of_that_name_is_told_with_the_names_that_are_known():
    with pytest.raises(FileNotFoundError, match=r"\(captions\)"):
        load_captions("./nowhere")


def test_the_fingerprint_tells_images_captions_and_their_order():
    base = CaptionedImages("x", table([1, 2], caption=["", ""]), (("a",), ("b", "c")))
    same = CaptionedImages("y", table([1, 2], caption=["", ""]), (("a",), ("b", "c")))
    others = [
        CaptionedImages("x", base.images, (("a", "b"), ("c",))),
        CaptionedImages("x", base.images, (("a",), ("bc",))),
        CaptionedImages("x", table([1, 3], caption=["", ""]), base.captions),
        base.select([1, 0]),
    ]
    assert base.fingerprint() == same.fingerprint()
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_a_sample_keeps_images_and_captions_together():
    shades = list(range(40))
    data = CaptionedImages("x", table(shades, caption=[""] * 40), tuple((f"a {shade}",) for shade in shades))
    some = data.sample(7)
    assert some.texts == [f"a {shade}" for shade in shades_of(some)] and len(set(some.texts)) == 7
    assert data.sample(7).texts == some.texts and data.sample(99) is data.sample(None) is data
    with pytest.raises(ValueError, match="40 images have captions for 39"):
        CaptionedImages("x", data.images, data.captions[:-1])


# ----------------------------------------------------------------------------------------------------- toy captions


def test_toy_captions_are_the_same_every_time_and_differ_between_splits():
    first, again = load_captions("captions"), load_captions("captions")
    assert first.fingerprint() == again.fingerprint() != load_captions("captions", split="validation").fingerprint()
    assert len(first) == 500 and len({*first.texts}) == len(first.texts) > 800


def test_every_toy_caption_is_true_of_one_image_alone(monkeypatch):
    from capt_peft.toy import captions

    drawn = []
    draw = captions.draw_facts
    monkeypatch.setattr(captions, "draw_facts", lambda facts, rng: drawn.append(facts) or draw(facts, rng))
    stated = []
    describe = captions.describe
    monkeypatch.setattr(captions, "describe", lambda facts, rng: stated.append(facts) or describe(facts, rng))
    found = captions.load_toy_captions(images=200)
    assert [len(drawn), len(stated)] == [200, len(found.texts)]
    for facts, owner in zip(stated, found.owners.tolist(), strict=True):
        assert [i for i, each in enumerate(drawn) if facts.items() <= each.items()] == [owner]
    for text, facts in zip(found.texts, stated, strict=True):
        assert all(facts[name] in text for name in ("color", "background", "shape", "letter", "count") if name in facts)


@pytest.mark.parametrize(
    ("settings", "sentence"), [({"split": "train"}, "no split 'train'"), ({"images": 0}, "images=0")]
)
def test_toy_captions_that_there_are_not_are_refused(settings, sentence):
    from capt_peft.toy.captions import load_toy_captions

    with pytest.raises(ValueError, match=sentence):
        load_toy_captions(**settings)


def test_toy_images_are_not_those_of_pre_training():
    from capt_peft.toy.images import draw

    rng = np.random.default_rng(0)
    trained = {draw(rng)[0].tobytes() for _ in range(500)}
    assert not trained & {image.tobytes() for image in load_captions("captions").images["image"]}
