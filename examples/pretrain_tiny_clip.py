"""Pre-trains tiny CLIP, the model of `capt_peft/toy/tiny_clip`, on captioned procedural images; needs no download.

    python examples/pretrain_tiny_clip.py                                  # the published weights
    python examples/pretrain_tiny_clip.py --quick --output tiny            # a smoke run of seconds
    python examples/pretrain_tiny_clip.py --evaluate_only                  # the figures of its README

The same seed, thread count and library versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from capt_peft.attacks.pgd import PGD
from capt_peft.attacks.threat import ThreatModel
from capt_peft.clip.classifier import ZeroShotClassifier
from capt_peft.data.task import Task
from capt_peft.toy.images import FACTS, Facts, caption, draw, phrase
from capt_peft.toy.tasks import load_digits_task, load_toy_task

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
FACT_NAMES = list(FACTS)
SPOKEN = [name for name in FACTS if name != "font"]
MEASURED = ("shapes", "colors", "sizes", "positions", "counts", "backgrounds", "textures", "letters")
EPSILONS = (1, 2, 4, 6, 8, 10, 12, 16)  # of 255


def build_processor(captions: list[str], folder: Path) -> CLIPProcessor:
    """Returns CLIP's processor for 32 x 32 pixels, with a byte-level vocabulary learned from the captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=2, show_progress=False, end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(merge) for merge in merges), BOS, EOS]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    return processor


def build_model(processor: CLIPProcessor) -> CLIPModel:
    """Returns a CLIPModel with 1.4 million parameters and random weights."""
    tokenizer = processor.tokenizer
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    text = tower | {
        "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = tower | {"num_hidden_layers": 4, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # CLIP's own start suits long runs; with larger weights and places that differ, a short one learns where things are
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "layers" in name:
            torch.nn.init.xavier_uniform_(weight)
    positions = model.vision_model.embeddings.position_embedding.weight.data
    positions[1:] = 0.3 * plane_waves(math.isqrt(len(positions) - 1), positions.shape[1])
    return model


def plane_waves(side: int, width: int) -> torch.Tensor:
    """Returns (side * side, width) sines and cosines of a patch's row and column, an embedding of its place."""
    frequencies = 20 ** -torch.linspace(0, 1, width // 4)  # radians a patch
    waves = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([waves.sin(), waves.cos()], dim=1)  # (side, width / 2)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)


def draw_pool(size: int, seed: int) -> tuple[torch.Tensor, list[Facts]]:
    """Returns images (size, 3, 32, 32) uint8 and the facts of each."""
    rng, pool, facts = np.random.default_rng([seed, 1]), np.empty((size, 32, 32, 3), np.uint8), []
    for index in range(size):
        image, shown = draw(rng)
        pool[index] = image
        facts.append(shown)
    return torch.from_numpy(pool).permute(0, 3, 1, 2).contiguous(), facts


def encode_facts(facts: list[Facts]) -> torch.Tensor:
    """Returns (B, number of facts) value numbers, -1 for a fact that is not there."""
    rows = [[FACTS[name].index(row[name]) if name in row else -1 for name in FACT_NAMES] for row in facts]
    return torch.tensor(rows)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turns, scales and shifts images (B, 3, 32, 32) in [0, 1] a little, and changes their contrast."""
    size = len(pixels)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(size, generator=generator) * 2 - 1) * limit

    angle, x_scale, y_scale, shear = uniform(0.12), 1 + uniform(0.1), 1 + uniform(0.08), uniform(0.12)
    top = torch.stack([angle.cos() * x_scale, shear - angle.sin(), uniform(0.06)], dim=1)
    bottom = torch.stack([angle.sin(), angle.cos() * y_scale, uniform(0.06)], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gain, offset = 1 + uniform(0.12), uniform(0.05)
    return (pixels * gain[:, None, None, None] + offset[:, None, None, None]).clamp(0, 1)


def contrastive_loss(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """InfoNCE with any number of positives: each true text against all the false ones, and the same for images.

    With T the true pairs of a row: mean over rows and over j in T of -log(e^l_j / (e^l_j + sum over k not in T e^l_k)).

    Args:
        logits: (B, M), image by text.
        true: (B, M) bool, whether the text is true of the image.
    """
    losses = []
    for scores, positive in ((logits, true), (logits.T, true.T)):
        rows = positive.any(-1) & ~positive.all(-1)
        scores, positive = scores[rows], positive[rows]
        false = scores.masked_fill(positive, -torch.inf).logsumexp(-1, keepdim=True)
        loss = F.softplus(false - scores) * positive  # (rows, columns)
        losses.append((loss.sum(-1) / positive.sum(-1)).mean())
    return sum(losses) / 2


def write_texts(facts: list[Facts], rng: np.random.Generator) -> tuple[list[str], torch.Tensor]:
    """Returns a text about every single value, captions of the given images, and what each text states (M, facts)."""
    singles = [{name: value} for name in SPOKEN for value in FACTS[name]]
    texts, stated = zip(
        *(caption(shown, rng) for shown in facts), *(phrase(single, rng) for single in singles), strict=True
    )
    unique = dict(zip(texts, stated, strict=True))
    return list(unique), encode_facts(list(unique.values()))


def normalize(pixels: torch.Tensor, processor: CLIPProcessor) -> torch.Tensor:
    """Returns what the model takes for pixels (B, 3, 32, 32) in [0, 1]."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    return (pixels - mean[:, None, None]) / std[:, None, None]


def pretrain(model: CLIPModel, processor: CLIPProcessor, args: argparse.Namespace) -> None:
    """Trains the model in place; saves it now and then."""
    images, facts = draw_pool(args.pool, args.seed)
    print(f"drawn {len(images)} images in {time.perf_counter() - args.start:.0f} s", flush=True)
    codes = encode_facts(facts)
    rng, generator = np.random.default_rng([args.seed, 2]), torch.Generator().manual_seed(args.seed)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.06, cycle_momentum=False
    )
    order, running = np.empty(0, int), 0.0
    for step in range(1, args.steps + 1):
        if len(order) < args.batch_size:
            order = rng.permutation(len(images))
        chosen, order = order[: args.batch_size], order[args.batch_size :]
        texts, stated = write_texts([facts[i] for i in chosen[: args.captions]], rng)
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        pixels = normalize(augment(images[chosen].float() / 255, generator), processor)
        image_features = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        text_features = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (B, M)
        true = ((stated == -1) | (stated == codes[chosen, None])).all(-1)
        loss = contrastive_loss(logits, true)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, np.log(args.max_logit_scale))
        running += loss.item()
        if step % args.log_steps == 0 or step == args.steps:
            mean, running = running / ((step - 1) % args.log_steps + 1), 0.0
            scale, seconds = model.logit_scale.exp().item(), time.perf_counter() - args.start
            print(f"step {step} loss {mean:.3f} scale {scale:.1f} {seconds:.0f} s", flush=True)
            save(model, args.output)


def save(model: CLIPModel, folder: Path) -> None:
    """Writes float16 weights that load as float32; an interrupted write leaves the old file."""
    part = folder / ".part"
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    model.save_pretrained(part, state_dict=state)
    for path in part.iterdir():
        os.replace(path, folder / path.name)
    shutil.rmtree(part)


def evaluate(folder: Path, quick: bool) -> dict[str, float]:
    """Loads the folder as anyone would and returns its zero-shot accuracies, clean and under PGD-20."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    figures = {}
    for name in MEASURED:
        task = load_toy_task(name, train_per_class=1, validation_per_class=1, test_per_class=2 if quick else 40)
        figures[name] = accuracy(*classified(model, processor, task, "test"))
    figures["mean of the procedural tasks"] = sum(figures.values()) / len(figures)
    digits = load_digits_task()
    figures["digits, all scans"] = accuracy(*classified(model, processor, digits, "train", "validation", "test"))
    classifier, pixels, labels = classified(model, processor, digits, "validation")
    figures["digits, validation"] = accuracy(classifier, pixels, labels)
    for epsilon in EPSILONS[:1] if quick else EPSILONS:
        attack = PGD(ThreatModel("linf", epsilon / 255), steps=2 if quick else 20)
        adversarial = attack(classifier, pixels, labels)
        figures[f"digits, validation, PGD-20 at {epsilon}/255"] = accuracy(classifier, adversarial, labels)
    return figures


def classified(
    model: CLIPModel, processor: CLIPProcessor, task: Task, *splits: str
) -> tuple[ZeroShotClassifier, torch.Tensor, torch.Tensor]:
    """Returns the zero-shot classifier of a task, and the images (M, 3, 32, 32) in [0, 1] and labels (M,) of splits."""
    classifier = ZeroShotClassifier(model, processor, task.class_names, task.template)
    pixels = classifier.transform.batch([image for split in splits for image in task[split]["image"]])
    return classifier, pixels, torch.tensor([label for split in splits for label in task[split]["label"]])


def accuracy(classifier: ZeroShotClassifier, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of images (M, 3, 32, 32) in [0, 1] whose best class is the label's."""
    with torch.no_grad():
        return (classifier(pixels).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Draws, trains, saves, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_clip", help="folder of the model")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--captions", type=int, default=32, help="captions of a batch, beside texts of single facts")
    parser.add_argument("--pool", type=int, default=60_000, help="images drawn before training")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--max_logit_scale", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; another number rounds differently")
    parser.add_argument("--log_steps", type=int, default=50, help="the model is saved as often")
    parser.add_argument("--evaluate_only", action="store_true", help="measure the model in --output")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 3 steps on 200 images")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.pool, args.batch_size = 3, 200, 16
    args.start = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if not args.evaluate_only:
        args.output.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([args.seed, 3])
        captions = [caption(draw(rng)[1], rng)[0] for _ in range(200 if args.quick else 10_000)]
        processor = build_processor(captions, args.output)
        model = build_model(processor)
        pretrain(model, processor, args)
        print(f"trained {model.num_parameters():,} parameters in {time.perf_counter() - args.start:.0f} s")
    for name, figure in evaluate(args.output, args.quick).items():
        print(f"{name}: {100 * figure:.1f}%")


if __name__ == "__main__":
    main()
