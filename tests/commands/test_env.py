"""`capt-peft env`: what a bug report has to say."""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

import capt_peft
from capt_peft.commands.env import main
from capt_peft.utils import machine


def test_versions_and_devices_are_a_list(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    found = dict(re.fullmatch(r"- ([\w -]+): (.+)", line).groups() for line in lines)
    assert found["capt-peft"] == capt_peft.__version__ and found["torch"] == torch.__version__
    assert found["python"] == platform.python_version() and found["computes on"] == machine.describe_machine()
    assert {"transformers", "peft", "accelerate", "datasets", "huggingface_hub", "gradio"} <= {*found}


def test_it_tells_neither_who_nor_where(capsys, monkeypatch):
    uname = platform.uname()
    monkeypatch.setattr(platform, "uname", lambda: uname._replace(node="node-of-somebody"))
    main([])
    told = capsys.readouterr().out
    assert not any(word in told for word in ("node-of-somebody", str(Path.home()) + "/", str(Path.cwd()), sys.prefix))


def test_a_package_that_is_not_there_is_said_so(capsys, monkeypatch):
    def version(name):
        if name == "gradio":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(machine, "version", version)
    main([])
    told = capsys.readouterr().out
    assert "- gradio: not installed\n" in told and "- torch: 1.0\n" in told
