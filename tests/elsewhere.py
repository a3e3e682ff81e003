"""A device that is not there: tensors that say they are on it, whose values are on the CPU, under the rules of a real one.

torch's own `FakeTensorMode` has no values, which attacks ask for, and no backward for a GPU that torch was not built for.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)  # the one kind that autograd of every build knows and none has
PACKAGE = str(Path(__file__).parents[1] / "capt_peft")
ATEN = torch.ops.aten
# operations that read values of a tensor, so that whoever calls them waits for the device
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default, ATEN.masked_select.default}
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
# operations that take an index from another device
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN._index_put_impl_.default, ATEN.index_put.default}


class There(Tensor):
    """A tensor on `DEVICE`; its values are those of `held`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor that is elsewhere, outside of Elsewhere()")

    def tolist(self) -> Any:
        """Returns the values, which are copied to the CPU for it; torch itself has no `tolist` for subclasses."""
        return self.cpu().tolist()


class Elsewhere(TorchDispatchMode):
    """Within it, tensors can be on `DEVICE`. As on a real one, they do not mix with those of the CPU.

    Attributes:
        waits: Where the package waited for the device, "file:line (operation)", and how often.
        made_here: Where the package made a tensor, or a generator, on the CPU.
    """

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch would set the device up when a tensor is made there

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.made_here: list[str] = []
        self._generator = torch.Generator

    def __enter__(self) -> Elsewhere:
        mode = self

        class Generator(self._generator):  # type: ignore[name-defined, misc]
            """A generator that draws on `DEVICE`, or on the CPU, which is noted."""

            def __new__(cls, device: Any = "cpu") -> Any:
                return super().__new__(cls)

            def __init__(self, device: Any = "cpu") -> None:
                self.place = torch.device(device)
                if self.place.type == "cpu":
                    mode.made_here += _caller("Generator")

            @property
            def device(self) -> torch.device:
                return self.place

        torch.Generator = Generator  # type: ignore[misc]
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch.Generator = self._generator  # type: ignore[misc]
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(isinstance(tensor, There) for tensor in tensors)
        asked, to = kwargs.get("device"), there
        if func is ATEN._fused_sdp_choice.default:
            return 0  # attention written out: the kernels of a device are its own
        if asked is not None:
            to, kwargs["device"] = torch.device(asked).type == DEVICE.type, torch.device("cpu")
        elif func is ATEN.copy_.default:
            to = isinstance(args[0], There)
        self._look(func, tensors, there, to, kwargs)
        held_args, held_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, There) else leaf, (args, kwargs))
        out = func(*held_args, **held_kwargs)
        own = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, There)}  # of operations in place

        def wrapped(leaf: Any) -> Any:
            if not to or not isinstance(leaf, Tensor):
                return leaf
            return own[id(leaf)] if id(leaf) in own else There(leaf)

        return tree_map(wrapped, out)

    def _look(self, func: Any, tensors: list[Tensor], there: bool, to: bool, kwargs: Any) -> None:
        """Notes what waits and what is made on the CPU; refuses tensors of two devices."""
        here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim > 0]
        if there and here and func not in INDEXED and func is not ATEN.copy_.default:
            raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU, {[tuple(t.shape) for t in here]}")
        masked = func in INDEXED and (here or any(t.dtype == torch.bool for t in tensors[1:]))
        copied = func in COPIES and len({isinstance(t, There) for t in tensors} | {to}) > 1
        if (there and (func in READS or masked)) or (copied and not (to and kwargs.get("non_blocking"))):
            self.waits.update(_caller(str(func)))
        elif func is ATEN.lift_fresh.default or not (tensors or to):
            self.made_here += _caller(str(func))


def _caller(operation: str) -> list[str]:
    """Returns the innermost place in the package, with the operation; none if the package did not ask for it."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return [f"{Path(frames[-1].filename).name}:{frames[-1].name} ({operation})"] if frames else []


def there(thing: Any) -> Any:
    """Returns a tensor, or a module, on `DEVICE`; to be called within `Elsewhere`."""
    if isinstance(thing, nn.Module):
        for module in thing.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(There(parameter.detach()), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = There(buffer)
        return thing
    return There(thing)
