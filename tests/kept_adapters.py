"""Files of lines with adapters beside them, as a benchmark leaves them, of random prompts."""

import torch
from peft import get_peft_model

from capt_peft import CaptConfig
from capt_peft.benchmark import Lines
from capt_peft.benchmark.inputs import load_base
from capt_peft.tuner.fingerprint import adapter_fingerprint


def keep(path, cell, **settings):
    """Appends a line of a cell without figures, and keeps a new adapter for it; returns its folder."""
    fingerprint, folder = None, path.with_suffix(".adapters") / cell.training_key
    if cell.tuned:
        base, _ = load_base(cell.model, "cpu")
        torch.manual_seed(0)
        config = CaptConfig(template="a photo of a {}.", init="normal", **{"init_std": 0.1, **settings})
        model = get_peft_model(base, config)
        model.save_pretrained(folder)
        fingerprint = adapter_fingerprint(model)
    Lines(path).append(line(cell, adapter_fingerprint=fingerprint))
    return folder


def line(cell, results=(), **more):
    return {
        "key": cell.key,
        "status": "finished",
        "cell": cell.to_dict(),
        "results": [*results],
        "training": {},
        **more,
    }
