"""The demo: tunes a CAPT adapter on 160 handwritten digits, measures it, and loads it back in a fresh process.

capt-peft demo
capt-peft demo --model_name_or_path tiny_clip_robust      # from a robust backbone
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor

from ..attacks import ThreatModel, parse_attack
from ..clip.classifier import ZeroShotClassifier
from ..data import load_task
from ..evaluation.pictures import attack_picture
from ..tuner.loading import load_pretrained
from . import train
from .options import values_in
from .train import DIGITS

FOLDER = Path("outputs/demo")
FIXED = ("output_dir", "config", "dataset_name", "dataset_config", "class_names", "template", "class_texts", "method")
SHOWN = 10  # one image per class


def answers(adapter: str) -> torch.Tensor:
    """Returns what a saved adapter says about the shown images: (SHOWN, 10) logits."""
    classifier = ZeroShotClassifier.from_pretrained(adapter)
    images = [shown_images()[i]["image"] for i in range(SHOWN)]
    with torch.no_grad():
        return classifier(classifier.transform.batch(images))


def shown_images() -> Dataset:
    """Returns the first test image of each class."""
    test = load_task("digits")["test"]
    return test.select([test["label"].index(label) for label in range(SHOWN)])


def main(argv: list[str]) -> None:
    """Runs the demo, with any arguments of `capt-peft train` but those that would make it another one."""
    fixed = [name for name in FIXED if name in values_in(argv)]
    if fixed:
        raise ValueError(f"The demo sets --{fixed[0]} itself. capt-peft train takes it.")
    # the digits' settings, whatever the model; later arguments win
    results = train.main(["--config", DIGITS, "--output_dir", str(FOLDER), *argv])

    task = load_task("digits")
    name = results.configuration["script"]["model_name_or_path"]
    processor = load_pretrained(AutoProcessor, name)
    base = load_pretrained(AutoModel, name, dtype=torch.float32).eval()
    shown = shown_images()
    attack = parse_attack("pgd-20", ThreatModel(**results.evaluation.attack["threat_model"]))
    picture = attack_picture(
        {
            "zero-shot": ZeroShotClassifier(base, processor, task.class_names, task.template),
            "CAPT": ZeroShotClassifier.from_pretrained(str(FOLDER)),
        },
        [shown[i]["image"] for i in range(SHOWN)],
        shown["label"],
        attack,
        FOLDER / "attack.png",
    )
    adapter = results.adapter
    assert adapter is not None and adapter.bytes is not None  # they were saved
    print(
        f"\nThe adapter: {adapter.parameters['trainable']:,} parameters, {adapter.bytes / 1000:.0f} kB, tuned in "
        f"{results.training.seconds:.0f} s.\nThe picture: {picture}"
    )
    here = answers(str(FOLDER))
    # the last bits of a sum depend on how many threads share it
    torch.save({"logits": here, "threads": torch.get_num_threads()}, FOLDER / "answers.pt")
    fresh = subprocess.run([sys.executable, "-m", __spec__.name, str(FOLDER)], check=False)
    if fresh.returncode:
        raise SystemExit("The adapter, loaded in a fresh process, does not answer the same.")


def check(folder: Path) -> None:
    """In a fresh process: loads the adapter and compares its answers, bit for bit."""
    saved = torch.load(folder / "answers.pt", weights_only=True)
    torch.set_num_threads(saved["threads"])
    logits = saved["logits"]
    if not torch.equal(answers(str(folder)), logits):
        raise SystemExit(1)
    print(f"Loaded back in a fresh process: the same {logits.shape[0]} x {logits.shape[1]} logits, bit for bit.")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
