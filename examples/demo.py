"""The demo: tunes a CAPT adapter on 160 handwritten digits, measures it, and loads it back in a fresh process.

make demo
python examples/demo.py --model_name_or_path examples/tiny_clip_robust      # from a robust backbone
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from command import EXAMPLES, TRAINING, check_early, given, run

if __name__ == "__main__" and sys.argv[1:2] != ["--check"]:
    check_early(__file__, *TRAINING, EXAMPLES / "train.py")

import torch
from train import DIGITS, main
from transformers import AutoModel, AutoProcessor

from capt_peft import ThreatModel, ZeroShotClassifier, load_task
from capt_peft.attacks import parse_attack
from capt_peft.evaluation.pictures import attack_picture
from capt_peft.tuner.loading import load_pretrained

FOLDER = Path("outputs/demo")
FIXED = ("output_dir", "config", "dataset_name", "dataset_config", "class_names", "template", "method")
SHOWN = 10  # one image per class


def answers(adapter: str) -> torch.Tensor:
    """Returns what a saved adapter says about the shown images: (SHOWN, 10) logits."""
    classifier = ZeroShotClassifier.from_pretrained(adapter)
    images = [shown_images()[i]["image"] for i in range(SHOWN)]
    with torch.no_grad():
        return classifier(classifier.transform.batch(images))


def shown_images() -> torch.utils.data.Dataset:
    """Returns the first test image of each class."""
    test = load_task("digits")["test"]
    return test.select([test["label"].index(label) for label in range(SHOWN)])


def demo(argv: list[str] | None = None) -> None:
    """Runs the demo, with any arguments of train.py but those that would make it another one."""
    argv = sys.argv[1:] if argv is None else argv
    fixed = [name for name in FIXED if name in given(argv)]
    if fixed:
        raise ValueError(f"The demo sets --{fixed[0]} itself. examples/train.py takes it.")
    # the digits' settings, whatever the model; later arguments win
    results = main(["--config", DIGITS, "--output_dir", str(FOLDER), *argv])

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
    fresh = subprocess.run([sys.executable, __file__, "--check", str(FOLDER)], check=False)
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
    if sys.argv[1:2] == ["--check"]:
        check(Path(sys.argv[2]))
    else:
        run(demo)
