"""k shots of a class, base and new classes, stratified splits."""

from itertools import pairwise

import numpy as np
import pytest

from capt_peft.data import sample_shots, split_classes
from capt_peft.data.sampling import stratified_split

LABELS = [2, 0, 1, 0, 2, 1, 0, 1, 2, 0, 0, 1, 2, 2, 1]


def test_every_class_gets_its_shots_without_repeats_and_in_ascending_order():
    chosen = sample_shots(LABELS, 3, seed=0)
    assert chosen == sorted(set(chosen))
    assert [sum(LABELS[i] == label for i in chosen) for label in range(3)] == [3, 3, 3]
    assert all(type(index) is int for index in chosen)


def test_the_same_seed_draws_the_same_images_and_another_seed_others():
    labels = np.repeat(np.arange(5), 100)
    assert sample_shots(labels, 4, seed=7) == sample_shots(list(labels), 4, seed=7)
    assert sample_shots(labels, 4, seed=7) != sample_shots(labels, 4, seed=8)


def test_the_draws_of_a_seed_are_nested():
    labels = np.repeat(np.arange(4), 30)
    draws = [set(sample_shots(labels, shots, seed=3)) for shots in (1, 4, 16, 30)]
    assert all(fewer < more for fewer, more in pairwise(draws))


def test_what_is_drawn_of_a_class_does_not_depend_on_the_other_classes():
    few, many = np.repeat([0, 1], [20, 20]), np.repeat([0, 1], [20, 500])
    assert sample_shots(few, 4, seed=1)[:4] == sample_shots(many, 4, seed=1)[:4]


def test_classes_of_equal_size_draw_different_places():
    chosen = np.array(sample_shots(np.repeat([0, 1], [100, 100]), 10, seed=0))
    assert set(chosen[:10]) != set(chosen[10:] - 100)


def test_the_draw_is_uniform_over_the_images_of_a_class():
    labels = [0] * 10
    counts = np.bincount([sample_shots(labels, 1, seed)[0] for seed in range(2000)], minlength=10)
    assert counts.min() > 140 and counts.max() < 260


def test_a_class_with_too_few_images_is_named_with_what_it_has_and_what_is_asked():
    with pytest.raises(ValueError, match=r"'owl' has 2 images, but 4 are asked.*allow_fewer"):
        sample_shots([0] * 5 + [1] * 2, 4, 0, class_names=["cat", "owl"])


def test_a_class_without_images_is_an_error_too():
    with pytest.raises(ValueError, match=r"'eel' has 0 images, but 1 are asked"):
        sample_shots([0, 1], 1, 0, class_names=["cat", "owl", "eel"])


def test_all_too_small_classes_are_counted():
    with pytest.raises(ValueError, match=r"'a' has 1 image, .* \(2 more classes have too few\)"):
        sample_shots([0, 1, 2], 2, 0, class_names=["a", "b", "c"])


def test_fewer_are_taken_when_allowed():
    chosen = sample_shots([0] * 5 + [1] * 2, 4, 0, class_names=["cat", "owl", "eel"], allow_fewer=True)
    assert len(chosen) == 6 and chosen[-2:] == [5, 6]


@pytest.mark.parametrize("shots", [0, -1, 1.5, "all"])
def test_shots_must_be_a_whole_number_from_one(shots):
    with pytest.raises(ValueError, match="at least 1"):
        sample_shots(LABELS, shots, 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, None])
def test_a_seed_must_be_a_whole_number_in_range(seed):
    with pytest.raises(ValueError, match="seed"):
        sample_shots(LABELS, 1, seed)


def test_labels_must_be_whole_numbers_with_a_class_name_each():
    with pytest.raises(ValueError, match="whole numbers"):
        sample_shots(["cat", "owl"], 1, 0)
    with pytest.raises(ValueError, match="no label"):
        sample_shots([0, -1], 1, 0)
    with pytest.raises(ValueError, match="Label 2 has no class name"):
        sample_shots(LABELS, 1, 0, class_names=["cat", "owl"])


@pytest.mark.parametrize(("classes", "base"), [(2, 1), (10, 5), (37, 19), (101, 51)])
def test_the_base_classes_are_the_first_half_rounded_up(classes, base):
    assert split_classes(classes) == (tuple(range(base)), tuple(range(base, classes)))


def test_one_class_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2"):
        split_classes(1)


def test_a_stratified_split_takes_the_share_of_every_class_and_every_image_once():
    labels = np.repeat([0, 1, 2], [10, 20, 31])
    parts = stratified_split(labels, (0.5, 0.2, 0.3), seed=0)
    assert sorted(index for part in parts for index in part) == list(range(61))
    assert [np.bincount(labels[part]).tolist() for part in parts] == [[5, 10, 16], [2, 4, 6], [3, 6, 9]]


def test_a_class_with_one_image_keeps_it_for_training():
    assert stratified_split([0], (0.3, 0.7), seed=0) == [[0], []]


def test_a_stratified_split_follows_its_seed():
    labels = [0] * 50
    assert stratified_split(labels, (0.5, 0.5), 1) == stratified_split(labels, (0.5, 0.5), 1)
    assert stratified_split(labels, (0.5, 0.5), 1) != stratified_split(labels, (0.5, 0.5), 2)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2)])
def test_fractions_must_be_positive_and_sum_to_one(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        stratified_split(LABELS, fractions, 0)
