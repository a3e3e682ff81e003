"""`evaluate`: every image under every attack, in pieces that survive a kill and that processes share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import Attack, LogitsFn, ThreatModel
from ..results.earlier import changes, set_aside
from ..results.evaluation import Evaluation, examples_path
from ..utils.files import DamagedFileError, make_writable, read_json, written_whole
from ..utils.modules import buffers_kept, eval_mode, modules_in
from ..utils.outputs import main_process_says
from ..utils.versions import describe_machine, versions
from .batch import attack_batch
from .images import Examples, warn_of_units
from .merge import black_box_needed, merge, standing
from .resume import Jobs
from .sample import sample_logits, spread
from .signs import PROBES, probe, probe_black_box
from .subject import Subject, subject_of

logger = logging.getLogger(__name__)

SIGNS = "signs"


@dataclass(frozen=True)
class _Job:
    """One piece of work: an attack (None: no attack) on a batch."""

    name: str
    attack: int | None
    indices: list[int]


def evaluate(
    classifier: LogitsFn,
    data: datasets.Dataset | tuple[Tensor, Tensor],
    attacks: Attack | Sequence[Attack] = (),
    *,
    batch_size: int = 128,
    seed: int = 0,
    attack_target: str = "tuned",
    attack_template: str | None = None,
    signs: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    save_images: bool = False,
    details: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures clean accuracy, and accuracy under each attack and in the worst case over them.

    White box through the prompts, unless `attack_target` or `attack_template` say otherwise; only then is it robust accuracy. The
    processes of `accelerate launch` or `torchrun` share the work. With `output`, a killed evaluation goes on where it was
    when it is called again, and ends in the same file.

    Args:
        classifier: A `ZeroShotClassifier`, or any callable from pixels (B, 3, H, W) in [0, 1] to logits (B, N); measured in
            eval mode and given back in the mode it had.
        data: A split of a task (columns `image` and `label`), or, for any classifier, pixels (n, 3, H, W) and labels (n,).
        attacks: Attacks, each with its threat model; none measures clean accuracy alone.
        batch_size: Images a piece of work. It changes no random number.
        seed: Seed of the attacks.
        attack_target: "tuned", or "frozen": attacks see the base model with the adapter off, and transfer.
        attack_template: Text of a class that attacks see instead of the classifier's own, with one `{}`.
        signs: Look for signs of masked gradients.
        output: JSON file for the figures; the examples go to a parquet file of that name, and unfinished work to a folder of that
            name with ".partial" at its end, which is removed in the end.
        overwrite: Measure again and replace what is there, instead of returning results of the same configuration and keeping
            those of another one under a name with ".old1" (".old2", ...) before its suffix.
        save_images: Keep the adversarial images, as float32 safetensors in a folder of that name with ".images" at its end.
        details: What else the figures depend on, for the record (JSON types).
        progress: Show a progress bar, in the main process.

    Returns:
        The figures and the examples, the same in every process.

    Raises:
        TypeError: Data or classifier of the wrong kind.
        ValueError: No images, labels that do not fit, two attacks alike, `save_images` without `output`, or an output that cannot
            be written or holds something else than an evaluation.
    """
    attacks = list(attacks) if isinstance(attacks, Sequence) else [attacks]
    output = None if output is None else Path(output)
    _check(attacks, batch_size, output, save_images)
    with _lent(classifier):
        subject = subject_of(classifier, attack_target, attack_template)
        examples = Examples(data, classifier)
        logits, classes = sample_logits(subject, examples, batch_size)
        examples.check_labels(classes)
        warn_of_units(attacks, examples)
        configuration = json.loads(
            json.dumps(
                {
                    **(details or {}),
                    "model": {**subject.description, "logits": logits},
                    "data": examples.to_dict(),
                    "attacks": [attack.to_dict() for attack in attacks],
                    "attack_target": attack_target,
                    "attack_template": attack_template,
                    "seed": seed,
                    "batch_size": batch_size,
                    "signs": signs and subject.white_box,
                    "save_images": save_images,
                    "versions": versions(),
                }
            )
        )
        configuration = _agreed(configuration)
        finished = _finished(output, configuration, overwrite)
        if finished is not None:
            return finished
        if output is not None:
            names = output.name, examples_path(output).name
            main_process_says(lambda: make_writable(output.parent, *names))
        images = _beside(output, ".images") if save_images else None
        stale = [path for path in (images,) if path is not None]
        jobs = Jobs(_beside(output, ".partial"), configuration, overwrite=overwrite, stale=stale)
        work = _Work(subject, examples, attacks, seed, jobs, images, progress)
        work.run(batch_size, signs=configuration["signs"])
        evaluation = merge(work.results(), attacks, subject, configuration, describe_machine())
    state = PartialState()
    if output is not None:
        if state.is_main_process:
            evaluation.save(output)
            jobs.remove()
        state.wait_for_everyone()
    return evaluation


def _check(attacks: Sequence[Attack], batch_size: int, output: Path | None, save_images: bool) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    names = [(attack.name, attack.threat_model) for attack in attacks]
    twice = [f"{name}, {threat}" for name, threat in names if names.count((name, threat)) > 1]
    if twice:
        raise ValueError(f"The attack {twice[0]} is given more than once.")
    if save_images and output is None:
        raise ValueError("save_images=True needs an output: the images lie beside it.")
    if output is not None and output.suffix != ".json":
        raise ValueError(
            f"output={str(output)!r} must end in .json; the examples go to a .parquet file of the same name."
        )
    # a process that waits for another's AutoAttack must not give up; torchrun's processes on CPUs are not seen by themselves
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


@contextmanager
def _lent(classifier: LogitsFn) -> Iterator[None]:
    """Within it, the classifier is in eval mode and its parameters without gradients; afterwards it is as it was."""
    mode = eval_mode(classifier, gradients=False) if isinstance(classifier, nn.Module) else nullcontext()
    with mode, buffers_kept(modules_in(classifier)):
        yield


def _agreed(configuration: dict[str, Any]) -> dict[str, Any]:
    """Returns the main process's configuration, which has the same bits everywhere.

    Raises:
        ValueError: The processes measure different things.
    """
    if PartialState().num_processes == 1:
        return configuration
    first, *others = gather_object([configuration])
    for number, other in enumerate(others, 1):
        if found := changes(other, first):
            raise ValueError(f"Process {number} does not measure what process 0 does: {'; '.join(found[:5])}.")
    return dict(first)


def _beside(output: Path | None, suffix: str) -> Path | None:
    return None if output is None else output.with_suffix(suffix)


def _finished(output: Path | None, configuration: Mapping[str, Any], overwrite: bool) -> Evaluation | None:
    """Returns what an earlier call has finished with the same configuration; None if it must be measured (again)."""
    if output is None or overwrite or not main_process_says(lambda: _is_of(output, configuration)):
        return None
    try:
        evaluation = Evaluation.load(output)
    except ValueError as error:
        logger.warning("%s The evaluation is measured again.", error)
        return None
    logger.info("%s holds this evaluation already.", output)
    return evaluation


def _is_of(output: Path, configuration: Mapping[str, Any]) -> bool:
    """Whether a file holds results of a configuration; those of another one are set aside."""
    if not output.exists():
        return False
    try:
        content = read_json(output)
    except DamagedFileError as error:
        logger.warning("%s The evaluation is measured again.", error)
        return False
    if content.get("kind") != "evaluation":
        raise ValueError(f"{output} holds something else than an evaluation. Give another output, or overwrite=True.")
    changed = changes(configuration, content.get("configuration") or {})
    if changed:
        set_aside(output, (".json", ".parquet", ".images"), changed)
    return not changed


class _Work:
    """The pieces of an evaluation that fall to this process."""

    def __init__(
        self,
        subject: Subject,
        examples: Examples,
        attacks: Sequence[Attack],
        seed: int,
        jobs: Jobs,
        images: Path | None,
        progress: bool,
    ) -> None:
        self.subject, self.examples, self.attacks = subject, examples, attacks
        self.seed, self.jobs, self.images = seed, jobs, images
        self.state = PartialState()
        self.progress = progress and self.state.is_main_process

    def run(self, batch_size: int, *, signs: bool) -> None:
        """Does what is left."""
        batches = [
            list(range(start, min(start + batch_size, len(self.examples))))
            for start in range(0, len(self.examples), batch_size)
        ]
        for attack in (None, *range(len(self.attacks))):
            name = "clean" if attack is None else f"{attack:02d}"
            jobs = [_Job(f"{name}-{i:06d}", attack, indices) for i, indices in enumerate(batches)]
            mine = jobs[self.state.process_index :: self.state.num_processes]
            self._run_attack(mine)
        if signs and SIGNS not in self.jobs.done:
            results = self.results()  # of all processes, which therefore all come here
            if self.state.is_main_process:
                self.jobs.keep(SIGNS, self._probe(results, batch_size))

    def results(self) -> dict[str, Any]:
        """Returns the results of all pieces, of all processes."""
        parts = gather_object([self.jobs.done]) if self.state.num_processes > 1 else [self.jobs.done]
        return {name: result for part in parts for name, result in part.items()}

    def _run_attack(self, jobs: list[_Job]) -> None:
        """Runs one attack on the batches of this process."""
        attack = None if not jobs or jobs[0].attack is None else self.attacks[jobs[0].attack]
        title = "clean" if attack is None else f"{attack.name}, {attack.threat_model}"
        with tqdm(
            total=sum(len(job.indices) for job in jobs), desc=title, unit="image", disable=not self.progress
        ) as bar:
            robust = seen = 0
            for job in jobs:
                if job.name not in self.jobs.done:
                    self.jobs.keep(job.name, self._clean(job) if attack is None else self._attack(job, attack, bar))
                record = self.jobs.done[job.name]
                robust += sum(a == b for a, b in zip(record["prediction"], record["label"], strict=True))
                seen += len(job.indices)
                bar.update(len(job.indices))
                bar.set_postfix_str(f"{'right' if attack is None else 'robust'} so far {100 * robust / seen:.1f}%")

    def _clean(self, job: _Job) -> dict[str, Any]:
        pixels, labels = self.examples.batch(job.indices, self.subject.device)
        ThreatModel("linf", 0).check(pixels, labels)
        prediction = self.subject.scored(pixels).argmax(1)
        return {"index": job.indices, "label": labels.tolist(), "prediction": prediction.tolist()}

    def _attack(self, job: _Job, attack: Attack, bar: tqdm[Any]) -> dict[str, Any]:
        def report(name: str, left: int, standing: int) -> None:
            bar.set_postfix_str(f"{name}: {left} images left, {standing} of {len(job.indices)} robust so far")

        pixels, labels = self.examples.batch(job.indices, self.subject.device)
        attacked = attack_batch(self.subject, attack, pixels, labels, job.indices, self.seed, report)
        if self.images is not None:
            self._save_images(job, attack, attacked.images, labels)
        return attacked.record

    def _save_images(self, job: _Job, attack: Attack, images: Tensor, labels: Tensor) -> None:
        assert self.images is not None
        tensors = {"pixels": images.float().cpu(), "labels": labels.cpu(), "index": torch.tensor(job.indices)}
        metadata = {"attack": attack.name, "threat_model": str(attack.threat_model)}
        with written_whole(self.images) as folder:
            save_file(tensors, folder / f"{job.name}-{attack.name}.safetensors", metadata)

    def _probe(self, results: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """Runs the probes on images from all over the dataset that are classified correctly."""
        threats = list(dict.fromkeys(attack.threat_model for attack in self.attacks))
        candidates = spread(range(len(self.examples)), 4 * PROBES)
        pixels, labels = self.examples.batch(candidates, self.subject.device)
        right = (self.subject.scored(pixels).argmax(1) == labels).nonzero().squeeze(1).tolist()
        if not threats or not right:
            return {}
        rows = spread(right, PROBES)
        indices = [candidates[row] for row in rows]
        probed = probe(self.subject, pixels[rows], labels[rows], indices, threats, self.seed)
        return {**probed, "black_box": self._probe_black_box(results, batch_size)}

    def _probe_black_box(self, results: Mapping[str, Any], batch_size: int) -> list[dict[str, Any]]:
        """Runs Square on a few of the images that the gradients of the attacks did not break, once for each norm."""
        if not black_box_needed(self.attacks, results):
            return []
        found = []
        for threat, left in standing(self.attacks, results):
            indices = spread(left, PROBES)
            chunks = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
            batches = [(*self.examples.batch(chunk, self.subject.device), chunk) for chunk in chunks]
            broken = sum(probe_black_box(self.subject, threat, *batch, self.seed) for batch in batches)
            found.append({"threat_model": str(threat), "images": len(indices), "broken": broken})
        return found
