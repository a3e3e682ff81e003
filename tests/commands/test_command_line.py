"""The command line of every script: wrong input ends in one line on stderr that names the problem, and exit status 2."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import command
import pytest
from command import TRAINING, Parser, check_early, options_in, run, suggestion
from helpers import TINY_CLIP

from capt_peft import METHODS, CaptTrainingArguments, TrainingStopped, load_task
from capt_peft.benchmark import PROTOCOLS, SUITES
from capt_peft.methods import ALIASES

EXAMPLES = Path(__file__).parents[2] / "examples"
MORE = {"train": TRAINING, "adversarial_finetune": TRAINING, "demo": (*TRAINING, EXAMPLES / "train.py")}
SCRIPTS = ("train", "evaluate", "benchmark", "adversarial_finetune", "convert_backbone", "demo", "app")
WRONG = [
    ("train --epsilonn 1/255", "There is no option --epsilonn; did you mean --epsilon?"),
    ("train --learning-rat=0.1", "did you mean --learning_rate?"),
    ("train -epsilon 1/255", "There is no option -epsilon; did you mean --epsilon?"),
    ("train --xyzzy", "There is no option --xyzzy; --help lists all options."),
    ("train --eval_limit few", "invalid int value: 'few'"),
    ("train digits", "'digits' belongs to no option"),
    ("train --epsilon", "expected one argument"),
    ("train --epsilon 4", "more than the whole range of a pixel"),
    ("train --epsilon=-1/255", "must be finite and at least 0"),
    ("train --norm l3", "unknown norm 'l3'"),
    ("train --eval_attack pdg-20", "Did you mean pgd-20?"),
    ("train --method cpat", "Did you mean capt?"),
    ("train --method zero-shot", "tunes nothing"),
    ("train --shots 5000", "the smallest class, '8', has 77 training images"),
    ("train --shots few", "shots='few' must be a number or 'all'"),
    ("train --dataset_name digitz", "Did you mean digits?"),
    ("train --dataset_name ./nowhere", "There is no folder or file ./nowhere (--dataset_name)"),
    ("train --eval_split tset", "Did you mean test?"),
    ("train --model_name_or_path ./nowhere", "There is no folder ./nowhere (--model_name_or_path)"),
    ("train --model_name_or_path {examples}/tiny_clp", "Did you mean {examples}/tiny_clip?"),
    ("train --model_name_or_path no/such", "no/such is neither a folder here nor a Hub model in the cache"),
    ("train --model_name_or_path {examples}/configs", "cannot be loaded"),
    ("train --teacher ~/no/such/teacher", "There is no folder ~/no/such/teacher"),
    ("train --config nowhere.yaml", "There is no file nowhere.yaml (--config)"),
    ("train --save_strategy sometimes", "sometimes"),
    ("train --eval_strategy steps --save_strategy epoch --load_best_model_at_end", "do not fit together"),
    ("evaluate", "Give --adapter"),
    ("evaluate --adaptor x", "did you mean --adapter?"),
    ("evaluate --adapter ./nowhere", "There is no folder ./nowhere (--adapter)"),
    ("evaluate --adapter no/such", "--adapter no/such is neither a folder here nor a Hub model in the cache"),
    ("evaluate --base {tiny} --attacks pdg-20", "Did you mean pgd-20?"),
    ("evaluate --base {tiny} --split tset", "has no split 'tset'"),
    ("evaluate --base {tiny} --use_cpu maybe", "use_cpu"),
    ("evaluate --base {tiny} --update_card", "--update_card needs a local --adapter"),
    ("evaluate --base {tiny} --dtype int8", "dtype='int8'"),
    ("benchmark --suite tyo", "Did you mean toy?"),
    ("benchmark --method capt", "did you mean --methods?"),
    ("benchmark --methods cpat", "Did you mean capt?"),
    ("benchmark --tasks digitz", "Did you mean digits?"),
    ("benchmark --settings learning_rat=1", "Did you mean learning_rate?"),
    ("benchmark --suite paper --root ./nowhere --model_name_or_path {tiny}", "There is no folder ./nowhere (--root)"),
    ("adversarial_finetune --objective fear", "objective='fear' is unknown"),
    ("adversarial_finetune --drawn_image 3", "did you mean --drawn_images?"),
    ("adversarial_finetune --consistency 2", "--consistency has no effect here"),
    ("convert_backbone", "the following arguments are required"),
    ("convert_backbone --checkpoint nowhere.pt --output {out}", "There is no file nowhere.pt (--checkpoint)"),
    ("convert_backbone --checkpoint {tiny}/config.json --output {examples}/configs", "is not empty"),
    ("demo --output_dir x", "The demo sets --output_dir itself"),
    ("demo --epochs 3", "There is no option --epochs"),
    ("app --adapter ./nowhere", "There is no folder ./nowhere (--adapter)"),
    ("app --prot 3", "did you mean --port?"),
    ("app --adapter {examples}/configs", "{examples}/configs is not an adapter: it has no adapter_config.json"),
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_status_2(line, words, elsewhere, monkeypatch, capfd):
    places = {"examples": EXAMPLES, "tiny": TINY_CLIP, "out": elsewhere / "converted"}
    name, *arguments = line.format(**places).split()
    if name == "app":
        pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'capt-peft[app]'")
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.chdir(elsewhere)
    with pytest.raises(SystemExit) as ended:
        check_early(str(EXAMPLES / f"{name}.py"), *MORE.get(name, ()))
        run(module.demo if name == "demo" else module.main)
    told = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    (line,) = [line for line in told if line.startswith(f"{name}.py: ")]
    assert words.format(**places) in line and len(line) < 900 and not any("Traceback" in line for line in told)
    assert not list(elsewhere.iterdir())


# ------------------------------------------------------------------------------------------------- real processes


def launch(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_wrong_options_are_told_before_torch_is_imported():
    code = """
import runpy, sys
sys.argv = ["train.py", "--epsilonn", "1/255"]
try:
    runpy.run_path(sys.path[0] + "/train.py", run_name="__main__")
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""
    status, out, err = launch("-c", f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n{code}")
    assert (status, out) == (0, "2 False\n")
    assert err == "train.py: There is no option --epsilonn; did you mean --epsilon?\n"


def test_a_script_ends_with_one_line():
    status, out, err = launch(EXAMPLES / "evaluate.py", "--adapter", "./nowhere")
    assert (status, out, err) == (2, "", "evaluate.py: There is no folder ./nowhere (--adapter).\n")


# ------------------------------------------------------------------------------------------------- what a main raises


def test_the_traceback_is_shown_after_debug(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--base", TINY_CLIP, "--epsilon", "300", "--debug"])
    with pytest.raises(ValueError, match="epsilon='300' is more than"):
        run(importlib.import_module("evaluate").main)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for bug in (
        ZeroDivisionError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
    ):  # not raised by a script

        def main(argv, bug=bug):
            raise bug("x")

        with pytest.raises(bug):
            run(main)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (TrainingStopped("The loss is not finite."), 1, "The loss is not finite."),
        (OSError(28, "No space left on device", "/out"), 2, "/out: No space left on device."),
        (FileNotFoundError("a long story\nin many lines"), 2, "a long story"),
    ],
)
def test_what_ends_a_run_has_its_sentence(error, status, words, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status and capsys.readouterr().err == f"train.py: {words}\n"


def test_of_several_processes_the_first_one_tells_what_all_see(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epsilonn", "1"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        check_early(str(EXAMPLES / "train.py"), *TRAINING)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("Unknown method 'cpat'. Allowed: zero-shot, capt.", "capt"),
        ("'digit' is not a task of the catalog (digits, shapes) and no file or folder here.", "digits"),
        ("Task 'digits' has no split 'tset'; it has train, validation, test.", "test"),
        ("Unknown protocols few-shots. Allowed: few-shot, base-to-new.", "few-shot"),
        ("Unknown method 'magic'. Allowed: zero-shot, capt.", None),
        ("Class '0' has 79 images, but 1000 are asked.", None),
    ],
)
def test_the_name_that_was_probably_meant_is_suggested(message, name):
    assert suggestion(message) == (f" Did you mean {name}?" if name else "")


# ------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_options_that_are_read_from_the_source_are_those_that_are_parsed(name, monkeypatch):
    if name == "app":
        pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'capt-peft[app]'")
    module = importlib.import_module(name)
    parsed = []

    def note(self, *args, **kwargs):
        parsed.extend(option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--")
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_known_args", note)
    with pytest.raises(SystemExit):
        (module.demo if name == "demo" else module.main)([])
    known = options_in(*MORE.get(name, ()), EXAMPLES / f"{name}.py")
    assert {option.replace("-", "_") for option in parsed} - {"help"} == {
        *known, *(f"no_{name}" for name, option in known.items() if option.default is True),
    }  # fmt: skip


def test_the_help_of_training_describes_every_option():
    options = options_in(*TRAINING, EXAMPLES / "train.py")
    silent = {name for name, option in options.items() if not option.help and not name.startswith("log_level")}
    assert not silent, silent
    assert options["learning_rate"].default == CaptTrainingArguments("out").learning_rate


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_shown_without_imports(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        check_early(str(EXAMPLES / f"{name}.py"), *MORE.get(name, ()))
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--debug" in shown
    if name not in MORE:  # transformers has some options without a description
        assert all(option.help for option in options_in(EXAMPLES / f"{name}.py").values())
    if name == "benchmark":
        assert all(word in shown for word in (*METHODS, *ALIASES, *PROTOCOLS, *SUITES))


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_what_messages_of_load_task_recommend_is_an_option(name):
    options = {*options_in(EXAMPLES / f"{name}.py")} | {"dataset_config"}
    renamed = {"name_or_path": "dataset_name", "name": "dataset_config"}
    recommended = {renamed.get(word, word) for word in inspect.signature(load_task).parameters} - {"seed", "revision"}
    assert recommended <= options


def test_a_hub_id_is_not_taken_for_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    paths = ("./a", "/a/b", "~/a", "a/", "a/b/c", "outputs/demo", "..", ".")
    assert all(map(command.is_path, paths))
    assert not any(map(command.is_path, ("openai/clip-vit-base-patch32", "gpt2", "digits", "a b")))
