"""Procedural images, their captions, and the tasks made of them and of the scanned digits."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from pyarrow.parquet import read_schema

from capt_peft import list_tasks, load_task
from capt_peft.toy import images as toy
from capt_peft.toy import tasks as toy_tasks
from capt_peft.toy.glyphs import DIGITS, FONTS, LETTERS, STROKES, glyph_mask, hand_strokes, parse_strokes

SMALL = {"train_per_class": 2, "validation_per_class": 1, "test_per_class": 1}


@pytest.fixture(scope="module")
def drawings() -> list[tuple[Any, toy.Facts]]:
    rng = np.random.default_rng(0)
    return [toy.draw(rng) for _ in range(800)]


def pixels(images: Any) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_images_are_rgb_of_32_pixels_and_differ(drawings: list[tuple[Any, toy.Facts]]) -> None:
    assert {(image.mode, image.size) for image, _ in drawings} == {("RGB", (32, 32))}
    assert len(set(pixels(image for image, _ in drawings))) == len(drawings)


def test_the_same_state_draws_the_same_image_and_caption() -> None:
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(30):
        (image, facts), (same, same_facts) = toy.draw(first), toy.draw(second)
        assert image.tobytes() == same.tobytes() and facts == same_facts
        assert toy.caption(facts, first) == toy.caption(facts, second)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    toy.draw(np.random.default_rng(0))
    assert (np.random.get_state()[1] == before).all()  # type: ignore[union-attr]


def test_every_value_is_drawn_and_every_kind_too(drawings: list[tuple[Any, toy.Facts]]) -> None:
    for name, values in toy.FACTS.items():
        assert {facts[name] for _, facts in drawings if name in facts} == set(values), name


def test_pre_training_never_draws_a_held_out_pair(drawings: list[tuple[Any, toy.Facts]]) -> None:
    for pair in toy.HELD_OUT_PAIRS:
        with_pair = [facts for _, facts in drawings if set(pair) <= set(facts)]
        assert with_pair and not any(toy.is_held_out(facts, pair) for facts in with_pair), pair


def test_captions_state_only_what_the_image_shows(drawings: list[tuple[Any, toy.Facts]]) -> None:
    rng = np.random.default_rng(0)
    for _, facts in drawings:
        text, stated = toy.caption(facts, rng)
        assert stated and stated.items() <= facts.items()
        words = text.rstrip(".").split()
        for name, value in stated.items():
            if name not in ("number", "digit"):
                assert value.split()[0] in text, (text, stated)
        if "digit" in stated:
            assert words[words.index("digit" if "digit" in words else "number") + 1] in (
                stated["digit"],
                toy.NUMBER_WORDS[int(stated["digit"])],
            )


def test_a_plain_red_circle_is_red_in_its_middle_and_not_at_its_edge() -> None:
    facts = {"shape": "circle", "number": "one", "color": "red", "background": "blue", "size": "large"}
    for seed in range(10):
        image = toy.draw_facts(facts, np.random.default_rng(seed))
        red, _, blue = image.getpixel((16, 16))
        corner_red, _, corner_blue = image.getpixel((0, 0))
        assert red > 2 * blue and corner_blue > 2 * corner_red


@pytest.mark.parametrize("place", toy.FACTS["position"])
def test_a_shape_lies_where_its_position_says(place: str) -> None:
    facts = {"shape": "square", "number": "one", "color": "white", "background": "black", "size": "small"}
    bright = np.asarray(toy.draw_facts(facts | {"position": place}, np.random.default_rng(1)).convert("L")) > 128
    y, x = (int(axis.mean() * 3 / 32) for axis in np.nonzero(bright))
    assert toy.FACTS["position"].index(place) == 3 * y + x


@pytest.mark.parametrize("count", toy.FACTS["count"])
def test_shapes_of_a_count_lie_apart(count: str) -> None:
    facts = {"shape": "circle", "number": "many", "count": count, "color": "white", "background": "black"}
    bright = np.asarray(toy.draw_facts(facts, np.random.default_rng(3)).convert("L")) > 128
    blobs = 0
    while bright.any():
        blobs += 1
        edge = [tuple(np.argwhere(bright)[0])]
        while edge:
            y, x = edge.pop()
            if 0 <= y < 32 and 0 <= x < 32 and bright[y, x]:
                bright[y, x] = False
                edge += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    assert blobs == toy.FACTS["count"].index(count) + 2


@pytest.mark.parametrize("name", toy_tasks.TOY_TASKS)
def test_a_task_draws_balanced_splits_that_share_no_image_and_repeats_itself(name: str) -> None:
    task, again, other = (toy_tasks.load_toy_task(name, seed, **SMALL) for seed in (0, 0, 1))
    seen: list[bytes] = []
    for split, per_class in (("train", 2), ("validation", 1), ("test", 1)):
        assert sorted(task[split]["label"]) == sorted(list(range(task.num_classes)) * per_class)
        drawn = pixels(task[split]["image"])
        assert drawn == pixels(again[split]["image"]) != pixels(other[split]["image"])
        seen += drawn
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", toy_tasks.TOY_TASKS)
def test_every_image_of_a_task_holds_a_held_out_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[toy.Facts] = []
    plain = toy_tasks.draw_facts
    monkeypatch.setattr(toy_tasks, "draw_facts", lambda facts, rng: drawn.append(facts) or plain(facts, rng))
    toy_tasks.load_toy_task(name, **SMALL)
    assert drawn and all(toy.is_held_out(facts, toy_tasks.TOY_TASKS[name].held_out) for facts in drawn)


def test_unknown_tasks_and_empty_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes, colors"):
        toy_tasks.load_toy_task("dogs")
    with pytest.raises(ValueError, match="test_per_class is 0"):
        toy_tasks.load_toy_task("shapes", test_per_class=0)


def test_the_suite_has_eleven_tasks_and_three_shifts_that_load_task_knows() -> None:
    assert len(toy_tasks.TOY_TASKS) + 1 == 11 and len(toy_tasks.SHIFTS) == 3
    assert list_tasks()[:14] == toy_tasks.procedural_tasks()


@pytest.mark.parametrize("name", toy_tasks.SHIFTS)
def test_a_shift_has_test_images_alone_of_the_same_classes_that_look_different(name: str) -> None:
    task, plain = load_task(name), load_task("shapes")
    assert list(task.splits) == ["test"] and len(task["test"]) == 400
    assert task.class_names == plain.class_names and task.template == plain.template
    assert set(pixels(task["test"]["image"])).isdisjoint(pixels(plain["test"]["image"]))
    assert pixels(task["test"]["image"]) == pixels(load_task(name)["test"]["image"])


def test_a_sketch_is_gray_and_mostly_white_with_dark_lines_at_the_edges() -> None:
    facts = {"shape": "square", "number": "one", "color": "red", "background": "green", "size": "large"}
    image = toy_tasks.sketch(toy.draw_facts(facts, np.random.default_rng(0)), np.random.default_rng(0))
    drawn = np.asarray(image)
    assert (drawn == drawn[..., :1]).all() and np.median(drawn) > 200 and drawn.min() < 60
    assert drawn[16, 16].min() > 120, "inside a shape there is no edge"


def test_recoloured_images_keep_their_contours_in_other_colours() -> None:
    facts = {"shape": "circle", "number": "one", "color": "red", "background": "blue", "size": "large"}
    image = toy.draw_facts(facts, np.random.default_rng(3))
    other = np.asarray(toy_tasks.recolor(image, np.random.default_rng(1)), int)
    assert sorted(other[16, 16]) == sorted(255 - np.asarray(image, int)[16, 16])
    assert np.abs(other - np.asarray(image, int)).max(-1).mean() > 50


def test_corruptions_are_of_four_kinds_and_keep_the_size() -> None:
    facts = {"shape": "star", "number": "one", "color": "white", "background": "black", "size": "large"}
    image = toy.draw_facts(facts, np.random.default_rng(0))
    drawn = [toy_tasks.corrupt(image, np.random.default_rng(seed)) for seed in range(24)]
    assert {(other.mode, other.size) for other in drawn} == {("RGB", (32, 32))}
    assert len(set(pixels(drawn))) > 15 and image.tobytes() not in pixels(drawn)  # coarse ones repeat
    contrast = [np.asarray(other.convert("L"), float).std() for other in drawn]
    assert min(contrast) < 0.6 * np.asarray(image.convert("L"), float).std()


def test_digits_are_all_the_scans_in_stratified_splits_of_797_300_and_700() -> None:
    task = load_task("digits")
    assert {split: len(task[split]) for split in task.splits} == {"train": 797, "validation": 300, "test": 700}
    images = [image for split in task.splits for image in task[split]["image"]]
    assert len(set(pixels(images))) == 1797 and {(image.mode, image.size) for image in images} == {("RGB", (8, 8))}
    for split in task.splits:
        counts = np.bincount(task[split]["label"])
        assert len(counts) == 10 and counts.max() - counts.min() <= 0.07 * counts.mean() + 1


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "7f4232492770ba009837d0e896095a61d1094e9bb889d32a61db65d8d10041f2"),
        ("validation", "4e31f6a19114091d5799e64ca739912fde05bac836b181e7a5f973f7bb4944b4"),
        ("test", "9d603b2c86a0914a5f87ce115ae07d5d678d62123892549b49f844f5a91309b0"),
    ],
)
def test_digits_are_those_that_published_figures_are_of_in_their_order(split: str, expected: str) -> None:
    """SHA-256 of pixels and labels as scikit-learn's `load_digits` and `train_test_split(random_state=0)` gave them."""
    data = load_task("digits", seed=1)[split]
    assert hashlib.sha256(b"".join(pixels(data["image"])) + bytes(data["label"])).hexdigest() == expected


def test_the_file_of_the_digits_names_its_source_and_licence() -> None:
    metadata = read_schema(toy_tasks.DIGITS_FILE).metadata
    assert b"CC BY 4.0" in metadata[b"licence"] and b"10.24432/C50P49" in metadata[b"source"]


@pytest.mark.parametrize("font", FONTS)
def test_every_letter_and_digit_is_drawn_in_every_font(font: str) -> None:
    rng = np.random.default_rng(0)
    masks = {character: np.asarray(glyph_mask(character, font, rng)) for character in (*LETTERS, *DIGITS)}
    for character, mask in masks.items():
        assert mask.shape == (64, 64) and 0.02 < (mask > 128).mean() < 0.75, character
    assert len({mask.tobytes() for mask in masks.values()}) == 36


def test_strokes_that_meet_still_meet_when_jittered() -> None:
    upright, base = (
        hand_strokes("L", np.random.default_rng(0), 0.1)[0][:2],
        hand_strokes("L", np.random.default_rng(0), 0),
    )
    assert not np.allclose(upright, base[0][:2])
    for seed in range(20):
        first, second = hand_strokes("D", np.random.default_rng(seed), 0.1)
        assert np.allclose(first[0], second[0]) and np.allclose(first[-1], second[-1])


def test_a_curve_passes_through_its_points() -> None:
    line = hand_strokes("C", np.random.default_rng(0), 0.0)[0]
    points = [stroke for spelling in STROKES["C"] for _, stroke in parse_strokes(spelling)]
    assert any(all(np.isclose(line, point).all(1).any() for point in stroke) for stroke in points)


@pytest.mark.parametrize("spelling", ["-1", "-123", "x1020", "~00"])
def test_a_misspelt_stroke_is_refused(spelling: str) -> None:
    with pytest.raises(ValueError, match="two points"):
        parse_strokes(spelling)
