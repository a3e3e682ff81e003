"""The file that the results of an evaluation go to by default: the same for the same settings and weights, so that it resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint
from ..utils.machine import versions
from .retrieval import OPTIONS


def default_output(args: Any, model: nn.Module) -> Path:
    """Returns a file of its own for these settings and weights, beside the adapter where that is a folder here.

    Args:
        args: The arguments of `evaluate`.
        model: What is measured, with its weights.
    """
    name = args.model
    left_out = {"adapter", "output", "overwrite", "update_card", "curve"}
    left_out |= set() if args.retrieval else {"retrieval", *OPTIONS}
    own = {k: v for k, v in asdict(args).items() if k not in left_out}
    places = {k: os.path.abspath(own[k]) for k in ("dataset_name", "root", "base") if own[k] and os.path.exists(own[k])}
    own |= places | {"versions": versions()}
    if own["defence"] is None:
        del own["decisions"]
    # as before they were options: results that are there are found again
    for option in ("class_texts", "strength", "threats", "protocol", "corruptions", "defence"):
        if own[option] is None:
            del own[option]
    own["weights"] = adapter_fingerprint(model) if args.adapter else base_fingerprint(model)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
    radii = [args.norm, args.epsilon] if args.threats is None else [args.threats.replace(":", "")]
    epsilons = [] if args.attacks == "clean" else [each.replace("/", "of") for each in radii]
    few = [] if args.limit is None else [str(args.limit)]
    few += [] if args.strength is None else [f"strength{args.strength:g}"]
    few += [] if args.protocol is None else [args.protocol]
    few += [] if args.defence is None else [args.defence.replace("/", "of")]
    words = [Path(args.dataset_name).name, args.split, *few, *epsilons, args.attacks]
    readable = "-".join(slug(word)[:40] for word in words)
    folder = Path("outputs", "evaluation", slug(name)[-80:])
    if args.adapter and os.path.isdir(args.adapter) and os.access(args.adapter, os.W_OK):
        folder = Path(args.adapter, "evaluations")
    return folder / f"{readable}-{digest}.json"


def slug(text: str) -> str:
    """Returns a text with nothing in it that a file's name could not have."""
    return re.sub(r"[^\w.+-]+", "_", text.replace(",", "+").replace(" ", ""), flags=re.ASCII).strip("._")
