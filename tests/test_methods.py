"""Whose word counts: one table of cases, through `capt-peft train` and through a benchmark's plan."""

import json
from pathlib import Path

import pytest
import yaml

from capt_peft import METHODS, CaptTrainingArguments
from capt_peft.benchmark import Plan, Suite, get_suite
from capt_peft.commands.train import parse_args
from capt_peft.methods import ADAPTERS, OBJECTIVE_SETTINGS, adapter_config, check_peft, conflicts, method_settings

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
SUITE = Suite("own", ("pets",), source="pets", shifts=())
NOT_MEASURED = {"pmg-aft"}  # without figures in the docs so far
# method, what is asked for, and what comes of it: settings, or a word of the refusal
CASES = [
    ("capt", {}, {"attack_loss": "ce", "weight_decay": 0.0, "lr_schedule": "step", "coupling": None, "init": None}),
    ("fap", {}, {"attack_loss": "kl", "coupling": "vision_to_text", "init": "random", "weight_decay": 5e-4, "squash": True}),
    ("fap", {"attack_loss": "margin"}, {"attack_loss": "margin", "weight_decay": 5e-4}),
    ("fap", {"attack_loss": "ce", "init": "template"}, {"attack_loss": "ce", "init": "template"}),
    ("fap", {"weight_decay": 0.0, "squash": False}, {"weight_decay": 0.0, "squash": False, "lr_schedule": "epoch"}),
    ("adv-tp", {"lr_schedule": "step", "text_depth": 1}, {"lr_schedule": "step", "text_depth": 1, "weight_decay": 5e-4}),
    ("fap", {"coupling": "vision_to_text"}, {"coupling": "vision_to_text"}),
    ("fap", {"coupling": "none"}, "'fap' has coupling='vision_to_text' by definition, but coupling='none'"),
    ("fap", {"weighting": "0.5"}, "weighting='0.5' has no effect on the method 'fap'"),
    ("trades-maple", {"coupling": "vision_to_text"}, "coupling='text_to_vision' by definition"),
    ("trades-maple", {"weighting": "entropy"}, "weighting='entropy' has no effect"),
    ("trades-maple", {"consistency": 3.0}, {"consistency": 3.0}),
    ("fap", {"frozen_term": "features"}, "frozen_term='features' has no effect on the method 'fap'"),
    ("capt", {"frozen_term": "features"}, {"frozen_term": "features", "coupling": None}),
    ("pmg-aft", {}, {"consistency": 1.0, "attack_loss": "ce", "coupling": None, "weight_decay": 0.0}),
    ("pmg-aft", {"consistency": 2.0, "coupling": "text_to_vision"}, {"consistency": 2.0, "coupling": "text_to_vision"}),
    ("pmg-aft", {"weighting": "0.5"}, "weighting='0.5' has no effect on the method 'pmg-aft'"),
    ("adv-maple", {}, {"coupling": "vision_to_text", "attack_loss": "ce", "decay_biases": True, "dataloader_drop_last": True}),
    ("adv-maple", {"coupling": "text_to_vision"}, "coupling='vision_to_text' by definition"),
    ("adv-vlp", {"coupling": "text_to_vision"}, "'adv-vlp' has coupling='none'"),
    ("adv-vlp", {"consistency": 3.0}, "consistency=3.0 has no effect on the method 'adv-vlp'"),
    ("adv-vlp", {"consistency": 1.5, "text_depth": 1}, {"consistency": 1.5, "text_depth": 1}),
    ("adv-vp", {"text_depth": 3}, "'adv-vp' has text_depth=0 by definition, but text_depth=3"),
    ("adv-vp", {"text_depth": 0, "vision_depth": 3}, {"text_depth": 0, "vision_depth": 3}),
    ("adv-vp", {"num_text_tokens": 4}, "num_text_tokens=4 has no effect"),
    ("adv-vp", {"teacher": "elsewhere"}, "teacher='elsewhere' has no effect"),
    ("adv-tp", {"vision_depth": 3}, "'adv-tp' has vision_depth=0 by definition"),
    ("adv-tp", {"num_vision_tokens": 4}, "num_vision_tokens=4 has no effect"),
    ("adv-tp", {"class_specific": True}, {"class_specific": True, "init": "normal", "attack_clip_each_step": False}),
    ("apt", {"vision_depth": 3}, "vision_depth=0 by definition"),
    ("apt", {"attack_clip_each_step": True}, {"attack_clip_each_step": True, "init": "normal"}),
]  # fmt: skip


# the same with another adapter than prompts
ADAPTER_CASES = [
    ("capt", {"peft": "lora"}, {"optim": "adamw_torch", "coupling": None, "init": None, "weight_decay": 0.0}),
    ("fap", {"peft": "ln"}, {"optim": "adamw_torch", "attack_loss": "kl", "squash": True, "coupling": None, "init": None}),
    ("adv-vlp", {"peft": "ia3", "learning_rate": 0.5}, {"learning_rate": 0.5, "coupling": None}),
    ("capt", {"peft": "boft", "optim": "sgd", "weighting": "entropy"}, {"optim": "sgd", "weighting": "entropy"}),
    ("capt", {"peft": "lora", "num_text_tokens": 4}, "num_text_tokens=4 is about prompts and has no effect on peft='lora'"),
    ("capt", {"peft": "lora", "strength": "auto"}, "strength='auto' is about prompts"),
    ("capt", {"peft": "lora", "coupling": "text_to_vision"}, "coupling='text_to_vision' is about prompts"),
    ("fap", {"peft": "lora", "weighting": "0.5"}, "weighting='0.5' has no effect on the method 'fap'"),
    ("adv-vp", {"peft": "lora"}, "'adv-vp' is what its prompts are"),
    ("trades-maple", {"peft": "lora"}, "choose capt, fap, pmg-aft, adv-vlp"),
    ("capt", {"peft": "magic"}, "Unknown peft 'magic'. Allowed: prompts, lora, ln, ia3, boft."),
]  # fmt: skip


def through_the_command_line(method, asked, tmp_path):
    flags = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in asked.items()]
    return parse_args(["--model_name_or_path", "model", "--method", method, *flags])


def through_a_file(method, asked, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"method": method, **asked}))
    return parse_args(["--config", str(tmp_path / "run.yaml")])


def through_both(method, asked, tmp_path):
    """The method on the command line, and the settings in the file."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"method": "capt", **asked}))
    return parse_args(["--config", str(tmp_path / "run.yaml"), "--method", method])


def cell_of(**plan):
    return Plan(SUITE, "model", protocols=("few-shot",), shots=(1,), seeds=(0,), **plan).cells()[0]


PLANS = {
    "settings": lambda method, asked: cell_of(methods=(method,), settings=asked),
    "the method's settings": lambda method, asked: cell_of(methods=(method,), method_settings={method: asked}),
    "a variant": lambda method, asked: cell_of(methods=(method,), variants={"x": asked}),
}


@pytest.mark.parametrize("way", [through_the_command_line, through_a_file, through_both])
@pytest.mark.parametrize(("method", "asked", "outcome"), CASES + ADAPTER_CASES)
def test_what_is_asked_of_train_wins_or_is_refused(method, asked, outcome, way, tmp_path):
    if isinstance(outcome, str):
        with pytest.raises(ValueError) as caught:
            way(method, asked, tmp_path)
        assert outcome in str(caught.value)
        return
    script, args = way(method, asked, tmp_path)
    found = {**vars(args), **vars(script)}
    assert {name: found[name] for name in outcome} == outcome


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize(("method", "asked", "outcome"), CASES)
def test_what_is_asked_of_a_benchmark_wins_or_is_refused(method, asked, outcome, way):
    if isinstance(outcome, str):
        with pytest.raises(ValueError) as caught:
            PLANS[way](method, asked)
        assert outcome in str(caught.value)
        return
    cell = PLANS[way](method, asked)
    found = cell.settings | cell.prompts
    plain = {"attack_loss": "ce", "weight_decay": 0.0, "lr_schedule": "step", "coupling": None, "init": None}
    assert {name: found.get(name, plain.get(name)) for name in outcome} == outcome


@pytest.mark.parametrize("asked", ["augment", "squash"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero-shot"])
def test_of_squash_and_augment_a_method_has_the_one_that_is_asked_for(method, asked):
    found = method_settings(method, {asked: True})
    CaptTrainingArguments("x", **{name: found.get(name, False) for name in ("augment", "squash")})  # refuses both
    assert found[asked]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero-shot"])
def test_what_a_method_is_and_has_no_use_for_is_refused_in_every_setting(method):
    """Swept, so that a method of tomorrow is held to it."""
    recipe = METHODS[method]
    for name, value in recipe.fixed.items():
        assert conflicts(method, {name: value}) == {}
        with pytest.raises(ValueError, match=name):
            method_settings(method, {name: f"not {value}"})
    for name in recipe.unused:
        with pytest.raises(ValueError, match=name):
            method_settings(method, {name: "something else"})
    for name in recipe.defaults:
        assert method_settings(method, {name: "asked"})[name] == "asked"
    assert not set(recipe.defaults) & {*recipe.fixed, *recipe.unused}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero-shot"])
def test_a_method_uses_the_settings_that_its_objective_reads_and_no_others(method):
    """A setting that a new objective brings is without effect on the methods that do not name it."""

    class Read:
        def __init__(self):
            self.names = set()

        def __getattr__(self, name):
            self.names.add(name)
            return getattr(CaptTrainingArguments("out"), name)

    read = Read()
    METHODS[method].objective(read)
    assert read.names == {*METHODS[method].uses} - {"teacher"}
    assert read.names <= {*OBJECTIVE_SETTINGS}


def test_settings_for_all_methods_reach_those_that_take_them(caplog):
    """As with FAP's protocol: its text_depth is for all methods but those that have no deep text prompts."""
    with caplog.at_level("INFO"):
        plan = Plan(
            SUITE, "model", ("adv-vp", "fap", "zero-shot"), ("few-shot",), (1,), (0,), settings={"text_depth": 9}
        )
        vp, fap, _ = plan.cells()
    assert (vp.prompts["text_depth"], fap.prompts["text_depth"]) == (0, 9)
    assert "'adv-vp' has text_depth=0 by definition" in caplog.text


@pytest.mark.parametrize("name", ["fap", "apt"])
def test_a_published_protocol_is_that_of_the_methods_recipe_and_runs_with_all_methods(name):
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    recipe = METHODS["adv-tp" if name == "apt" else name]
    given = {**recipe.defaults, **recipe.fixed}
    assert {key: content.get(key, given[key]) for key in given} == given
    names = {f for kind in ("settings", "prompts") for f in getattr(cell_of(methods=(name,)), kind)}
    shared = {
        key: value for key, value in content.items() if key in names | {"text_depth", "vision_depth", "num_text_tokens"}
    }
    cells = Plan(SUITE, "model", protocols=("few-shot",), shots=(1,), seeds=(0,), settings=shared).cells()
    assert [cell.method for cell in cells] == list(METHODS)


def test_the_figures_in_the_docs_are_of_the_methods_as_they_are():
    """A changed recipe makes another cell; the lines of the old one must not stay in the tables of the new."""
    keys = {json.loads(line)["key"] for line in (ROOT / "docs/results/toy/lines.jsonl").read_text().splitlines()}
    cells = Plan(get_suite("toy"), "examples/tiny_clip").cells()
    assert {cell.method for cell in cells if cell.key not in keys} == NOT_MEASURED


def test_the_digits_settings_which_are_capts_do_not_hinder_other_methods():
    for method in ("fap", "adv-tp", "adv-vp", "adv-maple"):
        script, _ = parse_args(["--method", method])
        assert script.num_vision_tokens == (16 if method == "adv-vp" else None)


@pytest.mark.parametrize(
    ("peft", "settings", "words"),
    [
        ("lora", {"rank": 4}, "'rank' is not a setting of lora. See PEFT's LoraConfig"),
        ("lora", {"task_type": "FEATURE_EXTRACTION"}, "'task_type' is not a setting"),
        (
            "lora",
            {"r": 4, "use_dora": True, "use_bdlora": 1, "target_modules": ["q_proj"], "eva_config": 3},
            "peft_kwargs=",
        ),
        ("prompts", {"r": 4}, "has no effect on prompts"),
    ],
)
def test_settings_of_an_adapter_are_those_that_peft_knows(peft, settings, words):
    with pytest.raises(ValueError, match=words):
        check_peft("capt", peft, settings)


@pytest.mark.parametrize("peft", ADAPTERS)
def test_settings_of_an_adapter_win_over_its_recipe(peft):
    config = adapter_config(
        peft, {"target_modules": ["q_proj"], **({"feedforward_modules": []} if peft == "ia3" else {})}
    )
    assert (
        list(config.target_modules) == ["q_proj"] and config.peft_type.value == ADAPTERS[peft].config().peft_type.value
    )


def test_the_digits_settings_of_prompts_are_not_taken_for_another_adapter():
    script, args = parse_args(["--peft", "lora", "--use_cpu", "--peft_kwargs", '{"r": 4}'])
    assert args.epsilon == "10/255" and args.num_train_epochs == 60 and args.optim == "adamw_torch"
    assert args.learning_rate == ADAPTERS["lora"].training["learning_rate"] and not script.prompts().get(
        "num_vision_tokens"
    )
    assert script.adapter_settings == {"r": 4}
    script, _ = parse_args(["--peft", "lora", "--use_cpu", "--peft_kwargs", "4"])
    with pytest.raises(ValueError, match="peft_kwargs='4' must be a JSON object"):
        _ = script.adapter_settings
