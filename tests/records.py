"""Records of runs and evaluations, for tests of what is made from them."""

import json
import tempfile
from pathlib import Path

from capt_peft import PGD, ThreatModel
from capt_peft.evaluation import Accuracy, AttackOutcome, Evaluation
from capt_peft.results.card import CardDetails, card_text
from capt_peft.results.run import (
    Accuracies,
    AdapterRecord,
    EvaluationRecord,
    Records,
    RunResults,
    TaskRecord,
    TrainingRecord,
)

SHARE = Accuracy(305, 700)  # 43.6 percent
THREAT = ThreatModel("linf", "4/255")
ATTACK = PGD(THREAT, steps=2).to_dict()


def run_record(fingerprint, config=None, source="digits"):
    """The record of a run, as JSON holds it."""
    shown = ("consistency", "weighting", "optim", "learning_rate", "num_train_epochs", "per_device_train_batch_size")
    both = Accuracies(SHARE, SHARE)
    results = RunResults(
        method="capt",
        seed=0,
        task=TaskRecord(name="digits", source=source, class_names=["a", "b"], shots=1, training_images=2),
        evaluation=EvaluationRecord(split="test", attack=ATTACK, before=both, after=both),
        training=TrainingRecord(seconds=1.0, attack=ATTACK, processes=1),
        adapter=AdapterRecord(parameters={"trainable": 8}, fingerprint=fingerprint, config=config),
        configuration={"training": dict.fromkeys(shown, 1)},
        versions={"torch": "2"},
        machine="CPU",
    )
    return json.loads(json.dumps(results.to_dict()))


def evaluation_record(fingerprint, base):
    """An evaluation of an adapter on a base, both by their fingerprints, as JSON holds it."""
    model = {"base": {"fingerprint": base}, "adapter": {"fingerprint": fingerprint}, "class_names": ["a", "b"]}
    task = {"name": "digits", "source": "digits", "split": "test"}
    outcome = AttackOutcome(ATTACK, SHARE, "robust", broken=0, forwards=700, gradients=700)
    return Evaluation(SHARE, (outcome,), {THREAT: SHARE}, (), {"model": model, "task": task}, "CPU").to_dict()


def card_from(results=None, adapter="a", evaluation=None, *, config=None, details=None):
    """The card that two records as JSON holds them make, of an adapter with the fingerprint that they name."""
    known = None if results is None else results["adapter"].get("fingerprint")
    if results is None:
        known = evaluation["configuration"]["model"]["adapter"]["fingerprint"]
    config = config or results["adapter"]["config"]
    with tempfile.TemporaryDirectory() as folder:
        for name, record in (("results.json", results), ("evaluation.json", evaluation)):
            if record is not None:
                Path(folder, name).write_text(json.dumps(record))
        records = Records.read(folder, known, config.get("base_model_fingerprint"))
    return card_text(records, adapter, config, known, details or CardDetails())
