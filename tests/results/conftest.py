"""One adapter, tuned for a step and measured, for all tests of its records and its card."""

import json
import shutil
from pathlib import Path

import pytest
from records import THREAT

from capt_peft import PGD, ZeroShotClassifier, evaluate, load_task
from capt_peft.commands.train import main


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "adapter"
    quick = ["--shots", "1", "--max_steps", "1", "--eval_limit", "20", "--eval_attack", "pgd-2", "--attack_steps", "1"]
    main([*quick, "--use_cpu", "--save_strategy", "no", "--epsilon", "4/255", "--output_dir", str(folder)])
    return folder


@pytest.fixture
def results(adapter):
    """The record of its run, as JSON holds it."""
    return json.loads((adapter / "results.json").read_text())


@pytest.fixture(scope="session")
def measured(adapter):
    classifier = ZeroShotClassifier.from_pretrained(str(adapter))
    data = load_task("digits")["test"].select(range(12))
    details = {"task": {"name": "digits", "source": "digits", "split": "test", "limit": 12}}
    attacks = [PGD(THREAT, steps=2), PGD(THREAT, steps=5)]
    return json.dumps(evaluate(classifier, data, attacks, progress=False, details=details).to_dict())


@pytest.fixture
def evaluation(measured):
    """Its evaluation on 12 images, as JSON holds it."""
    return json.loads(measured)


@pytest.fixture
def folder(adapter, tmp_path):
    """A copy of the adapter's folder that a test may change."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))
