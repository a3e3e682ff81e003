"""Plans: which cells they have, what identifies a cell and an adapter, whose settings win, and what is refused."""

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from capt_peft.benchmark import PROTOCOLS, Cell, Plan, Suite, Target, get_suite
from capt_peft.methods import METHODS
from capt_peft.objectives import WEIGHTINGS

TOY, PAPER = get_suite("toy"), get_suite("paper")
PARTS = Path(__file__).parents[2] / "examples" / "configs" / "parts.yaml"
CELL = Cell(
    suite="toy", protocol="few-shot", method="capt", variant="", task="digits", shots=4, seed=0, split="test",
    model="examples/tiny_clip", epsilon="4/255", norm="linf", attacks=("pgd-20", "square-10"), eval_step_size=None,
    limit=100, targets=(Target("digits"),), settings={"learning_rate": 0.3, "max_steps": 40},
    prompts={"text_depth": 1, "coupling": "none"},
)  # fmt: skip
OTHER = {
    "suite": "paper", "protocol": "shift", "method": "fap", "variant": "x", "task": "shapes", "shots": "all", "seed": 1,
    "split": "validation", "model": "elsewhere", "epsilon": "8/255", "norm": "l2", "attacks": ("pgd-20",),
    "eval_step_size": "1/255", "limit": None, "targets": (Target("digits", "new"),), "settings": {"learning_rate": 0.1},
    "prompts": {"text_depth": 1, "coupling": "text_to_vision"}, "evaluation_protocol": "fap", "defence": "identity",
}  # fmt: skip
MEASURED = {
    "suite", "variant", "split", "attacks", "eval_step_size", "limit", "targets", "evaluation_protocol", "defence",
}  # fmt: skip


def plan(*methods, suite=TOY, protocols=("few-shot",), shots=(1,), seeds=(0,), tasks=("digits",), **changes):
    return Plan(suite, "model", methods or ("capt",), protocols, shots, seeds, tasks, **changes)


def only(cells):
    (cell,) = cells
    return cell


# ----------------------------------------------------------------------------------------------------- which cells


def test_the_whole_toy_comparison_has_every_method_task_shot_and_seed_and_zero_shot_once():
    cells = Plan(TOY, "model").cells()
    tuned, tasks, halved, seeds = len(METHODS) - 1, 11, 10, 3  # sizes has 3 classes, too few to halve
    zero_shot = Counter(cell.protocol for cell in cells if cell.method == "zero-shot")
    assert zero_shot == {"few-shot": tasks, "base-to-new": halved, "cross-dataset": 1, "shift": 1}
    assert Counter(cell.protocol for cell in cells if cell.method != "zero-shot") == {
        "few-shot": tuned * tasks * 4 * seeds,
        "base-to-new": tuned * halved * seeds,
        "cross-dataset": tuned * seeds,
        "shift": tuned * seeds,
    }
    assert len({cell.key for cell in cells}) == len(cells)


def test_zero_shot_is_the_same_cell_whatever_is_tuned():
    """It has neither shots nor seeds nor variants, and settings of tuning do not change its key."""
    few = plan(
        "zero-shot", "capt", shots=(1, 4), seeds=(5, 6), variants={"a": {"consistency": 1.0}, "b": {"text_depth": 2}}
    )
    cells = [cell for cell in few.cells() if cell.method == "zero-shot"]
    assert only(cells).key == only(plan("zero-shot", seeds=(5,), settings={"learning_rate": 3.0}).cells()).key
    assert (cells[0].shots, cells[0].seed, cells[0].variant, cells[0].settings, cells[0].prompts) == (0, 5, "", {}, {})
    assert len(few.cells()) == 1 + 2 * 2 * 2


def test_zero_shot_is_measured_again_under_another_threat_model():
    cells = plan("zero-shot", variants={"weak": {"epsilon": "1/255"}, "strong": {"epsilon": "8/255"}}).cells()
    assert [cell.epsilon for cell in cells] == ["1/255", "8/255"]


def test_all_cells_of_a_seed_come_before_those_of_the_next():
    cells = plan("capt", "fap", protocols=PROTOCOLS, seeds=(2, 0, 1)).cells()
    assert [cell.seed for cell in cells] == sorted((cell.seed for cell in cells), key=[2, 0, 1].index)
    per_seed = [[str(replace(cell, seed=0)) for cell in cells if cell.seed == seed] for seed in (2, 0, 1)]
    assert per_seed[0] == per_seed[1] == per_seed[2] and len(per_seed[0]) == 2 * 4


def test_settings_of_a_method_may_use_its_alias_and_no_unknown_name():
    cell = only(plan("apt", method_settings={"apt": {"learning_rate": 0.007}}).cells())
    assert cell.settings["learning_rate"] == 0.007
    with pytest.raises(ValueError, match="Unknown method 'atp'"):
        plan("apt", method_settings={"atp": {"learning_rate": 0.007}}).cells()


def test_what_is_asked_twice_is_one_cell():
    assert len(plan("apt", "adv-tp", shots=(1, 1), seeds=(0, 0), tasks=("digits", "digits")).cells()) == 1


@pytest.mark.parametrize(
    ("protocol", "task", "shots", "targets"),
    [
        ("few-shot", "digits", 1, [("digits", "all")]),
        ("base-to-new", "digits", 4, [("digits", "base"), ("digits", "new")]),
        ("cross-dataset", "shapes", 4, [("shapes", "all"), ("digits", "all")]),
        ("shift", "shapes", 4, [("shapes", "all"), *[(name, "all") for name in TOY.shifts]]),
    ],
)
def test_each_protocol_tunes_and_measures_what_its_name_says(protocol, task, shots, targets):
    cell = only(plan(protocols=(protocol,), transfer_shots=4).cells())
    assert (cell.task, cell.shots) == (task, shots)
    assert [(target.task, target.classes) for target in cell.targets] == targets
    assert cell.train_classes == ("base" if protocol == "base-to-new" else "all")


def test_cross_dataset_measures_all_data_sets_and_the_source_once():
    cell = only(plan(protocols=("cross-dataset",), tasks=None).cells())
    assert cell.targets[0] == Target("shapes")
    assert sorted(target.task for target in cell.targets) == sorted(TOY.tasks)


def test_the_paper_suite_has_the_papers_data_sets_and_shifts():
    assert sorted(PAPER.tasks) == sorted([
        "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
        "dtd", "eurosat", "ucf101",
    ])  # fmt: skip
    assert PAPER.source == "imagenet"
    assert set(PAPER.shifts) == {"imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"}


def test_a_suite_without_shifts_has_no_cells_of_them():
    own = Suite("own", ("pets", "dtd"), source="pets", shifts=())
    assert {cell.protocol for cell in plan(suite=own, protocols=PROTOCOLS, tasks=None).cells()} == set(PROTOCOLS) - {
        "shift"
    }


def test_the_limit_is_the_suites_another_or_none():
    assert [only(plan(limit=limit).cells()).limit for limit in (None, 7, 0)] == [100, 7, None]


def test_the_attacks_are_the_suites_or_others():
    assert only(plan().cells()).attacks == ("pgd-20",) and only(plan(suite=PAPER, tasks=("dtd",)).cells()).attacks == (
        "pgd-100",
    )
    assert only(plan(attacks=["pgd-1", "square-5"]).cells()).attacks == ("pgd-1", "square-5")


# ------------------------------------------------------------------------------------------ published protocols


@pytest.mark.parametrize(
    ("name", "changes", "epsilon", "attacks", "step", "limit"),
    [
        ("fap", {}, "1/255", ("pgd-100",), "1/255", None),
        ("apt", {}, "4/255", ("pgd-100",), "1/255", None),
        ("apt", {"settings": {"epsilon": "1/255"}}, "1/255", ("pgd-100",), "1/1020", None),
        ("robustvlm", {"settings": {"epsilon": 4 / 255}}, "4/255", ("apgd-ce-100x5", "apgd-t"), None, 1000),
        ("ttc", {"attacks": ["pgd-10", "autoattack"]}, "1/255", ("pgd-10", "autoattack"), "1/255", None),
        ("fap", {"settings": {"epsilon": "1/255", "norm": "linf", "eval_step_size": "1/255"}, "limit": 0}, "1/255", ("pgd-100",),
         "1/255", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["capt", "zero-shot"])
def test_a_published_protocol_replaces_the_suites_attack_radius_and_images(
    method, name, changes, epsilon, attacks, step, limit
):
    cell = only(plan(method, evaluation_protocol=name, **changes).cells())
    assert (cell.evaluation_protocol, cell.protocol, cell.norm) == (name, "few-shot", "linf")
    assert (cell.epsilon, cell.attacks, cell.eval_step_size, cell.limit) == (epsilon, attacks, step, limit)
    assert Cell.from_dict(cell.to_dict()) == cell and cell.images_in("imagenet") == {"robustvlm": 5000}.get(name)


def test_cells_of_a_protocol_are_others_and_share_the_adapter_of_the_same_radius():
    mine = only(plan(settings={"epsilon": "1/255"}).cells())
    named = [only(plan(evaluation_protocol=name).cells()) for name in ("fap", "ttc")]
    assert len({mine.key, *(cell.key for cell in named)}) == 3
    assert {mine.training_key} == {cell.training_key for cell in named}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"attacks": ["pgd-20"]},
            r"attacks pgd-20 \(without pgd-100\) contradicts the protocol fap: pgd-100, step size 1/255",
        ),
        ({"limit": 20}, "limit=20 contradicts the protocol fap.*all images of the test split"),
        ({"split": "validation"}, "split=validation contradicts"),
        ({"settings": {"epsilon": "4/255"}}, "epsilon=4/255 contradicts the protocol fap.*epsilon 1/255"),
        ({"settings": {"norm": "l2"}}, "norm=l2 contradicts"),
        ({"settings": {"eval_step_size": "1/510"}}, "eval_step_size=1/510 contradicts"),
        ({"method_settings": {"capt": {"epsilon": "2/255"}}}, "epsilon=2/255 contradicts"),
        ({"variants": {"a": {"epsilon": "few"}}}, "epsilon=few contradicts"),
        ({"evaluation_protocol": "few-shot"}, "Unknown protocol 'few-shot'"),
        (
            {"protocols": ("fap",)},
            r"Unknown protocols fap\..* fap is a published evaluation protocol: --protocol fap\.",
        ),
    ],
)
def test_what_contradicts_a_published_protocol_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"evaluation_protocol": "fap", **changes})


# ------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_the_same_in_every_process_and_version():
    """Were it another one, finished cells would run again; written down, it also holds for another process's hash seed."""
    assert CELL.key == "9b9970f0298a"
    turned = replace(CELL, settings=dict(reversed(CELL.settings.items())), prompts=dict(reversed(CELL.prompts.items())))
    assert turned.key == CELL.key and turned.training_key == CELL.training_key


def test_every_field_has_another_value_to_be_tried_with():
    assert set(OTHER) == {field.name for field in fields(Cell)}


@pytest.mark.parametrize("name", OTHER)
def test_any_field_changes_the_key(name):
    assert getattr(CELL, name) != OTHER[name]
    assert replace(CELL, **{name: OTHER[name]}).key != CELL.key


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"protocol"}))
def test_the_adapter_is_another_one_just_if_the_tuning_is(name):
    changed = replace(CELL, **{name: OTHER[name]})
    assert (changed.training_key == CELL.training_key) == (name in MEASURED)


def test_protocols_share_adapters_but_for_base_to_new_which_is_tuned_on_half_of_the_classes():
    keys = [
        replace(CELL, protocol=protocol).training_key
        for protocol in ("few-shot", "cross-dataset", "shift", "base-to-new")
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_cell_is_written_in_json_types_and_read_by_people():
    content = CELL.to_dict()
    assert content["attacks"] == ["pgd-20", "square-10"] and content["targets"] == [
        {"task": "digits", "classes": "all"}
    ]
    assert set(content) == set(OTHER) - {"defence", "evaluation_protocol"}  # as in lines from before there were any
    named = replace(CELL, evaluation_protocol="fap", defence="identity")
    assert set(named.to_dict()) == set(OTHER)
    assert [Cell.from_dict(each.to_dict()) for each in (CELL, named)] == [CELL, named]
    assert str(replace(CELL, evaluation_protocol="fap")) == "few-shot: capt on digits, 4 shots, seed 0, protocol fap"
    assert str(CELL) == "few-shot: capt on digits, 4 shots, seed 0"
    assert str(replace(CELL, shots=1, variant="deep")) == "few-shot: capt (deep) on digits, 1 shot, seed 0"
    assert str(replace(CELL, method="zero-shot", shots=0)) == "few-shot: zero-shot on digits, seed 0"


# --------------------------------------------------------------------------------------------------------- settings

LAYERS = (
    {"consistency": 1.0, "attack_loss": "suite", "text_depth": 1, "epsilon": "1/255", "augment": True},
    {"consistency": 2.0, "attack_loss": "tuned", "text_depth": 2, "epsilon": "2/255"},
    {"consistency": 3.0, "attack_loss": "given", "text_depth": 3},
    {"attack_loss": "margin", "text_depth": 4, "epsilon": "4/255"},
    {"text_depth": 5},
)  # fmt: skip


def layered(count):
    """The settings of FAP with the first layers: the suite's, its method's, those given, for this method, and a variant's."""
    suite, tuned, given, own, variant = (*LAYERS[:count], *[{}] * (5 - count))
    suite = replace(TOY, settings=suite, method_settings={"fap": tuned, "capt": {"text_depth": 9}})
    made = plan(
        "fap",
        suite=suite,
        settings=given,
        method_settings={"fap": own, "capt": {"text_depth": 9}},
        variants={"": variant},
    )
    cell = only(made.cells())
    return cell.settings | cell.prompts | {"epsilon": cell.epsilon}


def test_settings_win_in_their_order_over_the_recipe_and_the_method_stays_what_it_is():
    recipe = {**METHODS["fap"].defaults, **METHODS["fap"].fixed}
    assert layered(0) == {**recipe, "epsilon": "4/255"}
    recipe = {name: value for name, value in recipe.items() if name != "squash"} | {"augment": True}
    assert layered(1) == {**recipe, "attack_loss": "suite", "consistency": 1.0, "text_depth": 1, "epsilon": "1/255"}
    assert layered(2) == {**recipe, "attack_loss": "tuned", "consistency": 2.0, "text_depth": 2, "epsilon": "2/255"}
    assert layered(3) == {**recipe, "attack_loss": "given", "consistency": 3.0, "text_depth": 3, "epsilon": "2/255"}
    assert layered(4) == {**layered(3), "attack_loss": "margin", "text_depth": 4, "epsilon": "4/255"}
    assert layered(5) == {**layered(4), "text_depth": 5}


def test_settings_go_where_they_are_used():
    given = {
        "learning_rate": 0.5,
        "teacher": "folder",
        "text_depth": 1,
        "norm": "l2",
        "epsilon": 0.5,
        "eval_step_size": "1/255",
    }
    cell = only(
        plan(suite=replace(TOY, settings={}, method_settings={}), settings=given | {"coupling": "none"}).cells()
    )
    assert cell.settings == {"learning_rate": 0.5, "teacher": "folder"}
    assert cell.prompts == {"coupling": "none", "text_depth": 1}
    assert (cell.norm, cell.epsilon, cell.eval_step_size) == ("l2", "0.5", "1/255")


def test_a_number_that_yaml_reads_as_a_word_is_a_number():
    words, numbers = {"learning_rate": "1e-3", "init_std": "2e-2"}, {"learning_rate": 0.001, "init_std": 0.02}
    assert (
        plan("adv-tp", suite=PAPER, tasks=["dtd"], settings=words).cells()
        == plan("adv-tp", suite=PAPER, tasks=["dtd"], settings=numbers).cells()
    )


def test_apt_is_another_name_of_adv_tp():
    (apt,), (adv_tp,) = plan("apt").cells(), plan("adv-tp").cells()
    assert apt == adv_tp and apt.method == "adv-tp"


def test_the_parts_of_capt_make_a_plan_whose_variants_all_differ():
    variants = yaml.safe_load(PARTS.read_text())["variants"]
    cells = plan(protocols=("few-shot", "base-to-new"), variants=variants).cells()
    assert len(cells) == 2 * len(variants) >= 30
    assert len({cell.training_key for cell in cells}) == len(cells)
    assert {cell.variant for cell in cells} == set(variants)
    adaptive = {of["weighting"] for of in variants.values() if "weighting" in of and not of["weighting"][0].isdigit()}
    assert adaptive | {"confidence"} == set(WEIGHTINGS)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocols": ["few-shot", "one-shot"]}, "Unknown protocols one-shot. Allowed: few-shot, base-to-new, cross-dataset"),
        ({"tasks": ["digits", "dtd"]}, "Unknown tasks dtd. Allowed: digits, shapes"),
        ({"shots": [0]}, "shots=0 must be a whole number of at least 1, or 'all'"),
        ({"shots": [1, "many"]}, "shots='many'"),
        ({"transfer_shots": 1.5}, "shots=1.5"),
        ({"settings": {"learning_rat": 1, "eval_attack": "pgd-3"}}, "Unknown settings eval_attack, learning_rat: .*CaptConfig"),
        ({"variants": {"x": {"seed": 3}}}, "Unknown settings seed"),
        ({"settings": {"hub_token": "hf_secret"}}, "Unknown settings hub_token"),  # lines of a benchmark are for others to read
        ({"settings": {"class_names": ["a", "b"]}}, "Unknown settings class_names"),
        ({"split": "holdout"}, "Unknown splits holdout. Allowed: train, validation, test"),
        ({"limit": -1}, "limit=-1"),
        ({"settings": {"consistency": "high"}}, "'high'"),
        ({"attacks": ["pdg-20"]}, "unknown attack 'pdg-20'. Did you mean pgd-20"),
        ({"seeds": []}, "no seeds"),
        ({"seeds": [0, "x"]}, "seed='x' must be a whole number from 0 to 4294967295"),
        ({"seeds": [-1]}, "seed=-1"),
        ({"shots": []}, "no shots"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused_before_anything_runs(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(**changes).cells()


def test_an_unknown_method_is_refused_with_all_names():
    with pytest.raises(ValueError, match=r"Unknown method 'magic'. Allowed: zero-shot, capt, .*apt"):
        plan("magic").cells()


def test_an_unknown_suite_is_refused_with_all_names():
    with pytest.raises(ValueError, match=r"Unknown suite 'big'. Allowed: toy, paper"):
        get_suite("big")
