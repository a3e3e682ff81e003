"""The record of a calibration: what it refuses, and that an adapter keeps it and computes the same."""

import json
import math
from dataclasses import replace

import pytest
from helpers import adapted, random_clip
from peft import PeftModel

from capt_peft import CaptConfig
from capt_peft.tuner import Calibration
from capt_peft.tuner.fingerprint import adapter_fingerprint

CALIBRATION = Calibration(
    temperature=1.5, threshold=12.5, false_rejection_rate=0.05, class_thresholds=[1.0, -2.5], false_positive_rate=0.1,
    images=40, task="pets", split="validation", class_names=["cat", "dog"], texts="0f", strength=1.0, fingerprint="a1",
    base="b2", precision="float32",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "temperature=0 must be a finite number above 0"),
        ({"temperature": math.nan}, ValueError, "temperature=nan"),
        ({"temperature": 10**400}, ValueError, "must be a finite number"),
        ({"temperature": "1"}, TypeError, "temperature='1' must be a number"),
        ({"temperature": True}, TypeError, "temperature=True must be a number"),
        ({"threshold": math.inf}, ValueError, "threshold=inf and class_thresholds must be finite"),
        ({"threshold": None}, TypeError, "threshold=None must be a number"),
        ({"strength": -1}, ValueError, "strength=-1"),
        ({"false_rejection_rate": 0}, ValueError, "false_rejection_rate=0 must be above 0"),
        ({"false_positive_rate": 1}, ValueError, "false_positive_rate=1"),
        ({"class_thresholds": [1.0]}, ValueError, "1 class_thresholds do not fit 2 class_names"),
        ({"class_thresholds": [1.0, math.inf]}, ValueError, "class_thresholds must be finite"),
        ({"class_thresholds": [1.0, "2"]}, TypeError, "must be a list of numbers"),
        ({"class_thresholds": 5}, TypeError, "must be a list of numbers"),
        ({"class_names": ["cat", None]}, TypeError, "must be a list of text"),
        ({"images": 0}, ValueError, "images=0 must be 1 or more"),
        ({"images": 2.5}, TypeError, "images=2.5"),
        ({"texts": 3}, TypeError, "texts=3 must be text"),
        ({"base": None}, TypeError, "base=None must be text"),
    ],
)
def test_bad_fields_are_refused_by_the_record_and_by_the_configuration(fields, error, words):
    for make in (
        lambda: replace(CALIBRATION, **fields),
        lambda: CaptConfig(calibration={**CALIBRATION.to_dict(), **fields}),
    ):
        with pytest.raises(error) as caught:
            make()
        assert words in str(caught.value)


def test_a_configuration_refuses_what_is_no_calibration():
    with pytest.raises(TypeError, match="calibration=5 must be a dictionary or None"):
        CaptConfig(calibration=5)
    with pytest.raises(ValueError, match="calibration has no temperature"):
        CaptConfig(calibration={})


def test_it_reads_what_it_wrote_and_leaves_out_what_a_later_version_adds():
    content = json.loads(json.dumps(CALIBRATION.to_dict()))
    assert Calibration.from_dict({**content, "later": 1}) == CALIBRATION


def test_an_adapter_keeps_it_and_its_fingerprint_does_not_change(saved_clip, tmp_path):
    model = adapted(random_clip())
    before = adapter_fingerprint(model)
    model.peft_config["default"].calibration = CALIBRATION.to_dict()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_clip(), tmp_path)
    assert Calibration.from_dict(loaded.peft_config["default"].calibration) == CALIBRATION
    assert adapter_fingerprint(tmp_path) == adapter_fingerprint(model) == adapter_fingerprint(loaded) == before


def test_an_old_configuration_has_none(tmp_path):
    adapted(random_clip()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["calibration"]
    path.write_text(json.dumps(content))
    assert CaptConfig.from_pretrained(str(tmp_path)).calibration is None
