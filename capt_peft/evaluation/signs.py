"""Signs of masked gradients: when a robust accuracy should not be believed (Athalye et al. 2018; Carlini et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attacks import APGD, PGD, LogitsFn, Square, ThreatModel
from ..attacks.base import pixel_gradient
from ..attacks.losses import cross_entropy
from ..attacks.threat import BALLS
from ..randomness import example_generators
from ..results.accuracy import Accuracy
from ..results.defence import TRANSFER_ONLY, WithoutDefence, gone
from ..results.evaluation import Sign
from ..utils.machine import tf32_in_use
from .batch import Attacked, BatchRecord
from .images import Examples, spread
from .subject import Subject, lowest

PROBES = 100  # images that the probes are run on
REPEATS = 5  # forwards that must agree
MANY = 20  # steps that must beat one
QUERIES = 300  # of Square, where no black-box attack was asked for
FEW = 8  # images by which the precision is seen


class _Rule(NamedTuple):
    """Above which value a sign is raised, and what it says then, else, and where nothing was measured."""

    threshold: float
    bad: str
    good: str
    unknown: str = ""


_RULES = {
    "one_step_beats_many": _Rule(
        0.005,
        "One step breaks more images than {many} steps ({percent:.1f} points of {images} images): the gradients lead astray, and "
        "robust accuracy is too high.",
        "{many} steps break at least as many images as one ({images} images).",
        "Not checked: every epsilon is 0, or no threat model is a ball.",
    ),
    "square_beats_white_box": _Rule(
        0.002,
        "Square, which sees no gradients, breaks {percent:.1f}% of all images where white-box attacks fail: gradients are "
        "masked, and robust accuracy is too high.",
        "Square breaks {percent:.1f}% of all images where white-box attacks fail.",
        "Not checked: that needs a white-box attack that leaves images standing (autoattack has Square too).",
    ),
    "accuracy_left_at_epsilon_1": _Rule(
        0.0,
        "{percent:.1f}% accuracy is left when the attack may change every pixel at will ({images} images): the attack fails.",
        "No accuracy is left when the attack may change every pixel at will ({images} images).",
    ),
    "zero_gradients": _Rule(
        1e-3,
        "{percent:.1f}% of the pixel gradients are exactly zero: the attack stands still there.",
        "{percent:.2g}% of the pixel gradients are exactly zero.",
    ),
    "random_outputs": _Rule(
        1e-4,
        "The same image gets different outputs (relative difference {value:.1g}): measure with autoattack-rand, and repeat.",
        "{repeats} forwards of the same images agree.",
    ),
    "probabilities_instead_of_logits": _Rule(
        0.5,
        "The outputs are probabilities: the softmax flattens the gradients. Return logits.",
        "The outputs are logits.",
    ),
    "low_precision": _Rule(
        0.5,
        "The attack ran in {low}, which rounds gradients away; {how}. Attack in float32.",
        "The attack ran in float32.",
        "Not checked: the model computes where PyTorch does not see it, as in NumPy.",
    ),
    "gains_in_transfer_only": _Rule(
        TRANSFER_ONLY,
        "Within {threat}, images made without the defence leave {transfer:.1f}% right with it and {without:.1f}% without it; "
        "images made with knowledge of it leave {worst:.1f}%: what the defence gains, it gains in transfer only.",
        "Within {threat}, images made without the defence leave {transfer:.1f}% right with it and {without:.1f}% without it; "
        "images made with knowledge of it leave {worst:.1f}%.",
        "Not checked: that needs an attack.",
    ),
    "transfer_beats_knowledge": _Rule(
        0.02,
        "Adversarial images made without the defence break {percent:.1f}% of all images that no attack with knowledge of it "
        "breaks: those attacks fail, and robust accuracy is too high.",
        "Adversarial images made without the defence break {percent:.1f}% of all images that no attack with knowledge of it "
        "breaks.",
        "Not checked: that needs an attack with gradients.",
    ),
}
# of "square_beats_white_box" by the probe, where no black-box attack was asked for
_FEW_QUERIES = _Rule(
    0.02,
    "{queries} queries of Square, which sees no gradients, break {percent:.1f}% {what}, where {many} steps of PGD fail: "
    "gradients are masked, and robust accuracy is too high.",
    "{queries} queries of Square break {percent:.1f}% {what} and that {many} steps of PGD do not break.",
)


def probe(subject: Subject, examples: Examples, attacked: Attacked, seed: int, batch_size: int) -> dict[str, Any]:
    """Measures what signs need, on images from all over the dataset that are classified correctly, as numbers by name.

    Nothing is returned where there is nothing to measure.
    """
    candidates = spread(range(len(examples)), 4 * PROBES)
    pixels, labels = examples.batch(candidates, subject.device)
    right = (subject.scored(pixels).argmax(1) == labels).nonzero().squeeze(1).tolist()
    if not attacked or not right:
        return {}
    rows = spread(right, PROBES)
    threats = [t for t in dict.fromkeys(attack.threat_model for attack, _ in attacked) if t.norm in BALLS]
    places = [candidates[row] for row in rows]
    generators = partial(example_generators, seed, places, stream="evaluation", device=pixels.device)
    probed = _probe(subject, pixels[rows], labels[rows], generators, threats)
    black_box = []
    if any(record.gradients for _, record in attacked) and _square_gain(attacked) is None:
        for threat, standing in _standing(attacked):
            indices = spread(standing, PROBES)
            chunks = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
            broken = sum(_broken_by_square(subject, examples, threat, chunk, seed) for chunk in chunks)
            black_box.append({"threat_model": str(threat), "images": len(indices), "broken": broken})
    return {**probed, "black_box": black_box}


def _probe(
    subject: Subject, pixels: Tensor, labels: Tensor, generators: Any, threats: Sequence[ThreatModel]
) -> dict[str, Any]:
    logits_fn = subject.attacked

    def left(attack: APGD | PGD) -> float:
        adversarial = attack(logits_fn, pixels, labels, generators())
        with torch.no_grad():
            return float((logits_fn(adversarial).argmax(1) == labels).double().mean())

    with torch.no_grad():
        outputs = torch.stack([logits_fn(pixels).float() for _ in range(REPEATS)])  # (REPEATS, B, N)
    differences = (outputs - outputs[0]).flatten(1).norm(dim=1).max() / outputs[0].norm().clamp_min(1e-12)
    sums = outputs[0].sum(1)
    everything = everything_in(threats[0].norm if threats else "linf", pixels)
    starts = (threats[0] if threats else everything).random_start(pixels, generators())
    _, _, gradient = pixel_gradient(logits_fn, starts, lambda logits: cross_entropy(logits, labels))
    steps = [(left(PGD(t, steps=1)), left(PGD(t, steps=MANY))) for t in threats if t.epsilon > 0]
    return {
        "images": len(pixels),
        "output_spread": float(differences),
        "probabilities": bool((outputs[0] >= 0).all() and ((sums - 1).abs() < 1e-3).all()),
        "zero_gradient_share": float((gradient == 0).double().mean()),
        "one_step": [one for one, _ in steps],
        "many_steps": [many for _, many in steps],
        "unbounded": left(APGD(everything)),
        "precision": precision_of(logits_fn.logits_fn, pixels[:FEW], backward=True),
        "precision_that_decides": precision_of(subject.scored.logits_fn, pixels[:FEW]),
    }


def everything_in(norm: str, pixels: Tensor) -> ThreatModel:
    """Returns a ball that holds all images of the shape of `pixels` (B, 3, H, W), around each: of L2, or else of L-inf."""
    return ThreatModel("l2", math.sqrt(pixels[0].numel())) if norm == "l2" else ThreatModel("linf", 1.0)


def _broken_by_square(
    subject: Subject, examples: Examples, threat: ThreatModel, indices: Sequence[int], seed: int
) -> int:
    """Returns how many images a few hundred queries of Square break and 20 steps of PGD do not: what gradients hide."""
    pixels, labels = examples.batch(indices, subject.device)
    broken = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    for attack, breaks in ((Square(threat, queries=QUERIES), True), (PGD(threat, steps=MANY), False)):
        rows = broken.nonzero().squeeze(1)
        if len(rows) == 0:
            break
        places = [indices[row] for row in rows.tolist()]
        generators = example_generators(seed, places, stream="evaluation", device=pixels.device)
        adversarial = attack(subject.attacked, pixels[rows], labels[rows], generators)
        broken[rows] = (subject.scored(adversarial).argmax(1) != labels[rows]) == breaks
    return int(broken.sum())


def _standing(attacked: Attacked) -> list[tuple[ThreatModel, list[int]]]:
    """Returns, for each norm, the largest ball within which images stood all attacks, and these images' places."""
    found: dict[str, tuple[ThreatModel, list[int]]] = {}
    threats = {attack.threat_model for attack, _ in attacked if attack.threat_model.norm in BALLS}
    for threat in sorted(threats, key=lambda t: (t.norm, -t.epsilon)):
        within = [record for attack, record in attacked if attack.threat_model == threat]
        left = sorted(set(within[0].index).difference(*(record.wrong() for record in within)))
        if left and threat.epsilon > 0:
            found.setdefault(threat.norm, (threat, left))
    return list(found.values())


def _square_gain(attacked: Attacked) -> float | None:
    """Returns the share of the images that Square broke and no attack with gradients did, at its largest over threat models.

    None where Square, or every attack with gradients, was missing.
    """
    gains = []
    for threat in dict.fromkeys(attack.threat_model for attack, _ in attacked):
        within = [(attack, record) for attack, record in attacked if attack.threat_model == threat]
        parts = [part for attack, _ in within for part in attack.parts]
        squares = {part.name for part in parts if isinstance(part, Square)}
        if squares and any(part.uses_gradients for part in parts):
            rows = [row for _, record in within for row in zip(record.index, record.broken_by, strict=True)]
            by_square = {index for index, by in rows if by in squares}
            by_others = {index for index, by in rows if by not in (None, *squares)}
            gains.append(len(by_square - by_others) / len(within[0][1].index))
    return max(gains) if gains else None


def read_signs(probed: Mapping[str, Any], subject: Subject, attacked: Attacked) -> tuple[Sign, ...]:
    """Returns the signs by what `probe` measured and by the attacks themselves; none where nothing was probed."""
    if not probed:
        return ()
    images = probed["images"]
    gains = [many - one for one, many in zip(probed["one_step"], probed["many_steps"], strict=True)]
    precision = subject.precision if subject.precision != "float32" else probed["precision"]
    how = f"outcomes were decided in float32, which changed {sum(record.changed for _, record in attacked)} of them"
    if (decides := probed["precision_that_decides"]) != "float32":
        how = f"and so did what decides the outcomes ({decides or 'unknown'})"
    shares = [probed["zero_gradient_share"], *(record.zero_gradient_share() or 0.0 for _, record in attacked)]
    return (
        _sign("one_step_beats_many", max(gains, default=None), least=1 / images, images=images),
        _square(_square_gain(attacked), probed.get("black_box")),
        _sign("accuracy_left_at_epsilon_1", probed["unbounded"], images=images),
        _sign("zero_gradients", max(shares)),
        _sign("random_outputs", probed["output_spread"]),
        _sign("probabilities_instead_of_logits", float(probed["probabilities"])),
        _sign("low_precision", None if precision is None else float(precision != "float32"), low=precision, how=how),
    )


def signs_of_defence(
    attacked: Attacked, undefended: WithoutDefence, worst_case: Mapping[ThreatModel, Accuracy]
) -> tuple[Sign, ...]:
    """Returns the signs of a defended classifier, by its attacks alone: a gain in transfer only, and attacks that fail.

    The value of the first is the share of the gain under transfer that is gone in the worst case: more than 1 where the defence
    harms.
    """
    shares = [share for _, record in attacked if (share := record.zero_gradient_share()) is not None]
    n = len(attacked[0][1].index) if attacked else 1
    lost: list[tuple[float, dict[str, Any]]] = []
    gains, missed = [], []
    for threat, worst in worst_case.items():
        within = [(attack, record) for attack, record in attacked if attack.threat_model == threat]
        by_way: dict[str, list[BatchRecord]] = {}
        for attack, record in within:
            by_way.setdefault(getattr(attack, "way", ""), []).append(record)
        # the answers of the worst of the transferred attacks, image by image
        transfer = min(Accuracy(r.right(), n, worst.decisions).value for r in by_way["transfer"])
        without = undefended.worst_case[threat].value
        said = {"threat": threat, "transfer": 100 * transfer, "without": 100 * without, "worst": 100 * worst.value}
        lost.append((gone(transfer, without, worst.value), said))
        wrong = {way: set[int]().union(*(record.wrong() for record in of_way)) for way, of_way in by_way.items()}
        black_box, transferred = wrong.pop("black-box", None), wrong.pop("transfer")
        if wrong:
            knowing = set[int]().union(*wrong.values())
            missed.append(len(transferred - knowing - (black_box or set())) / n)
            if black_box is not None:
                gains.append(len(black_box - transferred - knowing) / n)
    value, words = max(lost, key=lambda found: found[0]) if lost else (None, {})
    return (
        _sign("gains_in_transfer_only", value, **words),
        _sign("transfer_beats_knowledge", max(missed, default=None), least=1 / n),
        _sign("square_beats_white_box", max(gains, default=None)),
        _sign("zero_gradients", max(shares, default=None)),
    )


def _square(gain: float | None, black_box: Sequence[Mapping[str, Any]] | None) -> Sign:
    """Returns the sign by the images that Square broke among the attacks or, without it, by those that a few queries did."""
    name = "square_beats_white_box"
    if gain is not None or not black_box:
        return _sign(name, gain)
    worst = max(black_box, key=lambda found: found["broken"] / found["images"])
    what = f"of {worst['images']} images that the attacks left standing within {worst['threat_model']}"
    return _sign(name, worst["broken"] / worst["images"], _FEW_QUERIES, least=1 / worst["images"], what=what)


def _sign(name: str, value: float | None, rule: _Rule | None = None, *, least: float = 0.0, **words: Any) -> Sign:
    """Returns a sign by its rule; a value of `least`, one image of a small probe, does not raise it."""
    rule = rule or _RULES[name]
    if value is None:
        return Sign(name, None, None, rule.threshold, rule.unknown)
    threshold = max(rule.threshold, least)
    sentence = rule.bad if value > threshold else rule.good
    words |= {"value": value, "percent": 100 * value, "many": MANY, "queries": QUERIES, "repeats": REPEATS}
    return Sign(name, value > threshold, value, threshold, sentence.format(**words))


_HALVES = (torch.bfloat16, torch.float16)
_MOVING = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::detach", "aten::lift_fresh", "aten::alias"}
_FEW = 16  # numbers that may have few digits by chance


class _WatchedPrecision(TorchDispatchMode):
    """Within it, the types of all numbers that PyTorch computes are noted: of autocast, of casts inside, of a backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.computed = False  # and not only copied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes the types of its results."""
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.dtypes |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        self.computed |= func._schema.name not in _MOVING and not func.is_view
        return result


def precision_of(logits_fn: LogitsFn, pixels: Tensor, *, backward: bool = False) -> str | None:
    """Returns the lowest precision in which a model computes its logits and, with `backward`, the gradient at the pixels.

    It is "float32", "tf32", "bfloat16", ..., or None if the model computes out of sight (NumPy), and its logits tell nothing.
    """
    with _WatchedPrecision() as watched, torch.set_grad_enabled(backward):
        images = pixels.clone().requires_grad_(backward)
        logits = logits_fn(images)
        computed = watched.computed
        if backward and logits.grad_fn is not None:
            torch.autograd.grad(logits.sum(), images, allow_unused=True)
    if any(torch.finfo(dtype).bits < 32 for dtype in watched.dtypes):
        return lowest(watched.dtypes)
    if computed:
        return "tf32" if tf32_in_use(pixels.device) else "float32"
    values = logits.detach().float().unique()
    fractions = values[values != values.round()]
    if len(fractions) < _FEW:
        return None
    return next((lowest([half]) for half in _HALVES if torch.equal(fractions, fractions.to(half).float())), None)
