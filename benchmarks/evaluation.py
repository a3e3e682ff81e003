"""What an evaluation costs, beside the forwards of the image tower that it cannot do without.

python benchmarks/evaluation.py                     # tiny CLIP, PGD-100
python benchmarks/evaluation.py --vit --images 2    # a randomly initialised CLIP ViT-B/32 of true shape

PGD with K steps needs K forwards of the image tower and K backwards to the pixels, and two forwards to score the clean and the
adversarial images. By its operations a backward to the pixels is a forward; by the clock it can be slower. So the evaluation
is compared with 2K + 2 forwards, and with K forwards and backwards plus two forwards. All three are timed in turns, on the
same images and batches, in processor time, which other work on the machine disturbs least; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from capt_peft import PGD, ThreatModel, ZeroShotClassifier, evaluate, load_task
from capt_peft.toy import TINY_CLIP
from capt_peft.utils.machine import describe_machine, versions


def tiny(images: int) -> tuple[ZeroShotClassifier, torch.Tensor, torch.Tensor]:
    """Returns tiny CLIP and digits that it classifies correctly, so that all of them are attacked."""
    task = load_task("digits")
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32)
    classifier = ZeroShotClassifier(model, AutoProcessor.from_pretrained(TINY_CLIP), task.class_names, task.template)
    data = task["test"].select(range(min(4 * images, len(task["test"]))))
    pixels = classifier.transform.batch([row["image"] for row in data])
    return classifier.eval(), pixels, torch.tensor(data["label"])


class Random(torch.nn.Module):
    """A randomly initialised image tower of CLIP ViT-B/32 with fixed text features for 100 classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.clip = CLIPModel(CLIPConfig())
        self.register_buffer("texts", torch.nn.functional.normalize(torch.randn(100, 512), dim=1))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns normalised features (B, 512)."""
        return torch.nn.functional.normalize(
            self.clip.get_image_features(pixel_values=2 * pixels - 1).pooler_output, dim=1
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns logits (B, 100)."""
        return 100 * self.image_features(pixels) @ self.texts.T


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vit", action="store_true", help="ViT-B/32 of true shape instead of tiny CLIP")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.vit:
        classifier = Random().eval()
        pixels = torch.rand(args.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        labels = classifier(pixels).argmax(1)
    else:
        classifier, pixels, labels = tiny(args.images)
        right = (classifier(pixels).argmax(1) == labels).nonzero().squeeze(1)[: args.images]
        pixels, labels = pixels[right], labels[right]
    attack = PGD(ThreatModel("linf", "1/255"), steps=args.steps)
    forwards, passes, evaluations = [], [], []
    classifier.requires_grad_(False)
    for repeat in range(args.repeats + 1):
        start = time.process_time()
        with torch.no_grad():
            for _ in range(2 * args.steps + 2):
                classifier.image_features(pixels)
        middle = time.process_time()
        for _ in range(args.steps):
            leaf = pixels.detach().requires_grad_()
            torch.autograd.grad(classifier.image_features(leaf).sum(), leaf)
        with torch.no_grad():
            for _ in range(2):
                classifier.image_features(pixels)
        last = time.process_time()
        evaluate(classifier, (pixels, labels), attack, batch_size=len(pixels), signs=False, progress=False)
        if repeat:  # the first round warms up
            forwards.append(middle - start)
            passes.append(last - middle)
            evaluations.append(time.process_time() - last)
    floor, both, cost = (statistics.median(values) for values in (forwards, passes, evaluations))
    with FlopCounterMode(display=False) as one, torch.no_grad():
        classifier.image_features(pixels)
    logits_fn = classifier if args.vit else classifier.with_fixed_texts()
    with FlopCounterMode(display=False) as all_of_it:
        # the counter cannot follow a module whose input is a leaf of autograd, as pixels under attack are
        evaluate(
            lambda images: logits_fn(images + 0),
            (pixels, labels),
            attack,
            batch_size=len(pixels),
            signs=False,
            progress=False,
        )
    operations = all_of_it.get_total_flops() / (one.get_total_flops() * (2 * args.steps + 2))
    result = {
        "model": "CLIP ViT-B/32, random" if args.vit else "tiny CLIP",
        "images": len(pixels),
        "attack": attack.name,
        "forwards": 2 * args.steps + 2,
        "forwards_seconds": floor,
        "passes_seconds": both,
        "evaluation_seconds": cost,
        "ratio_of_operations": operations,
        "ratio_to_forwards": cost / floor,
        "ratio_to_passes": cost / both,
        "rounds": [
            {"forwards": f, "passes": p, "evaluation": e} for f, p, e in zip(forwards, passes, evaluations, strict=True)
        ],
        "machine": describe_machine(),
        "versions": versions(),
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{result['model']}, {len(pixels)} images, {attack.name}, processor time: evaluation {cost:.1f} s\n"
            f"{result['forwards']} forwards of the image tower: {floor:.1f} s, ratio {cost / floor:.2f}, "
            f"ratio of counted operations {operations:.3f}\n"
            f"{args.steps} forwards and backwards and 2 forwards: {both:.1f} s, ratio {cost / both:.2f}"
        )


if __name__ == "__main__":
    main()
