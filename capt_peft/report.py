"""From results to what people read: the record of a run, its table and the card of its adapter."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from .attacks.threat import ThreatModel

PACKAGES = ("capt-peft", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Returns the versions that decide a result: Python and the packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def accuracies(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns what [`CaptTrainer.evaluate`] measured, as results hold it.

    Args:
        metrics: Its return value.
        prefix: Its `metric_key_prefix`.
    """
    return {
        kind: {
            "accuracy": metrics[f"{prefix}_{kind}_accuracy"],
            "interval_95": [metrics[f"{prefix}_{kind}_accuracy_{end}"] for end in ("low", "high")],
            "n": metrics[f"{prefix}_n"],
        }
        for kind in ("clean", "robust")
    }


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Returns the number of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"trainable": sum(n for n, trains in sizes if trains), "all": sum(n for n, _ in sizes)}


def describe_machine() -> str:
    """Returns what the run was computed on, without naming the machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return f"CPU, {torch.get_num_threads()} threads"


def results_table(results: Mapping[str, Any]) -> str:
    """Returns a Markdown table of clean and robust accuracy before and after the tuning.

    Args:
        results: What `results.json` holds.
    """
    attack = results["evaluation"]["attack"]["name"]
    threat = ThreatModel(**results["evaluation"]["attack"]["threat_model"])
    lines = [f"| | clean | robust ({attack}, {threat}) |", "|---|---|---|"]
    for name, key in (("zero-shot", "before"), (results["method"].upper(), "after")):
        cells = [_percent(results["evaluation"][key][kind]) for kind in ("clean", "robust")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    n = results["evaluation"]["after"]["clean"]["n"]
    return "\n".join(
        [*lines, "", f"n = {n} images of the {results['evaluation']['split']} split; in brackets the 95% interval."]
    )


def _percent(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["interval_95"]
    return f"{100 * accuracy['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"


def model_card(results: Mapping[str, Any], adapter: str) -> str:
    """Returns the README of an adapter; every number in it comes from the results.

    Args:
        results: What `results.json` holds.
        adapter: Folder or Hub id by which people load it.
    """
    task, config = results["task"], results["adapter"]["config"]
    attack = results["evaluation"]["attack"]
    return f"""---
library_name: peft
base_model: {config["base_model_name_or_path"]}
pipeline_tag: zero-shot-image-classification
tags: [capt, adversarial-robustness, clip]
---

# CAPT adapter for {task["name"]}

Deep text and vision prompts that keep a CLIP accurate on clean and on adversarial images, tuned with
[capt-peft](https://pypi.org/project/capt-peft/) (method {results["method"]}).

```python
import capt_peft  # registers CAPT with PEFT

classifier = capt_peft.ZeroShotClassifier.from_pretrained("{adapter}")
print(classifier.predict("image.png", top_k=1))
```

## Accuracy

{results_table(results)}

An image counts as robust if it is classified correctly as it is and after the attack. The adversary moves pixels in [0, 1],
before normalisation, within {ThreatModel(**attack["threat_model"])}, and sees the whole model, prompts included. PGD bounds
robust accuracy from above: a stronger attack can only lower it.

## What it was tuned on

- Base model: {config["base_model_name_or_path"]} (fingerprint {config["base_model_fingerprint"]})
- Task: {task["name"]}, {len(task["class_names"])} classes, {task["shots"]} images a class, template "{task["template"]}"
- Text prompts: {config["num_text_tokens"]} a layer, depth {config["text_depth"]}
- Vision prompts: {config["num_vision_tokens"]} a layer, depth {config["vision_depth"]}
- Coupling: {config["coupling"]}
- Seed {results["seed"]}; everything else is in `results.json`.

## Limits

The adapter is robust within this threat model only: not to larger perturbations, not to other norms, not to patches or
other texts. It is no guarantee of safety.
"""
