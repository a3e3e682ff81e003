"""The command line: wrong input ends in one line on stderr that names the problem, and exit status 2."""

import importlib
import inspect
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY_CLIP
from peft import get_peft_model
from transformers import CLIPModel

import capt_peft
from capt_peft import METHODS, CaptConfig, CaptTrainingArguments, TrainingStopped, load_task
from capt_peft.attacks import known_protocols
from capt_peft.benchmark import PROTOCOLS, SUITES
from capt_peft.commands import COMMANDS
from capt_peft.commands import main as command_line
from capt_peft.commands.ending import run, suggestion
from capt_peft.commands.options import WORDS, options_in, words_of
from capt_peft.commands.parser import Parser
from capt_peft.commands.places import CONFIGS, is_path
from capt_peft.methods import ALIASES

EXAMPLES = Path(__file__).parents[2] / "examples"
WRONG = [
    ("train --epsilonn 1/255", "There is no option --epsilonn; did you mean --epsilon?"),
    ("train --learning-rat=0.1", "did you mean --learning_rate?"),
    ("train -epsilon 1/255", "There is no option -epsilon; did you mean --epsilon?"),
    ("train --xyzzy", "There is no option --xyzzy; --help lists all options."),
    ("train --eval_limit few", "invalid int value: 'few'"),
    ("train digits", "'digits' belongs to no option"),
    ("train --learning_rate much", "argument --learning_rate: invalid float value: 'much'"),
    ("train --epsilon", "expected one argument"),
    ("train --epsilon 4", "more than the whole range of a pixel"),
    ("train --epsilon abc", "--epsilon: 'abc' is not a number: write a fraction"),
    ("train --epsilon=-1/255", "must be finite and at least 0"),
    ("train --norm l3", "Unknown norm 'l3'. Allowed: linf, l2, l1, patch."),
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
    ("train --model_name_or_path tiny_clp", "Did you mean tiny_clip?"),
    ("train --model_name_or_path no/such", "no/such is neither a folder here nor a Hub model in the cache"),
    ("train --model_name_or_path {examples}/configs", "cannot be loaded"),
    ("train --teacher ~/no/such/teacher", "There is no folder ~/no/such/teacher"),
    ("train --config nowhere.yaml", "There is no file nowhere.yaml (--config). The package has apt, digits"),
    ("benchmark --config serched", "There is no file serched (--config). Did you mean searched?"),
    ("train --save_strategy sometimes", "sometimes"),
    ("train --eval_strategy steps --save_strategy epoch --load_best_model_at_end", "do not fit together"),
    ("train --dataset_name ''", "--dataset_name is given without a value"),
    ("train --dataset_name=", "--dataset_name= is given without a value"),
    ("tasks ''", "--name is given without a value"),
    ("evaluate x --epsilon 1/255,abc", "'abc' is not a number"),
    ("benchmark --workers 0 --list", "workers=0 must be at least 1"),
    ("benchmark --suite own", "--suite own needs --tasks name=path,name=path."),
    ("push {adapter} a/b/c", "'a/b/c' cannot be a name on the Hub"),
    ("app --port 99999999", "port=99999999 must be between 0 and 65535"),
    ("trian", "There is no command trian; did you mean train?"),
    ("fine", "There is no command fine; did you mean finetune-backbone?"),
    ("xyzzy", "There is no command xyzzy; there are demo, train, evaluate,"),
    ("evaluate", "Give --adapter"),
    ("evaluate ./nowhere", "There is no folder ./nowhere (--adapter)"),
    ("evaluate {tiny} pgd-20", "'pgd-20' belongs to no option"),
    ("evaluate --adaptor x", "did you mean --adapter?"),
    ("evaluate --adapter ./nowhere", "There is no folder ./nowhere (--adapter)"),
    ("evaluate --adapter no/such", "--adapter no/such is neither a folder here nor a Hub model in the cache"),
    ("evaluate --base {tiny} --attacks pdg-20", "Did you mean pgd-20?"),
    (
        "evaluate {adapter} --dataset_name digits --attacks clean --limit 2 --use_cpu --template 'a {{}}.'",
        "would overwrite 2. Put more words before {{}}, or tune with fewer text prompts (--num_text_tokens).",
    ),
    ("evaluate --base {tiny} --split tset", "has no split 'tset'"),
    ("evaluate --base {tiny} --use_cpu maybe", "use_cpu"),
    ("evaluate --base {tiny} --update_card", "--update_card needs a local --adapter"),
    ("evaluate --base {tiny} --dtype int8", "dtype='int8'"),
    ("calibrate", "Give the folder of a CAPT adapter"),
    ("calibrate {adapter} --split train", "has the images that it was tuned on"),
    ("calibrate {adapter} --false_rejection 0.1", "did you mean --false_rejection_rate?"),
    ("calibrate {adapter}", "which would say what it was tuned on: give --dataset_name."),
    ("strength", "Give the folder of a CAPT adapter"),
    ("strength {adapter} --split test", "makes their accuracy too high"),
    ("strength {adapter} --set 2", "strength=2.0 must be from 0 (the base model) to 1 (the whole adapter)."),
    ("strength {adapter} --set half", "invalid float value: 'half'"),
    ("strength {adapter} --strength 1", "--strength; did you mean --strengths?"),
    ("strength {adapter} --keep_claen 1", "did you mean --keep_clean?"),
    ("evaluate --base {tiny} --strength 0.5", "--strength needs --adapter"),
    ("benchmark --suite tyo", "Did you mean toy?"),
    ("benchmark --method capt", "did you mean --methods?"),
    ("benchmark --methods cpat", "Did you mean capt?"),
    ("benchmark --tasks digitz", "Did you mean digits?"),
    ("benchmark --settings learning_rat=1", "Did you mean learning_rate?"),
    ("benchmark --suite paper --root ./nowhere --model_name_or_path {tiny}", "There is no folder ./nowhere (--root)"),
    ("finetune-backbone --objective fear", "objective='fear' is unknown"),
    ("finetune-backbone --drawn_image 3", "did you mean --drawn_images?"),
    ("finetune-backbone --consistency 2", "--consistency has no effect here"),
    ("convert", "the following arguments are required"),
    ("convert --checkpoint nowhere.pt --output {out}", "There is no file nowhere.pt (--checkpoint)"),
    ("convert --checkpoint {tiny}/config.json --output {examples}/configs", "is not empty"),
    ("demo --output_dir x", "The demo sets --output_dir itself"),
    ("demo --epochs 3", "There is no option --epochs"),
    ("report", "the following arguments are required: --lines"),
    ("report nowhere.jsonl", "There is no file nowhere.jsonl (--lines)"),
    ("report {configs}/fap.yaml", "fap.yaml"),
    ("card", "Give the folder of a CAPT adapter"),
    ("card ./nowhere", "There is no folder ./nowhere (--adapter)"),
    ("card {tiny}", "is not the folder of a CAPT adapter"),
    ("push {tiny} you/name", "is not the folder of a CAPT adapter"),
    ("tasks digitz", "Did you mean digits?"),
    ("tasks --root /", "--root has no effect without the name of a data set"),
    ("env --al", "There is no option --al"),
    ("app --adapter ./nowhere", "There is no folder ./nowhere (--adapter)"),
    ("app --prot 3", "did you mean --port?"),
    ("app --adapter {examples}/configs", "{examples}/configs is not an adapter: it has no adapter_config.json"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(CLIPModel.from_pretrained(TINY_CLIP), CaptConfig()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_status_2(line, words, elsewhere, adapter, monkeypatch, capfd):
    places = {
        "examples": EXAMPLES,
        "configs": CONFIGS,
        "tiny": TINY_CLIP,
        "out": elsewhere / "converted",
        "adapter": adapter,
    }
    name, *arguments = shlex.split(line.format(**places))
    if name == "app":
        pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'capt-peft[app]'")
    monkeypatch.setattr(sys, "argv", ["capt-peft", name, *arguments])
    monkeypatch.chdir(elsewhere)
    with pytest.raises(SystemExit) as ended:
        command_line()
    told = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    (line,) = [line for line in told if line.startswith((f"capt-peft {name}: ", "capt-peft: "))]
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


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("--help", 0, "finetune-backbone"),
        ("", 0, "finetune-backbone"),
        ("--version", 0, f"capt-peft {capt_peft.__version__}"),
        ("train --help", 0, "options of transformers' Trainer:"),
        ("app --help", 0, "--port"),
        ("train --epsilonn 1/255", 2, ""),
        ("trian", 2, ""),
        ("evaluate ./nowhere", 2, ""),
        ("train --per_device_train_batch_size many", 2, ""),
        ("train --method cpat", 2, ""),
        ("train --epsilon abc", 2, ""),
    ],
)
def test_help_and_wrong_input_need_no_torch(words, status, told):
    code = f"""
import runpy, sys
sys.argv = ["capt_peft", *{words.split()}]
try:
    runpy.run_module("capt_peft", run_name="__main__")
    ended = 0
except SystemExit as error:
    ended = error.code
print(ended, *({{"torch", "transformers", "peft", "gradio", "datasets"}} & sys.modules.keys()))
"""
    found, out, err = launch("-c", code)
    assert found == 0 and told in out and out.splitlines()[-1] == str(status)
    assert len(err.splitlines()) == (status == 2)


@pytest.mark.parametrize("words", ["--help", "train --help", "tasks"])
def test_a_reader_that_has_enough_is_no_error(words):
    command = f"{sys.executable} -m capt_peft {words} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode in (0, 141) and done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_the_words_of_an_option_are_those_that_the_code_takes():
    assert words_of("capt_peft.methods", "METHODS") == list(METHODS)
    for module, *variables in WORDS.values():
        for variable in variables:
            in_file = variable == "protocols.yaml"
            content = known_protocols() if in_file else getattr(importlib.import_module(module), variable)
            assert words_of(module, variable) == list(content) and content


@pytest.mark.parametrize(
    "script", ["train", "evaluate", "benchmark", "demo", "convert_backbone", "adversarial_finetune"]
)
def test_the_scripts_of_examples_are_the_commands(script):
    status, out, err = launch(EXAMPLES / f"{script}.py", "--xyzzy")
    assert (status, out, err) == (2, "", f"{script}.py: There is no option --xyzzy; --help lists all options.\n")


# ------------------------------------------------------------------------------------------------- what a main raises


def test_the_traceback_is_shown_after_debug(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["capt-peft", "evaluate", "--base", TINY_CLIP, "--epsilon", "300", "--debug"])
    with pytest.raises(ValueError, match="epsilon='300' is more than"):
        command_line()


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

        def main(bug=bug):
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
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == status and capsys.readouterr().err == f"train.py: {words}\n"


def test_of_several_processes_the_first_one_tells_what_all_see(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["capt-peft", "train", "--epsilonn", "1"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        command_line()
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
        ("There is no option --strength; did you mean --strengths?", None),
        ("'pgd-20' is not an attack on retrieval. Known: feature-pgd-STEPS (away from its own embedding).", None),
        ("pets has no class folders. A folder of images needs a folder for each class.", None),
    ],
)
def test_the_name_that_was_probably_meant_is_suggested(message, name):
    assert suggestion(message) == (f" Did you mean {name}?" if name else "")


# ------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_that_are_read_from_the_source_are_those_that_are_parsed(name, monkeypatch):
    if name == "app":
        pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'capt-peft[app]'")
    module = importlib.import_module(f"capt_peft.commands.{COMMANDS[name].module}")
    parsed = []

    def note(self, *args, **kwargs):
        parsed.extend(option[2:] for action in self._actions for option in action.option_strings if option[:2] == "--")
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_known_args", note)
    with pytest.raises(SystemExit):
        module.main([])
    known = options_in(*COMMANDS[name].sources)
    assert {option.replace("-", "_") for option in parsed} - {"help"} == {
        *known, *(f"no_{name}" for name, option in known.items() if option.default is True),
    }  # fmt: skip


def test_the_help_of_training_describes_every_option():
    options = options_in(*COMMANDS["train"].sources)
    silent = {name for name, option in options.items() if not option.help and not name.startswith("log_level")}
    assert not silent, silent
    assert options["learning_rate"].default == CaptTrainingArguments("out").learning_rate


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_ours_first_and_then_the_trainers(name, monkeypatch, capsys):
    if name == "app":
        pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'capt-peft[app]'")
    monkeypatch.setattr(sys, "argv", ["capt-peft", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command_line()
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--debug" in shown and shown.startswith(f"usage: capt-peft {name}")
    of_trainer = "transformers.training_args" in COMMANDS[name].sources
    assert of_trainer == ("options of transformers' Trainer:" in shown)
    if of_trainer:
        assert shown.index("--epsilon\n") < shown.index("options of transformers' Trainer:") < shown.index("--bf16\n")
    else:  # transformers has some options without a description
        assert all(option.help for option in options_in(*COMMANDS[name].sources).values())
    if name == "benchmark":
        assert all(word in shown for word in (*METHODS, *ALIASES, *PROTOCOLS, *SUITES))


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_what_messages_of_load_task_recommend_is_an_option(name):
    options = {*options_in(*COMMANDS[name].sources)}
    renamed = {"name_or_path": "dataset_name", "name": "dataset_config"}
    recommended = {renamed.get(word, word) for word in inspect.signature(load_task).parameters} - {"seed", "revision"}
    assert recommended <= options


def test_a_hub_id_is_not_taken_for_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    paths = ("./a", "/a/b", "~/a", "a/", "a/b/c", "outputs/demo", "..", ".")
    assert all(map(is_path, paths))
    assert not any(map(is_path, ("openai/clip-vit-base-patch32", "gpt2", "digits", "a b")))
