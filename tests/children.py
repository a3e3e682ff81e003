"""Trainings in processes of their own, forked from one that has imported everything: to be killed, or to run out of space.

Where in a save a process dies is counted in what Python's audit hooks see of the hidden folder that checkpoints are written in.
"""

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from helpers import TINY_CLIP
from safetensors.torch import save_file
from training_helpers import adapter_of, make_trainer
from transformers import AutoProcessor, TrainerCallback

SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def fork_server():
    """Returns the context whose processes start within milliseconds."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["children"])
    return context


def train(folder, resume=None, kill_at=None, result=None, **settings):
    """Trains in `folder`, dies at the n-th event of a save if told to, and leaves the adapter and the events' number."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as of a script; workers of a fork server outlive a killed run
    seen = count_events(kill_at)
    trainer = make_trainer(Path(folder), AutoProcessor.from_pretrained(TINY_CLIP), **{**SAVES, **settings})
    trainer.train(resume_from_checkpoint=resume)
    if result is not None:
        save_file(adapter_of(trainer), result)
        Path(result).with_suffix(".json").write_text(json.dumps(seen))


def count_events(kill_at):
    seen = []

    def hook(event, arguments):
        if event in FILE_EVENTS and (".saving" in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            seen.append(f"{event} {Path(str(arguments[0])).name}")
            if len(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


class SmallFiles(TrainerCallback):
    """No file may grow beyond `limit` bytes from the end of one step to the end of its save: what a full disk does to writers."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            sys.stdout.flush()
            self.kept = os.dup(1), os.dup(2)  # they may be files too
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            sys.stdout.flush()
            os.dup2(self.kept[0], 1)
            os.dup2(self.kept[1], 2)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def train_without_space(folder, step, limit, result, **settings):
    """Trains, with a save that fails; leaves what was logged, what there was after it, and the adapter."""
    torch.set_num_threads(1)
    lines = Lines()
    logging.getLogger("capt_peft").addHandler(lines)
    trainer = make_trainer(Path(folder), AutoProcessor.from_pretrained(TINY_CLIP), **{**SAVES, **settings})
    trainer.add_callback(SmallFiles(step, limit))
    trainer.train()
    save_file(adapter_of(trainer), result)
    state = trainer.state
    told = {"lines": lines.lines, "best": [state.best_metric, state.best_global_step, state.best_model_checkpoint]}
    Path(result).with_suffix(".json").write_text(json.dumps(told))


def train_as_rank(rank, port, folder, result, failing_rank=None, resume=None, **settings):
    """Trains as one of two processes; one of them may be without space at step 2."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    if rank == failing_rank:
        train_without_space(folder, 2, 1000, result, **settings)
    else:
        train(folder, resume, result=result, **settings)
    torch.distributed.destroy_process_group()
