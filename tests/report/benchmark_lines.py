"""Builds synthetic benchmark lines."""

import json
import zlib

from capt_peft.benchmark import Cell

METHODS = {"zero-shot": (60, 5), "tecoa": (66, 30), "adv-vlp": (68, 40), "capt": (71, 43)}


def figures(clean, robust=None, n=200, attack="pgd-20"):
    """What a result says: clean and robust accuracy in percent, on n images."""
    attacks = {} if robust is None else {attack: {"correct": round(robust * n / 100), "n": n}}
    return {"clean": {"correct": round(clean * n / 100), "n": n}, "attacks": attacks}


def line(
    method="capt", task="shapes", seed=0, clean=80, robust=40, *, results=None, error=None, collapsed=None, **changes
):
    """One line, few-shot by default; `changes` are of its cell."""
    n, attack = changes.pop("n", 200), changes.pop("attack", "pgd-20")
    cell = {
        "suite": "toy",
        "protocol": "few-shot",
        "method": method,
        "variant": "",
        "task": task,
        "shots": 0 if method == "zero-shot" else 16,
        "seed": seed,
        "split": "test",
        "model": "tiny-clip",
        "settings": {"learning_rate": 0.3},
        "prompts": {},
        "attacks": [attack],
        "epsilon": "10/255",
        "norm": "linf",
        "limit": n,
        **changes,
    }
    start = {"key": Cell.from_dict(cell).key, "cell": cell, "seconds": 15.2, "versions": {}, "machine": "a machine"}
    if error:
        return {**start, "status": "failed", "error": {"type": "ValueError", "message": error}}
    training = {"seconds": 12.3, "steps": 60, "images": 160, "collapsed": collapsed, "parameters": 8704}
    results = results or [{"task": task, "classes": "all", **figures(clean, robust, n, attack)}]
    return {**start, "status": "finished", "results": results, "training": training}


def write(path, lines, end=""):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + end)
    return path


def spread(*names):
    """A number in [-1, 1] that is always the same for the same names."""
    return zlib.crc32(repr(names).encode()) % 2001 / 1000 - 1


def suite(tasks, shots=(1, 4, 16, "all"), seeds=(0, 1, 2), methods=METHODS, n=200):
    """All lines of a few-shot suite."""
    lines = []
    for method, (clean, robust) in methods.items():
        for task in tasks:
            for i, s in enumerate([0] if method == "zero-shot" else shots):
                for seed in [0] if method == "zero-shot" else seeds:
                    hard = 14 * spread(task)
                    noise = 3 * spread(method, task, s, seed)
                    gain = 0 if method == "zero-shot" else 5 * i - 7
                    results = clean + hard + noise + gain, max(0, robust + hard + noise + gain)
                    lines.append(line(method, task, seed, *results, shots=s, n=n))
    return lines


def base_to_new(method, task, seed, base, new, **changes):
    results = [{"task": task, "classes": c, **figures(*pair)} for c, pair in (("base", base), ("new", new))]
    return line(method, task, seed, results=results, protocol="base-to-new", **changes)


def transfer(method, seed, accuracies, protocol="cross-dataset", **changes):
    """The first task of `accuracies` is the source."""
    results = [{"task": task, "classes": "all", **figures(*pair)} for task, pair in accuracies.items()]
    return line(method, next(iter(accuracies)), seed, results=results, protocol=protocol, **changes)
