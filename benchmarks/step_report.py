"""What `step.py` says of its measurements: whether two steps compute the same, ratios, targets, and a table."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

import torch
from step_reference import Setting
from torch import Tensor

TOLERANCE = 1e-4

TITLES = {
    "reference": "published",
    "ours": "capt-peft",
    "ours_first": "capt-peft, first of a run",
    "floor": "floor",
}

# (batch, classes, steps): how many times fewer operations, and how many times less time, than the published step
TARGETS = {(4, 100, 2): (13.0, 10.0), (32, 100, 3): (3.5, 3.5)}
FLOOR_TARGETS = (1.02, 1.15)  # operations and time, over the floor's


def compare(reference: dict[str, Tensor], ours: dict[str, Tensor], name: str = "our step") -> dict[str, float]:
    """Returns how far a step is from the reference, relative to it: its `loss`, and its `gradient` over all prompts.

    Args:
        reference: Gradients by parameter, and `loss`.
        ours: The same of the other step.
        name: What to call it in the error.

    Raises:
        ValueError: They differ by more than 1e-4, or have other parameters.
    """
    if reference.keys() != ours.keys():
        raise ValueError(
            f"{name} has other gradients than the reference: {sorted(reference.keys() ^ ours.keys())[:3]}."
        )
    whole = {k: torch.cat([t[n].double().flatten() for n in sorted(t) if n != "loss"]) for k, t in
             (("reference", reference), ("ours", ours))}  # fmt: skip
    loss = abs(ours["loss"].item() / reference["loss"].item() - 1)
    gradient = ((whole["ours"] - whole["reference"]).norm() / whole["reference"].norm()).item()
    for what, difference in (("loss", loss), ("gradient of the prompts", gradient)):
        if not difference <= TOLERANCE:  # nan is refused too
            raise ValueError(
                f"{name} and the reference step do not compute the same: their {what} differs by {difference:.1e} (relative), "
                f"more than {TOLERANCE:.0e}. Their costs cannot be compared."
            )
    return {"loss": loss, "gradient": gradient}


def summarise(setting: Setting, rounds: dict[str, list[float]]) -> dict[str, float]:
    """Returns medians in seconds: of the steps, of one forward of each tower, and the floor made of these."""
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    image = medians.pop("floor_images") / (2 * setting.steps + 4)
    text = medians.pop("floor_texts") / 2
    return {
        **medians,
        "image_forward": image,
        "text_forward": text,
        "floor": (2 * setting.steps + 4) * image + 2 * text,
    }


def ratios(cost: dict[str, Any], unit: str) -> dict[str, float]:
    """Returns how many times the reference costs what our step costs, if it was run, and our step what the floor costs."""
    found = {f"ours_over_floor_{unit}": cost["ours"] / cost["floor"]}
    if "reference" in cost:
        found[f"reference_over_ours_{unit}"] = cost["reference"] / cost["ours"]
    return found


def targets(setting: Setting, found: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Returns what this project promises of a setting, and whether it is so; nothing for other settings."""
    least = TARGETS.get((setting.batch, setting.classes, setting.steps))
    if least is None or setting.tiny or setting.attack_loss != "kl":
        return {}
    verdicts = {}
    for unit, low, high in zip(("operations", "seconds"), least, FLOOR_TARGETS, strict=True):
        above, below = f"reference_over_ours_{unit}", f"ours_over_floor_{unit}"
        if above in found:
            verdicts[above] = {"at_least": low, "found": found[above], "reached": found[above] >= low}
            verdicts[below] = {"at_most": high, "found": found[below], "reached": found[below] <= high}
    return verdicts


def table(result: dict[str, Any]) -> str:
    """Returns a setting's Markdown: a table, what it says in a sentence, and the targets."""
    setting = Setting(**{name: result[name] for name in asdict(Setting())})
    operations, timed = result["operations"], result.get("seconds", {})
    rows = [
        f"**{setting}** (texts of {result['text_tokens']} tokens; attack on {setting.attack_loss})",
        "",
        "| step | operations | floor = 1 | seconds | floor = 1 | peak memory above the model |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        known = name in operations
        work = f"{operations[name] / 1e9:,.1f} G | {operations[name] / operations['floor']:.3f}" if known else "|"
        clock = f"{timed[name]:.3g} | {timed[name] / timed['floor']:.2f}" if name in timed else "|"
        memory = result["memory"].get(name)
        above = f"{(memory['peak_bytes'] - memory['before_bytes']) / 1e9:.2f} GB" if memory else ""
        rows.append(f"| {title} | {work} | {clock} | {above} |")
    rows += ["", sentence(result)]
    for name, target in result["targets"].items():
        bound = "at least" if "at_least" in target else "at most"
        verdict = "reached" if target["reached"] else "MISSED"
        rows.append(f"- {name}: {target['found']:.3f}, {bound} {target[bound.replace(' ', '_')]}: {verdict}")
    return "\n".join(rows)


def sentence(result: dict[str, Any]) -> str:
    """Says what a setting's table comes to."""
    found = result["ratios"]
    fewer = f"capt-peft needs {found['reference_over_ours_operations']:.1f} times fewer operations"
    if "difference" not in result:
        return (
            f"{fewer} than the published step, which was not run: whether both compute the same was not checked here."
        )
    less = f" and {found['reference_over_ours_seconds']:.1f} times less time" if "seconds" in result else ""
    far = result["difference"]["ours"]
    return (
        f"{fewer}{less} than the published step, for the same loss (to {far['loss']:.0e}) and gradients (to "
        f"{far['gradient']:.0e})."
    )
