"""A classifier as one file that runs without this package: ONNX, or a program of torch; and such an ONNX file as a callable."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..tuner import CaptConfig, adapters_in_use
from ..tuner.fingerprint import adapter_fingerprint, base_fingerprint
from ..utils.files import make_writable, open_regular, written_whole
from ..utils.machine import versions
from ..utils.modules import eval_mode
from ..utils.text import short, shown, some
from .classifier import ZeroShotClassifier

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}  # and how the names of the files end
OPSET = 18  # the version of ONNX's operators
DESCRIPTION = "capt_peft"  # the entry of the file's metadata that describes it
PACKAGES = ("onnxruntime", "onnxscript")  # what the ONNX format needs
TOLERANCE = 1e-2  # rounding stays a hundred times below; a graph that computes something else does not
_LARGEST = (1 << 31) - (1 << 24)  # bytes of weights: a file of ONNX holds 2 GiB at most, graph included
_SAMPLES = 3  # images that a new file is compared with the classifier on


def export(
    classifier: ZeroShotClassifier,
    path: str | Path,
    format: str = "onnx",
    *,
    int8: bool = False,
    overwrite: bool = False,
) -> float:
    """Writes a classifier as one file: pixels (B, 3, H, W) float32 in [0, 1] -> logits (B, N) float32, for any B.

    Normalisation, the image tower with the prompts at their strength, and the features of the N class texts (`text_matrix`) are
    inside, the text tower is not. So is a description, as JSON (see `describe_export`): the entry `capt_peft` of an ONNX file's
    metadata, the extra file `capt_peft.json` of a torch program.

    Args:
        classifier: What is exported, as it is now (adapter off: the base model): on the CPU, in float32.
        path: The file. Its name ends with .onnx or .pt2.
        format: "onnx" (opset 18; runs with onnxruntime) or "torch" (runs with `torch.export.load(path).module()`).
        int8: Store the weights of the linear layers as 8-bit integers, and multiply in 8 bits. It is onnxruntime's dynamic
            quantisation, which rounds activations by the range that they have in the batch. For ONNX alone.
        overwrite: Replace a file that is there.

    Returns:
        How far the file's logits are from the classifier's on random images, at most: rounding, or with `int8` the price of it.

    Raises:
        ValueError: An unknown format, `int8` with another one than ONNX, a name with another ending, a place that is taken or
            cannot be written, a classifier that is not in float32 on the CPU, more than 2 GiB of weights for ONNX, or logits that
            are not finite. Nothing is written then.
        ModuleNotFoundError: The extra `export` is not installed.
    """
    path = Path(path)
    check_export(path, format, int8=int8, overwrite=overwrite)
    _check_exact(classifier)
    description = describe_export(classifier, int8=int8)
    with eval_mode(classifier), torch.no_grad():
        pixels = torch.rand(_SAMPLES, 3, *classifier.transform.size, generator=torch.Generator().manual_seed(0))
        expected = classifier(pixels)
        program = _program(classifier, pixels)
        with written_whole(path.parent) as folder:
            if format == "torch":
                torch.export.save(
                    program, folder / path.name, extra_files={f"{DESCRIPTION}.json": json.dumps(description)}
                )
                found = program.module()(pixels)
            else:
                _write_onnx(program, folder / path.name, description, int8)
                found = OnnxClassifier(folder / path.name)(pixels)
            difference = float((found - expected).abs().max())
            if not (difference <= TOLERANCE or (int8 and difference < float("inf"))):
                raise ValueError(
                    f"The logits of the exported file are not the classifier's (they differ by {difference:.3g} at most; "
                    f"{TOLERANCE:g} is allowed). Nothing was written. If the classifier's own are finite, this is a bug of the "
                    "exporter: report the versions that `capt-peft env` shows."
                )
    return difference


def describe_export(classifier: ZeroShotClassifier, *, int8: bool = False) -> dict[str, Any]:
    """Returns what a server has to know of an exported classifier, in JSON types.

    Returns:
        `class_names`, in the order of the logits; `template`; `texts`, by class name those whose mean is taken (files of earlier
        versions lack them); `preprocessing`, how an RGB image becomes pixels: `resize`
        (`{"shortest_edge": n}`, or `{"height": h, "width": w}`) with the interpolation `resample`, then the centre `center_crop`
        (either may be None), then values divided by 255 (normalisation is inside of the file); `size`, height and width of the
        pixels; `precision`, float32 or int8; `strength`, of the CAPT adapter that acts, or None; `calibration`, the fields of the
        `Calibration` that holds for the classifier, or None; `adapter` and `base_model`, fingerprints; `versions`.
    """
    steps, model, calibration = classifier.transform.to_dict(), classifier.model, classifier.calibration
    in_use = adapters_in_use(model)
    tuned = any(isinstance(model.peft_config.get(name), CaptConfig) for name in in_use)
    texts: dict[str, list[str]] = {name: [] for name in classifier.class_names}
    for label, text in zip(classifier.text_labels, classifier.texts, strict=True):
        texts[classifier.class_names[label]].append(text)
    return {
        "class_names": list(classifier.class_names),
        "template": classifier.template,
        "texts": texts,
        "preprocessing": {name: steps[name] for name in ("resize", "resample", "center_crop")},
        "size": list(classifier.transform.size),
        "precision": "int8" if int8 else "float32",
        "strength": classifier.strength if tuned else None,
        "calibration": calibration.to_dict() if calibration is not None else None,
        "adapter": adapter_fingerprint(model) if in_use else None,
        "base_model": base_fingerprint(model),
        "versions": versions(*PACKAGES),
    }


def check_export(path: str | Path, format: str = "onnx", *, int8: bool = False, overwrite: bool = False) -> None:
    """Refuses what `export` would refuse, before a model is loaded; arguments and errors are those of `export`."""
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}. Allowed: {', '.join(FORMATS)}.")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is for the format onnx, not {format}. Leave one of them out.")
    if path.suffix != FORMATS[format]:
        raise ValueError(
            f"The file's name, {shown(path.name)}, must end with {FORMATS[format]} for the format {format}."
        )
    if format == "onnx":
        _check_packages(*PACKAGES)
    make_writable(path.parent, path.name)
    if path.exists() and not overwrite:
        raise ValueError(f"{short(path)} is there already. Give overwrite=True to replace it, or another name.")


class OnnxClassifier:
    """An exported ONNX file as a callable, which `evaluate` measures; it passes no gradients to the pixels.

    Args:
        path: The file.

    Attributes:
        description: See `describe_export`.
        class_names: The N class names, in the order of the logits.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or was not written by `export`.
        ModuleNotFoundError: The extra `export` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        _check_packages("onnxruntime")
        import onnxruntime

        open_regular(path).close()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # it would take all cores, whatever OMP_NUM_THREADS says
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it derives its own from Exception alone
            raise ValueError(f"{path} cannot be read as an ONNX file ({str(error)[:200]}).") from error
        described = self._session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
        if described is None:
            raise ValueError(f"{path} was not written by `capt-peft export`: its metadata have no {DESCRIPTION!r}.")
        self.description: dict[str, Any] = json.loads(described)
        self.class_names = tuple(self.description["class_names"])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the logits (B, N) of pixels (B, 3, H, W) in [0, 1], on their device.

        Raises:
            TypeError: Something else than a tensor, or one of whole numbers.
            ValueError: Pixels of another shape than the file takes.
        """
        height, width = self.description["size"]
        takes = f"the file takes (B, 3, {height}, {width}) of floats in [0, 1]"
        if not (isinstance(pixels, Tensor) and pixels.is_floating_point()):
            given = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise TypeError(f"pixels are {given}, but {takes}: give a tensor, of `PixelTransform.batch` for one.")
        if pixels.ndim != 4 or pixels.shape[1:] != (3, height, width):
            raise ValueError(
                f"pixels have the shape {tuple(pixels.shape)}, but {takes}. Resize images as its description says, and give "
                "one image the axis B too."
            )
        (logits,) = self._session.run(["logits"], {"pixels": pixels.detach().cpu().float().numpy()})
        return torch.from_numpy(logits).to(pixels.device)


def _check_exact(classifier: ZeroShotClassifier) -> None:
    """Raises a ValueError unless all weights are in float32 on the CPU."""
    kinds = {f"{p.dtype} on {p.device.type}" for p in classifier.model.parameters()} - {f"{torch.float32} on cpu"}
    if kinds:
        raise ValueError(
            f"Only a classifier in float32 on the CPU is exported, and this one has {some(sorted(kinds))}. Bring it there, "
            "classifier.float().cpu(), or load it with dtype=torch.float32 and without quantization_config."
        )


def _check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install 'capt-peft[export]'.",
            name=missing[0],
        )


class _Fixed(nn.Module):
    """A classifier whose text features are computed already."""

    text_matrix: Tensor  # (N, D)

    def __init__(self, classifier: ZeroShotClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("text_matrix", classifier.text_features())

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the logits (B, N)."""
        return self.classifier.logits(self.classifier.image_features(pixels), self.text_matrix)


def _program(classifier: ZeroShotClassifier, pixels: Tensor) -> ExportedProgram:
    """Returns what the classifier computes of such images, without what it does not use and without paths of this machine."""
    shapes = {"pixels": {0: Dim("batch")}}
    program = torch.export.export(_Fixed(classifier).eval(), (pixels,), dynamic_shapes=shapes, strict=False)
    unused = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    specifications = program.graph_signature.input_specs
    for specification in [s for s in specifications if getattr(s.arg, "name", None) in unused]:
        specifications.remove(specification)
        program.graph.erase_node(unused[specification.arg.name])
        for tensors in (program.state_dict, program.constants):  # the text tower, for one
            tensors.pop(specification.target, None)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.graph_module.recompile()
    return program


def _write_onnx(program: ExportedProgram, path: Path, description: dict[str, Any], int8: bool) -> None:
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > _LARGEST:
        raise ValueError(
            f"The weights have {size / 2**30:.1f} GiB, and a file of ONNX holds 2 at most. Export with the format torch."
        )
    with _quiet():
        exported: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["pixels"], output_names=["logits"], verbose=False
        )
    for node in exported.model.graph:
        node.metadata_props.clear()  # the lines of source that it comes from
    exported.model.metadata_props[DESCRIPTION] = json.dumps(description)
    exported.save(path, external_data=False)
    if int8:
        _quantize(path)


def _quantize(path: Path) -> None:
    """Quantises the linear layers of an ONNX file, in place.

    Weights take 7 of the 8 bits: x86 processors without VNNI add up two products in 16 bits, which 8 would overflow, and the file
    would give other answers there. A scale per output channel makes up for it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = ["MatMul", "Gemm"]  # where one side is weights
    with _quiet():
        quantize_dynamic(
            path, path, op_types_to_quantize=kinds, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, the exporters do not tell of their own affairs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "root")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
