"""`evaluate`: every image under every attack, in pieces that survive a kill and that processes share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import Attack, LogitsFn, get_protocol
from ..attacks.base import joined
from ..clip.calibration import calibration_for
from ..clip.classifier import ZeroShotClassifier
from ..data.corruptions import parse_corruptions
from ..data.texts import Template, read_template
from ..defences import Defended, adaptive
from ..randomness import check_seed
from ..results.earlier import changes
from ..results.evaluation import Evaluation
from ..results.examples import examples_path
from ..results.kept import images_path
from ..utils.files import make_writable
from ..utils.machine import versions
from ..utils.modules import buffers_kept, eval_mode, modules_in
from ..utils.outputs import main_process_says
from ..utils.text import some
from .batch import Attacked, BatchRecord, attack_batch, score_batch
from .corruption import measure_corrupted
from .images import Examples
from .merge import merge
from .rejection import Rejecting
from .resume import Jobs, finished, sample_logits
from .signs import probe
from .subject import DECISIONS, Subject, subject_of
from .worst import keep_piece, keep_worst

SIGNS = "signs"


def evaluate(
    classifier: LogitsFn,
    data: datasets.Dataset | tuple[Tensor, Tensor],
    attacks: Attack | Sequence[Attack] = (),
    *,
    batch_size: int = 128,
    seed: int = 0,
    attack_target: str = "tuned",
    attack_template: Template | None = None,
    signs: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    save_images: bool = False,
    out_of_class: datasets.Dataset | Tensor | None = None,
    protocol: str | None = None,
    corruptions: Sequence[str] = (),
    decisions: int = DECISIONS,
    details: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures clean accuracy, and accuracy under each attack and in the worst case over them.

    White box through the prompts, unless `attack_target` or `attack_template` say otherwise; only then is it robust accuracy. A
    `Defended` classifier is attacked by every way that knows its defence (`defences.adaptive`), and the worst of them counts. The
    processes of `accelerate launch` or `torchrun` share the work. With `output`, a killed evaluation resumes where it stopped
    when it is called again, and ends in the same file.

    Args:
        classifier: A `ZeroShotClassifier`, one with a defence (`Defended`), or any callable from pixels (B, 3, H, W) in [0, 1] to
            logits (B, N); measured in eval mode and given back in the mode it had.
        data: A split of a task (columns `image` and `label`), or, for any classifier, pixels (n, 3, H, W) and labels (n,).
        attacks: Attacks, each with its threat model; none measures clean accuracy alone.
        batch_size: Images per piece of work. It changes no random number.
        seed: Seed of the attacks, from 0 to 2**32 - 1.
        attack_target: "tuned", or "frozen": attacks see the base model with the adapter off, and transfer.
        attack_template: Text of a class, or several, that attacks see instead of the classifier's own; as its `template`.
        signs: Look for signs of masked gradients.
        output: JSON file for the figures; the examples go to a parquet file of that name, and unfinished work to a folder of that
            name with ".partial" at its end, which is removed in the end.
        overwrite: Measure again and replace what is there, instead of returning results of the same configuration and keeping
            those of another one under a name with ".old1" (".old2", ...) before its suffix.
        save_images: Keep the worst-case images, float32, in a safetensors file of that name: of each example and threat model the
            image that the classifier is wrong on under some attack, else that of the last attack that moved it. The figures
            hold the file's hash, and `verify` scores them again.
        out_of_class: Images of none of the classes, a split or pixels (m, 3, H, W): measure what the answer "none of these" does
            too, clean and under each attack on class and score together (`evaluation.rejection`). Needs a classifier with a
            calibration that holds for it.
        protocol: Name of a published protocol that the record carries (`capt_peft.attacks.known_protocols`): `attacks` hold its
            own, with its settings. How many images it measures, of which split and with which text is for the caller to keep to.
        corruptions: Common corruptions under which accuracy is measured too, such as "fog-3" (`data.parse_corruptions`); they
            change the images as the model sees them, drawn by the same seed, and are no adversary.
        decisions: How often each image is classified where a defence is random, an even number from 2 to 62: accuracy is then the
            mean probability of a right answer.
        details: What else the figures depend on, for the record (JSON types).
        progress: Show a progress bar, in the main process.

    Returns:
        The figures and the examples, the same in every process.

    Raises:
        TypeError: Data or classifier of the wrong kind.
        ValueError: No images, labels that do not fit, a seed out of range, two attacks alike, `save_images` without `output` or
            attacks, `out_of_class` without a calibration or with images of the classes, a protocol whose attacks are not there
            or that do not see the model itself, or an output that cannot be written or holds something else than an evaluation.
    """
    attacks = list(attacks) if isinstance(attacks, Sequence) and not isinstance(attacks, str) else [attacks]
    output = None if output is None else Path(output)
    check_call(attacks, batch_size, seed, output)
    corruptions = parse_corruptions(",".join(corruptions)) if corruptions else []
    if save_images:
        check_images_place(output, attacks)
    if protocol is not None:
        get_protocol(protocol).check(attacks)
        if attack_target != "tuned" or attack_template is not None:
            raise ValueError(
                f"protocol={protocol!r} is of white-box attacks: leave out attack_target and attack_template."
            )
    defended = classifier if isinstance(classifier, Defended) else None
    mode = eval_mode(classifier, gradients=False) if isinstance(classifier, nn.Module) else nullcontext()
    with mode, buffers_kept(modules_in(classifier)):
        subject = subject_of(classifier, attack_target, attack_template, decisions)
        if defended is not None:
            attacks = adaptive(attacks, defended.defence)
        examples = Examples(data, classifier if defended is None else defended.classifier)
        logits, classes = sample_logits(subject, examples, batch_size)
        examples.check_labels(classes)
        examples.warn_of_units(attacks)
        if corruptions and defended is not None:
            raise ValueError("corruptions are measured without a defence: leave one of the two out.")
        outside, threshold = _rejecting(classifier, out_of_class, classes, subject)
        configuration = agreed(
            {
                **(details or {}),
                **({} if protocol is None else {"protocol": protocol}),
                "model": {**subject.description, "logits": logits},
                "data": examples.to_dict(),
                "attacks": [attack.to_dict() for attack in attacks],
                "attack_target": attack_target,
                "attack_template": None if attack_template is None else read_template(attack_template),
                "seed": seed,
                "batch_size": batch_size,
                "signs": signs and subject.white_box,
                **({} if defended is None else {"defence": defended.defence.to_dict()}),
                **({} if subject.decisions == 1 else {"decisions": subject.decisions}),
                "save_images": save_images,
                **({} if subject.temperature == 1 else {"temperature": subject.temperature}),
                **({} if outside is None else {"rejection": {"threshold": threshold, "data": outside.to_dict()}}),
                **({"corruptions": corruptions} if corruptions else {}),
                # where other random numbers are drawn
                **({} if subject.device.type == "cpu" else {"device": subject.device.type}),
                "versions": versions(),
            }
        )
        folder = None
        if output is not None:
            earlier = None if overwrite else finished(output, configuration, Evaluation)
            if earlier is not None and (not save_images or main_process_says(lambda: earlier.has_images(output))):
                return earlier
            names = [output.name, examples_path(output).name, *([images_path(output).name] if save_images else [])]
            main_process_says(lambda: make_writable(output.parent, *names))
            folder = output.with_suffix(".partial")
        jobs = Jobs(folder, configuration, overwrite=overwrite)
        pieces = folder / "images" if folder is not None and save_images else None
        work = _Work(subject, examples, attacks, seed, batch_size, jobs, pieces, progress)
        clean, attacked, probed = work.measure(signs=configuration["signs"] and subject.undefended is None)
        rejection = None
        if outside is not None:
            rejecting = Rejecting(subject, examples, outside, threshold, attacks, seed, batch_size, jobs, progress)
            rejection = rejecting.measure()
        evaluation = merge(clean, attacked, probed, subject, configuration, rejection)
        if corruptions:
            found = measure_corrupted(subject, examples, corruptions, seed, batch_size, jobs, progress)
            evaluation = replace(evaluation, corruptions=found)
    if output is not None:
        if pieces is not None:
            kept = main_process_says(lambda: keep_worst(images_path(output), pieces, attacked, batch_size))
            evaluation = replace(evaluation, images=kept)
        state = PartialState()
        if state.is_main_process:
            evaluation.save(output)
            jobs.remove()
        state.wait_for_everyone()
    return evaluation


def _rejecting(
    classifier: LogitsFn, data: datasets.Dataset | Tensor | None, classes: int, subject: Subject
) -> tuple[Examples | None, float]:
    """Returns the images of no class, if there are any, and the threshold that an image needs to be accepted."""
    if data is None:
        return None, 0.0
    if not isinstance(classifier, ZeroShotClassifier):
        raise ValueError("out_of_class needs a ZeroShotClassifier, whose adapter has a calibration with a threshold.")
    calibration, why = calibration_for(classifier)
    if calibration is None:
        raise ValueError(f"out_of_class needs a threshold: {why}.")
    if not subject.white_box:
        raise ValueError("out_of_class needs white-box attacks: leave out attack_target and attack_template.")
    if isinstance(data, Tensor):
        return Examples((data, torch.full((len(data),), classes)), classifier), calibration.threshold
    return Examples(data, classifier, label=classes), calibration.threshold


def check_call(attacks: Sequence[Any], batch_size: int, seed: int, output: Path | None) -> None:
    """Refuses what an evaluation of any kind cannot do: two attacks alike, a batch or seed out of range, another kind of file."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    check_seed(seed)
    if not all(hasattr(attack, "threat_model") for attack in attacks):
        raise TypeError(
            "attacks must be a list of objects such as parse_attack('pgd-20', ThreatModel('linf', '4/255')), not "
            f"{repr(attacks)[:80]}."
        )
    names = [(attack.name, attack.threat_model) for attack in attacks]
    for name, threat_model in names:
        if names.count((name, threat_model)) > 1:
            raise ValueError(f"The attack {name}, {threat_model} is given more than once.")
    if output is not None and output.suffix != ".json":
        raise ValueError(f"output={str(output)!r} must end in .json; other files go beside it under the same name.")
    # a process that waits for another's AutoAttack must not give up; torchrun's processes on CPUs are not seen by themselves
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def check_images_place(output: Path | None, attacks: Sequence[Attack]) -> None:
    """Raises a ValueError if there are no worst-case images, or if they would take the place of another file, such as weights."""
    if output is None or not attacks:
        raise ValueError("save_images=True needs an output, beside which the images lie, and attacks that make them.")
    path = images_path(output)
    if path.exists() and not (output.exists() or output.with_suffix(".partial").exists()):
        raise ValueError(f"{path}, where the images would go, is not one of an evaluation. Give another output.")


def agreed(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the main process's configuration in JSON types, with the same bits everywhere, or refuses another one's."""
    first, *others = gather_object([json.loads(json.dumps(configuration))])
    for number, other in enumerate(others, 1):
        if found := changes(other, first):
            raise ValueError(
                f"Process {number} does not measure what process 0 does: {some(found, 5, separator='; ')}."
            )
    return dict(first)


@dataclass
class _Work:
    """The pieces of an evaluation that fall to this process: batches without an attack, and under each."""

    subject: Subject
    examples: Examples
    attacks: Sequence[Attack]
    seed: int
    batch_size: int
    jobs: Jobs
    pieces: Path | None
    progress: bool

    def measure(self, *, signs: bool) -> tuple[BatchRecord, Attacked, dict[str, Any]]:
        """Does what is left; returns the records of all images, clean and under each attack, and what signs need."""
        names = ["clean", *(f"{i:02d}" for i in range(len(self.attacks)))]
        for name, attack in zip(names, [None, *self.attacks], strict=True):
            self._measure(name, attack)
        done = self.jobs.of_all()
        pieces = [[done[piece] for piece in sorted(done) if piece.startswith(f"{name}-")] for name in names]
        clean, *records = map(BatchRecord.joined, pieces)
        attacked = list(zip(self.attacks, records, strict=True))
        probed = done.get(SIGNS, {})
        if signs and SIGNS not in done:
            probed = main_process_says(lambda: self._probe(attacked))
        return clean, attacked, probed

    def _probe(self, attacked: Attacked) -> dict[str, Any]:
        probed = probe(self.subject, self.examples, attacked, self.seed, self.batch_size)
        self.jobs.keep(SIGNS, probed)
        return probed

    def _measure(self, name: str, attack: Attack | None) -> None:
        """Runs one attack on the batches of this process."""
        state, n = PartialState(), len(self.examples)
        starts = range(0, n, self.batch_size)
        batches = [(f"{name}-{i:06d}", list(range(n)[j : j + self.batch_size])) for i, j in enumerate(starts)]
        batches = batches[state.process_index :: state.num_processes]
        title = "clean" if attack is None else f"{attack.name}, {attack.threat_model}"
        total, hidden = sum(len(indices) for _, indices in batches), not (self.progress and state.is_main_process)
        # shown again at any step of an attack, at most once a second, with the rate since the start: images fall in bursts
        with tqdm(total=total, desc=title, unit="image", disable=hidden, miniters=0, mininterval=1, smoothing=0) as bar:
            robust, seen = 0.0, 0
            for piece, indices in batches:
                kept = None if self.pieces is None or attack is None else self.pieces / f"{piece}.safetensors"
                if piece not in self.jobs.done or not (kept is None or kept.is_file()):
                    self.jobs.keep(piece, self._record(indices, attack, bar, kept).to_dict())
                robust += BatchRecord(**self.jobs.done[piece]).right() / self.subject.decisions
                seen += len(indices)
                bar.update(seen - bar.n)
                bar.set_postfix_str(f"{'right' if attack is None else 'robust'} so far {100 * robust / seen:.1f}%")

    def _record(self, indices: list[int], attack: Attack | None, bar: tqdm[Any], kept: Path | None) -> BatchRecord:
        pixels, labels = self.examples.batch(indices, self.subject.device)
        if attack is None:
            return score_batch(self.subject, pixels, labels, indices, self.seed)

        done = bar.n + len(indices)

        def report(name: str, stage: str, left: int) -> None:
            part = "" if name == attack.name else f"{name}: "
            bar.set_postfix_str(part + joined(stage, f"{left} image{'s' * (left != 1)} left"), refresh=False)
            bar.update(max(done - left - bar.n, 0))  # broken by a rounding error, an image may stand again

        clean = BatchRecord(**self.jobs.done[f"clean-{indices[0] // self.batch_size:06d}"])
        record, adversarial = attack_batch(self.subject, attack, pixels, labels, indices, self.seed, report, clean)
        if kept is not None:
            keep_piece(kept, adversarial)
        return record
