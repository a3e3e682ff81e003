"""Training YAML with anything in it: `capt-peft train` reads it, or says which file and which key are wrong."""

import dataclasses

import pytest
import yaml
from fuzzing import LENGTHS, TEXTS, VALUES, fuzz, memory_limit
from hypothesis import strategies as st

from capt_peft import CaptTrainingArguments
from capt_peft.commands.train import ScriptArguments, parse_args

FIELDS = [field.name for kind in (ScriptArguments, CaptTrainingArguments) for field in dataclasses.fields(kind)]
OURS = [field.name for field in dataclasses.fields(ScriptArguments)]
OURS += ["epsilon", "norm", "attack_steps", "attack_step_size", "eval_attack", "consistency", "weighting", "augment"]
OURS += [
    "learning_rate",
    "seed",
    "num_train_epochs",
    "optim",
    "lr_scheduler_type",
    "report_to",
    "warmup_steps",
    "output_dir",
]
LIKELY = st.sampled_from(
    ["yes", "maybe", "fast", "4/255", "1e-3", "true", "16", "all", [1], ["none"], {"a": 1}, [[1, 2]]]
)
SETTINGS = st.dictionaries(st.sampled_from(OURS) | st.sampled_from(FIELDS), VALUES | LIKELY, min_size=1, max_size=2)
WORDS = [
    "seed", "shots", "learning_rate", "epsilon", "augment", ": ", ":", "- ", "\n", "\n  ", "\t", "{", "}", "[", "]", ",", "&a",
    "*a", "<<: ", "!!python/object:os.system", "!!binary ", "!!set ", "2024-01-01", "1_000", "0x1F", "1:30:00", "~", "yes",
    "null", ".nan", ".inf", "'", '"', "|", ">", "?", "%YAML 9.9", "---", "...", "#", "@", "`", "\x00", "\ufeff", "é",
    "1e999", "9" * 5000,
]  # fmt: skip


def reads(folder, content):
    """The file gives arguments of the declared kinds, or an error that names the file."""
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    with memory_limit():
        return parse_args(["--config", str(path), "--use_cpu", "true"])


def check(folder, capsys, content):
    try:
        script, training = reads(folder, content)
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and "run.yaml" in message and len(message) < 20_000
        return
    except ValueError as error:  # values that are of the right types but contradict each other
        assert len(str(error)) > 20
        return
    assert isinstance(training.augment, bool)
    assert isinstance(training.seed, int) and isinstance(training.learning_rate, float | int)
    assert isinstance(script.shots, str | None) and isinstance(script.class_names, list | None)


@LENGTHS
def test_any_values_are_read_or_refused_with_file_and_key(tmp_path, capsys, times):
    @fuzz(150 * times, SETTINGS)
    def holds(settings):
        check(tmp_path, capsys, yaml.safe_dump(settings, allow_unicode=False))


@LENGTHS
def test_any_yaml_text_is_read_or_refused_with_the_file(tmp_path, capsys, times):
    pieces = st.lists(st.sampled_from(WORDS) | TEXTS, max_size=12).map("".join)

    @fuzz(200 * times, pieces | st.binary(max_size=30))
    def holds(content):
        check(tmp_path, capsys, content)


@LENGTHS
def test_any_document_is_read_or_refused_with_the_file(tmp_path, capsys, times):
    @fuzz(100 * times, VALUES)
    def holds(document):
        check(tmp_path, capsys, yaml.safe_dump(document, allow_unicode=False))


# ------------------------------------------------------------------------------------------- what the fuzzing has found


def refusal(tmp_path, capsys, content):
    with pytest.raises(SystemExit) as stop:
        reads(tmp_path, content)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rate: fast", "argument --learning_rate: invalid float value: 'fast'"),
        ("learning_rate: [0.1]", "learning_rate=[0.1]"),
        ("num_train_epochs: [1]", "num_train_epochs=[1]"),
        ("num_train_epochs: true", "num_train_epochs=True"),
        ("seed: 1.5", "--seed: invalid int value: '1.5'"),
        ("augment: maybe", "--augment: "),
        ("attack_steps: many", "invalid int value: 'many'"),
        ("class_names: [yes, no]", "class_names=[True, False]"),
        ("template: no", "template=False"),
        ("template: 2024-01-01", "template=datetime.date(2024, 1, 1)"),
        ("method: {a: 1}", "method={'a': 1}"),
        ("optim: magic", "magic"),
        ("include_num_input_tokens_seen: some", "include_num_input_tokens_seen"),
        ("debug: everything", "--debug"),
        ("lr_scheduler_type: straight", "straight"),
        ("epsilon: x", "'x'"),
        ("weighting: 7", "7"),
        ("1: 2", "unknown arguments 1"),
        ("null: 2", "unknown arguments None"),
        ("seed: 1\n2: 3", "unknown arguments 2"),
        ("[1]", "must hold `name: value` lines"),
        ("0", "must hold `name: value` lines"),
        ("seed: 1\nseed: 2", "'seed' twice"),
        ("seed: \t[", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"seed: \x00", "cannot be read as YAML"),
        ("seed: !!python/object:os.system x", "cannot be read as YAML"),
        ("seed: 2024-99-99", "cannot be read as YAML"),
        ("{[1]: 2}", "cannot be read as YAML"),
        ("[" * 10**4, "cannot be read as YAML"),
        ("seed: " + "9" * 5000, "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, capsys, content, words):
    message = refusal(tmp_path, capsys, content)
    assert "run.yaml" in message and words in message


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--config", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err


def test_aliases_that_multiply_are_refused_in_a_short_sentence(tmp_path, capsys):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    assert len(refusal(tmp_path, capsys, bomb)) < 20_000
    assert len(refusal(tmp_path, capsys, bomb + "class_names: *l\n")) < 20_000
    assert len(refusal(tmp_path, capsys, bomb.replace("l: &l", "seed: "))) < 20_000


def test_numbers_and_switches_are_read_as_they_are_commonly_written(tmp_path):
    script, training = reads(
        tmp_path, "shots: 4\nlearning_rate: 1e-3\naugment: yes\nepsilon: 0.01\nseed: 7\nnum_text_tokens: null"
    )
    assert (script.shots, training.learning_rate, training.augment, training.seed) == ("4", 1e-3, True, 7)
    assert training.threat_model.epsilon == 0.01 and script.num_text_tokens is None


def test_null_leaves_the_default_and_numbers_may_be_texts(tmp_path):
    script, training = reads(
        tmp_path, "seed: null\nclass_names: [1, 2]\nsave_strategy: no\nlr_scheduler_kwargs: {a: 1}"
    )
    assert training.seed == CaptTrainingArguments("out").seed and script.class_names == ["1", "2"]
    assert training.save_strategy.value == "no" and training.lr_scheduler_kwargs == {"a": 1}


@pytest.mark.parametrize("content", ["", "# nothing", "null", "{}"])
def test_an_empty_file_changes_nothing(tmp_path, content):
    assert reads(tmp_path, content)[0] == ScriptArguments()
