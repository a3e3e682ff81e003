"""Reading checkpoint files without running anything that is in them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Where training scripts put the weights; TeCoA's files have a `state_dict` too, of its prompter
CONTAINERS = ("vision_encoder_state_dict", "state_dict", "model_state_dict", "model")
PROMPTS = ("state_dict", "add_prompter", "prompter")
NUMPY_GLOBALS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode")
NUMPY_DTYPES = ("Float64DType", "Float32DType", "Float16DType", "Int64DType", "Int32DType", "BoolDType")


class _Ignored:
    """Stands for a NumPy number in a pickle (TeCoA stores its best accuracy so), whose own code is not called."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: The weights by name.
        container: Entry of the file that the weights were in; None if they were the file.
        unused: Other entries of the file (epoch, optimizer, ...), which are not read.
    """

    tensors: dict[str, Tensor]
    container: str | None = None
    unused: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint: safetensors, or a file of `torch.save` of which nothing but tensors and numbers is loaded.

    Args:
        path: `.safetensors`, or any other ending (`.pt`, `.pth`, `.pth.tar`, `.bin`) for a file of `torch.save`.

    Returns:
        The weights, taken out of the containers that training scripts put them into.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A TorchScript archive, a pickle with other objects, a file that is cut short or no checkpoint, or one without
            weights of a model.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "does not exist; download it first"
        raise FileNotFoundError(f"The checkpoint {path} {what} (.pt, .pth, .pth.tar, .bin or .safetensors).")
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}. Download it again.") from error
    else:
        content = _torch_load(path)
    return _unpack(content, path)


def _torch_load(path: Path) -> Any:
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, a program, and is not run. OpenAI's models are on the Hub in transformers' "
            'form (openai/clip-vit-base-patch32). Otherwise, if you trust it: torch.save(torch.jit.load("'
            f'{path.name}", map_location="cpu").state_dict(), "clip.pt"), and convert that.'
        )
    harmless: list[Any] = [(_Ignored, name) for name in (*NUMPY_GLOBALS, *(f"numpy.dtypes.{d}" for d in NUMPY_DTYPES))]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # a damaged pickle fails in a dozen ways
        found = re.search(r"(?:GLOBAL|class|global:?) ([\w.]+\.\w+)", str(error))
        if found:
            raise ValueError(
                f"{path} holds more than tensors ({found[1]}), which may run code and was not loaded. If you trust it, save its "
                "state dict alone: torch.save(model.state_dict(), ...), and convert that."
            ) from error
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a checkpoint that torch can read, or it is cut short: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__} Download it again."
        ) from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _unpack(content: Any, path: Path) -> Checkpoint:
    """Takes the weights out of their container."""
    entries = content if isinstance(content, Mapping) else {}
    container = next((name for name in CONTAINERS if _tensors(entries.get(name))), None)
    unused: tuple[str, ...] = ()
    if container is not None:
        unused = tuple(sorted(str(name) for name in entries if name != container))
        # TeCoA's scripts store visual prompts beside the encoder: an encoder tuned with them is not the model without them
        prompts = (name for name in PROMPTS if any(t.numel() for t in _tensors(entries.get(name))))
        if container == "vision_encoder_state_dict" and (name := next(prompts, None)):
            raise ValueError(
                f"{path} holds visual prompts ({name}) beside the vision encoder, and CLIPModel has no place for them. Convert a "
                "checkpoint of fine-tuning, not of prompting."
            )
        content = entries[container]
    if not _tensors(content):
        given = f"the entries {sorted(map(str, entries))[:5]}" if entries else type(content).__name__
        raise ValueError(
            f"{path} holds no weights of a model but {given}. It should be a state dict, or hold one as {', '.join(CONTAINERS)}."
        )
    strange = sorted(str(name) for name, t in content.items() if not isinstance(t, Tensor) or not isinstance(name, str))
    if strange:
        raise ValueError(
            f"{path}: {strange[0]} is not a named tensor. A state dict holds nothing else; save model.state_dict()."
        )
    return Checkpoint(dict(content), container, unused)


def _tensors(content: Any) -> list[Tensor]:
    return [value for value in content.values() if isinstance(value, Tensor)] if isinstance(content, Mapping) else []
