"""The adapters that a benchmark kept, each by the line that says what it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from capt_peft.benchmark import Cell, Lines
from capt_peft.benchmark.inputs import load_base
from capt_peft.tuner.fingerprint import adapter_fingerprint


@dataclass(frozen=True)
class Kept:
    """A finished line of a benchmark, and the folder of its adapter."""

    cell: Cell
    line: Mapping[str, Any]
    folder: Path

    def load(self) -> tuple[Any, Any]:
        """Returns the model, of zero-shot the base model, and its processor.

        Raises:
            ValueError: The adapter is gone, or is not the one that the line is of.
        """
        model, processor = load_base(self.cell.model)
        if not self.cell.tuned:
            return model, processor
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}, the adapter of {self.cell}, is gone. Run the benchmark again.")
        model = PeftModel.from_pretrained(model, str(self.folder))
        if adapter_fingerprint(model) != self.line.get("adapter_fingerprint"):
            raise ValueError(
                f"{self.folder} is not the adapter that was measured as {self.cell}. Run the benchmark again."
            )
        return model, processor


def read_kept(path: Path, methods: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Kept]:
    """Returns the finished cells of a benchmark, without those of a defence or of a published protocol.

    Args:
        path: Its file of lines; the adapters are beside it.
        methods: Methods, or rows of its tables, such as "capt (rate 0.3)"; none: all.
        seeds: Seeds; none: all. Zero-shot stands for every seed.

    Raises:
        ValueError: It has no such cells.
    """
    found = [
        (Cell.from_dict(line["cell"]), line) for line in Lines(path).read().values() if line["status"] == "finished"
    ]
    found = [(cell, line) for cell, line in found if not (cell.defence or cell.evaluation_protocol)]
    labels = sorted({cell.label for cell, _ in found})
    unknown = [name for name in methods if not any(name in (cell.method, cell.label) for cell, _ in found)]
    if unknown or not found:
        raise ValueError(
            f"{path} has no finished cells of {', '.join(unknown) or 'any method'}. It has {', '.join(labels) or 'none'}."
        )
    return [
        Kept(cell, line, path.with_suffix(".adapters") / cell.training_key)
        for cell, line in found
        if (not methods or {cell.method, cell.label} & {*methods})
        and (not seeds or not cell.tuned or cell.seed in seeds)
    ]


def seeds_in(text: str | None) -> list[int]:
    """Returns the seeds of a command line, such as "0,1,2"; a ValueError if they are none."""
    parts = (text or "").split(",") if text else []
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--seeds {text}: seeds are whole numbers with commas between them, such as 0,1,2.")
    return [int(part) for part in parts]


def or_one_sentence(main: Callable[[], None]) -> None:
    """Runs a script, of which a ValueError is all that its user has to read."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
