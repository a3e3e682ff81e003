"""Nothing is lost: checkpoints are whole or not there, and a run that was killed at any moment ends where it would have ended."""

import json
import logging
import random
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import fork_server, train, train_as_rank, train_without_space
from helpers import compiles
from safetensors.torch import load_file
from training_helpers import NAMES, Scripted, adapter_of, make_model, make_task, make_trainer

from capt_peft import PGD, CaptObjective, ThreatModel, TrainingStopped
from capt_peft.clip.classifier import ZeroShotClassifier
from capt_peft.objectives import AdversarialCrossEntropy
from capt_peft.training.checkpoints import checkpoints_in, read_manifest
from capt_peft.utils.files import DamagedFileError

STEPS = {"save_strategy": "steps", "save_steps": 2}
FORKS = fork_server()


def run(target, *arguments, kill_after=None, **settings):
    """Runs a training in a process of its own; returns its exit code."""
    process = FORKS.Process(target=target, args=arguments, kwargs=settings)
    process.start()
    if kill_after is not None:
        process.join(kill_after)
        process.kill()
    process.join(1800)
    return process.exitcode


def finish(folder, result, **settings):
    """Goes on to the end in a process of its own and returns the adapter."""
    assert run(train, str(folder), True, None, str(result), **settings) == 0
    return load_file(result)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def check_all_whole(home):
    for folder in checkpoints_in(home):
        read_manifest(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run: its adapter, how long it took, and what its saves did."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(train, str(folder), max_steps=1, save_strategy="no") == 0  # the first waits for the imports
    begun = time.monotonic()
    assert run(train, str(folder), None, None, str(folder / "adapter.safetensors")) == 0
    seconds = time.monotonic() - begun
    events = json.loads((folder / "adapter.json").read_text())
    return load_file(folder / "adapter.safetensors"), seconds, events


@pytest.fixture(scope="module")
def finished(tmp_path_factory, processor):
    """The folder of a finished run with the checkpoints 2, 4 and 6, and its adapter."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, processor, **STEPS)
    trainer.train()
    return folder, adapter_of(trainer)


@pytest.fixture
def home(tmp_path, finished):
    """A copy of that run, whose checkpoints a test may damage."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------------------- killed


def kill_and_resume(folder, uninterrupted, draw, inside):
    """Kills a run at a random moment, inside a save if asked, and goes on to the end; returns the adapter."""
    _, seconds, events = uninterrupted
    if inside:
        code = run(train, str(folder), None, draw.randint(1, len(events)))
    else:
        code = run(train, str(folder), kill_after=draw.uniform(0.1, 0.9) * seconds)
    assert code in ((-signal.SIGKILL,) if inside else (-signal.SIGKILL, 0))
    check_all_whole(folder / "out")
    return finish(folder, folder / "adapter.safetensors")


@pytest.mark.parametrize(("seed", "inside"), [(0, False), (1, True), (2, True)])
def test_a_run_that_was_killed_ends_bitwise_where_the_uninterrupted_one_does(tmp_path, uninterrupted, seed, inside):
    adapter = kill_and_resume(tmp_path, uninterrupted, random.Random(seed), inside)
    assert same(adapter, uninterrupted[0])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_of_twenty_killed_runs_end_where_the_uninterrupted_one_does(tmp_path, uninterrupted):
    draw = random.Random(20)
    equal = []
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        adapter = kill_and_resume(tmp_path / str(number), uninterrupted, draw, inside=number % 2 == 0)
        equal.append(same(adapter, uninterrupted[0]))
    assert sum(equal) == 20


@compiles
@pytest.mark.long
@pytest.mark.timeout(14400)
def test_twenty_of_twenty_killed_runs_that_compile_and_read_with_workers_end_there_too(tmp_path):
    settings = {
        "torch_compile": True,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "augment": True,
    }
    (tmp_path / "whole").mkdir()
    code = run(train, str(tmp_path / "whole"), None, None, str(tmp_path / "whole" / "a.safetensors"), **settings)
    assert code == 0
    events = json.loads((tmp_path / "whole" / "a.json").read_text())
    draw, equal = random.Random(21), []
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number % 2:  # at any moment from the first save on
            process = FORKS.Process(target=train, args=(str(folder),), kwargs=settings)
            process.start()
            while process.is_alive() and not checkpoints_in(folder / "out"):
                time.sleep(0.01)
            process.join(draw.uniform(0, 1.5))
            process.kill()
            process.join()
        else:
            assert run(train, str(folder), None, draw.randint(1, len(events)), **settings) == -signal.SIGKILL
        check_all_whole(folder / "out")
        adapter = finish(folder, folder / "adapter.safetensors", **settings)
        equal.append(same(adapter, load_file(tmp_path / "whole" / "a.safetensors")))
    assert sum(equal) == 20


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_moment_of_a_save_is_left_out(tmp_path, uninterrupted):
    """Every event of the fourth save, which also removes a checkpoint."""
    adapter, _, events = uninterrupted
    for number in range(events.index("os.mkdir checkpoint-4"), events.index("os.mkdir checkpoint-5")):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert run(train, str(folder), None, number + 1) == -signal.SIGKILL
        check_all_whole(folder / "out")
        assert len(checkpoints_in(folder / "out")) >= 2
        assert same(finish(folder, folder / "adapter.safetensors"), adapter)


def test_a_run_that_is_killed_again_and_again_gets_there(tmp_path, uninterrupted):
    for event in (30, 45, 20):
        assert run(train, str(tmp_path), True, event) == -signal.SIGKILL
    assert same(finish(tmp_path, tmp_path / "adapter.safetensors"), uninterrupted[0])
    assert names_in(tmp_path / "out") == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_that_was_only_not_yet_renamed_is_not_lost(home, processor, caplog):
    (home / ".saving").mkdir()
    (home / "checkpoint-6").rename(home / ".saving" / "checkpoint-6")
    (home / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make_trainer(home.parent, processor, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert names_in(home) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert "Not whole" not in caplog.text


def test_what_a_killed_save_left_is_removed_when_training_begins(home, processor):
    (home / ".saving").mkdir()
    (home / "checkpoint-6").rename(home / ".saving" / "checkpoint-6")
    (home / ".saving" / "checkpoint-6" / "optimizer.pt").unlink()
    make_trainer(home.parent, processor, max_steps=1, **STEPS).train()
    assert names_in(home) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


# ------------------------------------------------------------------------------------------------------------- damaged


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_damage_to_any_file_of_a_checkpoint_is_noticed(home, how):
    read_manifest(home / "checkpoint-6")
    names = names_in(home / "checkpoint-6")
    assert {"checkpoint.json", "optimizer.pt", "adapter_model.safetensors", "trainer_state.json"} < set(names)
    for name in names:
        whole = (home / "checkpoint-6" / name).read_bytes()
        damage(home / "checkpoint-6" / name, how)
        with pytest.raises(DamagedFileError, match=name):
            read_manifest(home / "checkpoint-6")
        (home / "checkpoint-6" / name).write_bytes(whole)
    read_manifest(home / "checkpoint-6")


@pytest.mark.parametrize("named", [True, "checkpoint-6"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "optimizer.pt is missing"),
        ("short", "optimizer.pt has other bytes than were written"),
        ("changed", "optimizer.pt has other bytes than were written"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(home, finished, processor, caplog, named, how, words):
    damage(home / "checkpoint-6" / "optimizer.pt", how)
    trainer = make_trainer(home.parent, processor, **STEPS)
    trainer.train(resume_from_checkpoint=named if named is True else str(home / named))
    assert f"{home / 'checkpoint-6'}: {words}" in caplog.text
    assert f"goes on from {home / 'checkpoint-4'} instead" in caplog.text
    assert same(adapter_of(trainer), finished[1])
    check_all_whole(home)


def test_without_a_whole_checkpoint_the_run_does_not_begin_and_says_what_there_is(home, processor):
    for number, how in ((2, "missing"), (4, "short"), (6, "changed")):
        damage(home / f"checkpoint-{number}" / "checkpoint.json", how)
    with pytest.raises(ValueError, match=r"checkpoint-6: (its |\S+/)checkpoint\.json is damaged") as caught:
        make_trainer(home.parent, processor, **STEPS).train(resume_from_checkpoint=True)
    assert "no whole checkpoint" in str(caught.value)
    assert "checkpoint-2: it has no checkpoint.json" in str(caught.value)
    assert "start again" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path, processor):
    make_trainer(tmp_path, processor, save_only_model=True, **STEPS).train()
    with pytest.raises(ValueError, match="holds the weights alone"):
        make_trainer(tmp_path, processor, **STEPS).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("name", "words"), [("checkpoint-3", "is not a checkpoint"), ("", "is not a checkpoint")])
def test_a_name_that_is_no_checkpoint_is_answered_with_those_that_are(home, processor, name, words):
    with pytest.raises(ValueError, match=words) as caught:
        make_trainer(home.parent, processor, **STEPS).train(resume_from_checkpoint=str(home / name))
    assert "checkpoint-6" in str(caught.value)


@pytest.mark.parametrize("word", [True, "true", "True"])
def test_a_run_that_has_no_checkpoint_yet_begins(tmp_path, processor, caplog, word):
    trainer = make_trainer(tmp_path, processor, max_steps=1, **STEPS)
    trainer.train(resume_from_checkpoint=word)
    assert trainer.state.global_step == 1
    assert "starts from the beginning" in caplog.text


# ------------------------------------------------------------------------------------------------------- another run


def other_teacher(processor):
    torch.manual_seed(5)
    model = make_model().get_base_model()
    with torch.no_grad():
        model.visual_projection.weight.add_(0.1)
    return ZeroShotClassifier(model, processor, NAMES)


def other_images():
    """The same labels, but one image twice."""
    task = make_task()
    return replace(task, splits={"train": task["train"].select([*range(9), 0, 10, 11])})


def other_configuration():
    """The same weights, which compute something else."""
    model = make_model()
    model.get_base_model().config.vision_config.hidden_act = "relu"
    return model


def other_base():
    model = make_model()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("visual_projection.weight")).add_(0.1)
    return model


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda p: {"epsilon": "8/255"}, "training attack threat_model epsilon: 8/255 here, 4/255 in the checkpoint"),
        (lambda p: {"norm": "l2", "epsilon": 4 / 255}, "training attack threat_model norm: l2 here, linf in"),
        (lambda p: {"attack_steps": 2}, "training attack steps: 2 here, 3 in the checkpoint"),
        (lambda p: {"attack": PGD(ThreatModel("linf", "4/255"), steps=3, loss="kl")}, "training attack loss: kl here"),
        (lambda p: {"consistency": 2.0}, "objective consistency: 2 here, 1.5 in the checkpoint"),
        (lambda p: {"weighting": "0.5"}, "objective weighting: 0.5 here, confidence in the checkpoint"),
        (lambda p: {"objective": AdversarialCrossEntropy()}, "objective name: AdversarialCrossEntropy here, CaptObj"),
        (lambda p: {"seed": 1}, "seed: 1 here, 42 in the checkpoint"),
        (lambda p: {"augment": True}, "pixels augment"),
        (lambda p: {"optim": "adamw_torch"}, "optimizer: adamw_torch here, sgd in the checkpoint"),
        (lambda p: {"model": make_model(vision_depth=3)}, "adapter vision_depth: 3 here, 2 in the checkpoint"),
        (lambda p: {"model": other_base()}, "base model: "),
        (lambda p: {"model": other_configuration()}, "base configuration: "),
        (lambda p: {"teacher": other_teacher(p)}, "in the checkpoint"),
        (lambda p: {"task": make_task(per_class=5)}, "training images number: 15 here, 12 in the checkpoint"),
        (lambda p: {"task": other_images()}, "training images content: "),
        (lambda p: {"task": make_task(names=(*NAMES[:2], "eight"))}, "class names 2: eight here, seven in the check"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_each_difference(finished, processor, change, line):
    settings = change(processor)
    with pytest.raises(ValueError, match="is of another run") as caught:
        make_trainer(finished[0], processor, **STEPS, **settings).train(resume_from_checkpoint=True)
    assert line in str(caught.value)
    assert "another output_dir" in str(caught.value)


def test_all_differences_are_named_and_no_others(finished, processor):
    with pytest.raises(ValueError, match="is of another run") as caught:
        make_trainer(finished[0], processor, seed=3, consistency=1.0, **STEPS).train(resume_from_checkpoint=True)
    said, found = str(caught.value).split(" What differs: ")
    assert [entry.split(":")[0] for entry in found.split("; ")] == ["objective consistency", "seed"]
    assert said.endswith("another output_dir.") and found.endswith("42 in the checkpoint.") and "\n" not in said


def test_another_schedule_is_allowed_and_said(home, processor, caplog):
    trainer = make_trainer(home.parent, processor, num_train_epochs=3, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9
    assert "length: 3 epochs here, 2 epochs in the checkpoint" in caplog.text
    assert "not to where it would have ended" in caplog.text


def test_the_learning_rate_is_that_of_the_checkpoint_as_the_warning_says(home, processor, caplog):
    damage(home / "checkpoint-6" / "optimizer.pt", "missing")
    trainer = make_trainer(home.parent, processor, learning_rate=0.5, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    assert "learning_rate: 0.5 here, 0.05 in the checkpoint" in caplog.text
    assert max(entry.get("learning_rate", 0) for entry in trainer.state.log_history) <= 0.05


def test_batches_cut_otherwise_are_the_same_run(home, processor, caplog):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_trainer(home.parent, processor, **settings, **STEPS).train(resume_from_checkpoint=True)
    assert "another" not in caplog.text and "other settings" not in caplog.text


# ---------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    ("step", "limit", "words"),
    [(3, 1000, "File too large"), (3, 8000, "Error while serializing"), (3, 12000, "iostream"), (6, 14000, "iostream")],
)
def test_a_save_that_fails_leaves_nothing_and_the_run_goes_on(tmp_path, uninterrupted, step, limit, words):
    result, home = tmp_path / "adapter.safetensors", tmp_path / "out"
    assert run(train_without_space, str(tmp_path), step, limit, str(result), save_total_limit=None) == 0
    assert names_in(home) == [f"checkpoint-{number}" for number in range(1, 7) if number != step]
    check_all_whole(home)
    told = json.loads(result.with_suffix(".json").read_text())["lines"]
    told = [line for line in told if "zero-shot accuracy" not in line]  # these patches say little to tiny CLIP
    assert len(told) == 1
    assert told[0].startswith(f"ERROR {home / f'checkpoint-{step}'} could not be written: ")
    assert words in told[0] and f"The last good checkpoint is {home / f'checkpoint-{step - 1}'}." in told[0]
    assert same(load_file(result), uninterrupted[0])


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_attack": "pgd-1",
        "load_best_model_at_end": True,
        "max_steps": 2,
        "metric_for_best_model": "eval_n",
        "greater_is_better": True,
        "save_total_limit": None,
    }  # fmt: skip  (the metric never changes: the first evaluation has the best)
    result = tmp_path / "adapter.safetensors"
    assert run(train_without_space, str(tmp_path), 1, 1000, str(result), **settings) == 0
    told = json.loads(result.with_suffix(".json").read_text())
    assert told["best"] == [12, 2, str(tmp_path / "out" / "checkpoint-2")]


@pytest.mark.parametrize("place", ["file/out", "file"])
def test_an_impossible_output_folder_is_refused_with_a_sentence(tmp_path, processor, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Nothing can be written into output_dir=.*Give another output_dir"):
        make_trainer(tmp_path, processor, output_dir=str(tmp_path / place), **STEPS)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write into")
def test_a_folder_that_cannot_be_written_into_is_refused_when_training_begins(tmp_path, processor):
    for settings in (STEPS, {"save_strategy": "no"}):
        trainer = make_trainer(tmp_path, processor, output_dir="/proc/self", **settings)
        with pytest.raises(ValueError, match="Nothing can be written into output_dir='/proc/self'"):
            trainer.train()
        assert trainer.state.global_step == 0


# --------------------------------------------------------------------------------------------------- best, old, many


def test_the_best_checkpoint_is_kept_loaded_and_named_where_it_stands(tmp_path, processor):
    trainer = make_trainer(
        tmp_path,
        processor,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_attack="pgd-1",
        load_best_model_at_end=True,
        metric_for_best_model="eval_n",
        greater_is_better=True,
        max_steps=4,
    )  # fmt: skip  (the first is the best)
    trainer.train()
    best = tmp_path / "out" / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert (state["best_model_checkpoint"], state["best_global_step"]) == (str(best), 1)
    saved = load_file(best / "adapter_model.safetensors")
    assert all(torch.equal(saved[name.replace(".default", "")], tensor) for name, tensor in adapter_of(trainer).items())


def test_only_as_many_checkpoints_stay_as_are_wanted_and_never_those_of_a_run_left_behind(home, processor):
    damage(home / "checkpoint-6" / "optimizer.pt", "short")
    trainer = make_trainer(home.parent, processor, save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert names_in(home) == ["checkpoint-4", "checkpoint-5"]


def test_a_run_that_begins_again_in_the_same_folder_replaces_its_checkpoints(home, processor):
    trainer = make_trainer(home.parent, processor, seed=7, max_steps=4, **STEPS)
    trainer.train()
    assert [read_manifest(home / f"checkpoint-{step}")["run"]["seed"] for step in (2, 4, 6)] == [7, 7, 42]
    assert names_in(home) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_whole_tower_that_is_tuned_goes_on_too(tmp_path, processor):
    def tower(shift=0.0):
        model = make_model().get_base_model()
        base = type(model).from_pretrained(model.name_or_path, dtype=torch.float32)
        base.requires_grad_(False)
        with torch.no_grad():
            base.visual_projection.weight.requires_grad_(True).add_(shift)
        return base

    settings = {"objective": AdversarialCrossEntropy(), "learning_rate": 0.001, **STEPS}
    whole = make_trainer(tmp_path, processor, model=tower(), **settings)
    whole.train()
    damage(tmp_path / "out" / "checkpoint-6" / "model.safetensors", "changed")
    resumed = make_trainer(tmp_path, processor, model=tower(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(adapter_of(whole), adapter_of(resumed))
    with pytest.raises(ValueError, match="base model: "):
        make_trainer(tmp_path, processor, model=tower(0.1), **settings).train(resume_from_checkpoint=True)


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two_processes(folder, port, results, **settings):
    processes = [
        FORKS.Process(target=train_as_rank, args=(rank, port, str(folder), str(results[rank])), kwargs=settings)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_two_processes_agree_when_one_of_them_cannot_write(tmp_path, port, failing):
    results = [tmp_path / f"rank{rank}.safetensors" for rank in (0, 1)]
    settings = {
        "per_device_train_batch_size": 2,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_attack": "pgd-1",
        "metric_for_best_model": "eval_n",
        "greater_is_better": True,
    }  # fmt: skip  (from the first step on there is a best one, for which the Trainer would wait)
    in_two_processes(tmp_path, port, results, failing_rank=failing, **settings)
    home = tmp_path / "out"
    assert names_in(home) == [f"checkpoint-{step}" for step in (1, 3, 4, 5, 6)]
    check_all_whole(home)
    files = read_manifest(home / "checkpoint-3")["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files.keys()
    first = load_file(results[0])
    shutil.rmtree(home / "checkpoint-6")
    damage(home / "checkpoint-5" / "rng_state_1.pth", "short")
    in_two_processes(tmp_path, port, results, resume=True, **settings)
    assert same(load_file(results[0]), first)
    assert same(load_file(results[1]), first)


def test_a_collapse_after_a_resume_is_measured_by_what_was_before(tmp_path, processor):
    settings = {"attack_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, processor, objective=Scripted(1.0, 2.0), max_steps=2, **settings).train()
    with pytest.raises(TrainingStopped, match=r"become constant at step 3: the consistency loss fell from 2.0e\+00"):
        make_trainer(tmp_path, processor, objective=Scripted(1e-4), **settings).train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------------------------ workers


@pytest.mark.parametrize("persistent", [False, True])
def test_the_number_of_workers_changes_nothing(tmp_path, processor, persistent):
    adapters = []
    for workers in (0, 2):
        trainer = make_trainer(
            tmp_path, processor, model=make_model(), augment=True, dataloader_num_workers=workers,
            dataloader_persistent_workers=persistent and workers > 0,
        )  # fmt: skip
        trainer.train()
        adapters.append(adapter_of(trainer))
    assert same(*adapters)


def test_a_resumed_run_with_workers_draws_what_one_without_would_have_drawn(tmp_path, processor):
    settings = {"augment": True, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, processor, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, processor, dataloader_num_workers=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same(adapter_of(whole), adapter_of(resumed))


def test_logging_says_nothing_when_nothing_is_wrong(home, processor, caplog):
    with caplog.at_level(logging.WARNING, logger="capt_peft"):
        make_trainer(home.parent, processor, objective=CaptObjective(), **STEPS).train(resume_from_checkpoint=True)
    assert not [record for record in caplog.records if record.name.startswith("capt_peft")]
