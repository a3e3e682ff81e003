"""Modules that are borrowed and come back as they were: mode, gradients, buffers. Several threads may borrow one at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Changes = dict[Any, Callable[[], Callable[[], Any]]]  # by key: what changes a thing, and returns what puts it back
_DEPTH = 4  # functions within functions that are searched for modules


class _Loans:
    """What is borrowed now: the first borrower changes a thing, the last one puts it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loans: dict[Any, tuple[int, Callable[[], Any]]] = {}  # key -> (borrowers, what puts it back)

    @contextmanager
    def borrow(self, wanted: Changes) -> Iterator[None]:
        """Holds things by their keys."""
        with self._lock:
            for key, change in wanted.items():
                count, restore = self._loans.get(key) or (0, change())
                self._loans[key] = count + 1, restore
        try:
            yield
        finally:
            with self._lock:
                for key in wanted:
                    count, restore = self._loans.pop(key)
                    if count > 1:
                        self._loans[key] = count - 1, restore
                    else:
                        restore()


_LOANS = _Loans()  # a loan keeps its thing alive, so that the thing's id() names it


@contextmanager
def eval_mode(model: nn.Module, *, gradients: bool = True) -> Iterator[None]:
    """Within it, a model and all its modules are in eval mode; afterwards each has the mode that it had.

    Args:
        model: The model; other threads may use it in the same way at the same time.
        gradients: Leave `requires_grad` as it is; False: switch it off, so that a backward to the pixels keeps fewer tensors.
    """
    wanted: Changes = {("mode", id(module)): partial(_set, module, "training", False) for module in model.modules()}
    if not gradients:
        wanted |= {
            ("gradient", id(parameter)): partial(_set, parameter, "requires_grad", False)
            for parameter in model.parameters()
            if parameter.is_leaf
        }
    with _LOANS.borrow(wanted):
        yield


def _set(thing: Any, name: str, value: bool) -> Callable[[], Any]:
    before = getattr(thing, name)
    if before != value:
        setattr(thing, name, value)
    return partial(_set, thing, name, before)


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, modules may change their buffers (running statistics, counters); afterwards these are as they were."""
    wanted: Changes = {
        ("buffer", id(module), name): partial(_copy, module, name)
        for root in modules
        for module in root.modules()
        for name in module._buffers
    }
    with _LOANS.borrow(wanted):
        yield


def _copy(module: nn.Module, name: str) -> Callable[[], None]:
    buffer = module._buffers[name]
    with torch.no_grad():
        return partial(_restore, module, name, buffer, None if buffer is None else buffer.clone())


def _restore(module: nn.Module, name: str, buffer: Tensor | None, before: Tensor | None) -> None:
    if name in module._buffers and module._buffers[name] is not buffer:
        module._buffers[name] = buffer
    if buffer is None or before is None or buffer.is_meta:
        return
    if buffer.shape != before.shape or not torch.equal(buffer, before):
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.data = before.to(buffer.device) if buffer.shape != before.shape else buffer.data
            buffer.copy_(before)


def modules_in(function: Any) -> list[nn.Module]:
    """Returns the modules that a callable runs, as far as they can be found.

    It may be one, a method of one, or a function, partial or object that holds one: in its closure, arguments, attributes, or the
    global names that it uses.
    """
    return [thing for thing in _held(function) if isinstance(thing, nn.Module)]


def arrays_in(function: Any) -> list[Tensor]:
    """Returns the tensors and NumPy arrays of numbers that a callable holds outside of modules; see `modules_in`."""
    held = [torch.as_tensor(thing) if isinstance(thing, np.ndarray) else thing for thing in _held(function)]
    return [thing for thing in held if isinstance(thing, Tensor)]


def _held(function: Any) -> list[Any]:
    """Returns the modules, tensors and arrays that are found in a callable, each once."""
    found: list[Any] = []
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(function, 0)]
    while todo:
        thing, depth = todo.pop()
        if id(thing) in seen or depth > _DEPTH:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module | Tensor) or (isinstance(thing, np.ndarray) and thing.dtype.kind in "biuf"):
            found.append(thing)
        else:
            todo += [(part, depth + 1) for part in _parts(thing)]
    return found


def _parts(thing: Any) -> list[Any]:
    """Returns what a callable, or a collection that one holds, consists of."""
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, MethodType):
        owner = thing.__self__
        return [thing.__func__, owner, *getattr(owner, "__dict__", {}).values()]
    if isinstance(thing, FunctionType):
        return [*_closure(thing), *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *_globals(thing)]
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, dict):
        return list(thing.values())
    if callable(thing) and not isinstance(thing, type):
        return [type(thing).__call__, *getattr(thing, "__dict__", {}).values()]
    return []


def _closure(function: FunctionType) -> list[Any]:
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a name that is not bound yet
            contents.append(cell.cell_contents)
    return contents


def _globals(function: FunctionType) -> list[Any]:
    """Returns the modules that a function names, and the functions of its own file."""
    values = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [
        value
        for value in values
        if isinstance(value, nn.Module | Tensor | np.ndarray | list | tuple | dict)
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    ]
