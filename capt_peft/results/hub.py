"""Sharing adapters: saved with their record and card, measured again, and uploaded to the Hub in one commit."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from torch import nn
from transformers.utils import PushToHubMixin

from ..tuner.fingerprint import SAFETENSORS_NAME, adapter_fingerprint
from ..tuner.others import CLASSES, save_classes, settings_of
from ..tuner.switching import active_adapter
from ..utils.embedded import embedded_name
from ..utils.files import DamagedFileError, make_writable, read_json, write_json, write_text, written_whole
from ..utils.outputs import save_somewhere
from .card import (
    CARD,
    CardDetails,
    adapter_config,
    card_of,
    is_capt,
    is_hub_id,
    is_replaceable,
    kept_details,
    saved_config,
    without_local_paths,
    write_card,
    write_cards_for,
    write_saved_card,
)
from .earlier import changes, set_aside
from .evaluation import EVALUATION, SUFFIXES, Evaluation
from .examples import examples_path
from .kept import KeptImages, images_path
from .run import RESULTS, RecordError, Records, RunResults, why_unshown
from .strength import STRENGTH, StrengthFront

logger = logging.getLogger(__name__)

# the files of an adapter; the Trainer's checkpoints and its pickled arguments are not among them
_RECORDS = (CONFIG_NAME, RESULTS, EVALUATION, STRENGTH)
IMAGES = images_path(Path(EVALUATION)).name
UPLOADED = [SAFETENSORS_NAME, CLASSES, CARD, IMAGES, *_RECORDS]
_LOCAL_BASE = (
    "The base model was loaded from the folder %r, which adapter_config.json names: others cannot load it from there, and read "
    "where it lies. They give their own with base=. Load the base by its Hub id before you tune an adapter to share."
)


# ---------------------------------------------------------------------------------------------------------------- in a folder


def save_run(
    model: Any, results: RunResults, folder: str | Path, name: str, front: StrengthFront | None = None
) -> RunResults:
    """Writes the active adapter, its results and its card into a folder, each whole or not at all.

    Args:
        model: A `PeftModel`.
        results: The record of the run, of the model's very weights.
        folder: Where to write.
        name: Folder or Hub id by which people load it, for the card.
        front: What its strength was chosen on, where that was measured.

    Returns:
        The record as it was written, with the name and the size of the adapter.

    Raises:
        OSError: It could not be written there; the message says where it is instead.
        ValueError: The results are of other weights, or of no adapter. Nothing is written.
    """
    folder, adapter = Path(folder), results.adapter
    if adapter is None:
        raise ValueError("The results are those of a whole model: they have no fingerprint of an adapter.")

    def write(temporary: Path) -> None:
        save_active_adapter(model, temporary)
        size = (temporary / SAFETENSORS_NAME).stat().st_size
        saved = replace(results, adapter=replace(adapter, bytes=size), name=name)
        write_json(temporary / RESULTS, saved.to_dict())
        if front is not None:
            front.save(temporary / STRENGTH)
        write_cards_for(temporary, folder, name)

    save_somewhere(folder, write)
    of_strength = [STRENGTH, *(Path(STRENGTH).with_suffix(suffix).name for suffix in (".png", ".svg"))]
    for name in [EVALUATION, IMAGES, *([] if front else of_strength)]:  # they were of the adapter before
        (folder / name).unlink(missing_ok=True)
    return RunResults.load(folder)


def update_config(folder: str | Path, **settings: Any) -> None:
    """Writes settings into the configuration of an adapter in a folder, and its card again, unless a person wrote that.

    Args:
        folder: Folder of the adapter.
        settings: Fields of `CaptConfig`, in JSON types, that change nothing about the weights.

    Raises:
        OSError: Nothing can be written there.
        TypeError: A setting of another type.
        ValueError: The folder has no whole CAPT adapter, or a setting is out of range.
    """
    folder = Path(folder)
    replace(adapter_config(folder), **settings)  # or it raises
    kept = kept_details(folder / CARD, adapter_fingerprint(folder))
    path = folder / CONFIG_NAME
    write_json(path, dict(sorted((read_json(path) | settings).items())))
    write_saved_card(folder, adapter_config(folder), True, kept)


def save_strength(
    folder: str | Path, strength: float, *, front: StrengthFront | None = None, results: RunResults | None = None
) -> None:
    """Writes a strength into an adapter in a folder, with what was measured for it, and its card again.

    The weights stay. An evaluation of another strength that is there is kept under the name `evaluation.old1.json`.

    Args:
        folder: Folder of the adapter.
        strength: From 0 (the base model) to 1.
        front: What it was chosen on; by default the front that is there stays.
        results: The record of the run with the figures of this strength; by default the record that is there stays, and the
            card shows its figures only if they are of this strength.

    Raises:
        OSError: Nothing can be written there.
        ValueError: The folder has no whole CAPT adapter, or one that cannot have this strength.
    """
    folder = Path(folder)
    before = adapter_config(folder)
    replace(before, strength=strength)  # or it raises
    if strength != before.strength and (folder / EVALUATION).exists():
        set_aside(folder / EVALUATION, SUFFIXES, [f"strength is {strength:g} now and was {before.strength:g}"])
    with written_whole(folder) as temporary:
        if front is not None:
            front.save(temporary / STRENGTH)
        if results is not None:
            write_json(temporary / RESULTS, results.to_dict())
    # last: until then the record is one of another strength, which no card shows
    update_config(folder, strength=float(strength))


def check_update(folder: str | Path, configuration: Mapping[str, Any] | None = None) -> None:
    """Raises, before long work, what `update_card` would raise after it.

    Args:
        folder: Folder of the adapter.
        configuration: `task` and `model` of the evaluation to come; None: not compared.
    """
    folder = Path(folder)
    config, fingerprint = settings_of(saved_config(folder)), adapter_fingerprint(folder)
    results = Records.read(folder, fingerprint, names=(RESULTS,)).results
    make_writable(folder, EVALUATION, examples_path(Path(EVALUATION)).name, IMAGES, CARD, given="adapter")
    if configuration is not None:
        reason = why_unshown(configuration, fingerprint, config.get("base_model_fingerprint"), results)
        if reason is not None:
            raise RecordError(reason)


def update_card(folder: str | Path, evaluation: Evaluation, images: str | Path | None = None) -> Path:
    """Puts an evaluation into an adapter's folder and its card.

    An `evaluation.json` of another configuration that is there is kept under the name `evaluation.old1.json` (`.old2`, ...).

    Args:
        folder: Folder of the adapter.
        evaluation: Measured with the very weights there, and of the same images, classes and texts as the results there.
        images: The file of its worst-case images, which is copied; None: they stay where they are, and the figures there do not
            name them.

    Returns:
        The path of the card, README.md.

    Raises:
        ValueError: There is no whole CAPT adapter, its results are damaged or of other weights, nothing can be written there, or
            the evaluation is of other weights, on another base, or of other images, classes or texts. Nothing is written.
    """
    path = Path(folder, EVALUATION)
    check_update(folder, evaluation.configuration)
    if images is not None and (evaluation.images is None or KeptImages.of(Path(images)) != evaluation.images):
        raise RecordError(
            f"{images} does not have the worst-case images of this evaluation: their hash is not that of the file."
        )
    if path.exists():
        try:
            changed = changes(evaluation.configuration, read_json(path).get("configuration"))
        except DamagedFileError as error:
            changed = [str(error)]
        if changed:
            set_aside(path, SUFFIXES, changed)
    if images is None:
        evaluation = replace(evaluation, images=None)
    else:
        with written_whole(path.parent) as temporary:
            shutil.copyfile(images, temporary / IMAGES)
    evaluation.save(path)
    return write_card(folder)


def save_active_adapter(model: Any, folder: Path) -> None:
    """Writes the active adapter of a `PeftModel`, or of a model of transformers, into an empty folder, whatever its name."""
    name = active_adapter(model)
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    model.save_pretrained(str(folder), selected_adapters=[name])
    save_classes(model, folder)
    if name != "default":  # PEFT's layout
        for path in Path(folder, name).iterdir():
            path.replace(folder / path.name)
        Path(folder, name).rmdir()


# ---------------------------------------------------------------------------------------------------------------- on the Hub


def prepare_repo(repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
    """Creates a model repository unless it is there, and returns its full name; refuses a public one if `private` is True."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id, token=token).private:
        raise ValueError(
            f"{repo_id} exists already and is public, but private=True was asked for. Make it private on the Hub, or give "
            "another name. Nothing was uploaded."
        )
    return repo_id


def push_adapter(
    adapter: nn.Module | str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an adapter",
    strict: bool = True,
    **card: Any,
) -> CommitInfo:
    """Uploads an adapter's weights, configuration, card, figures and the worst-case images that they name, in one commit.

    Whatever fails, the Hub holds the old adapter or the new one, and pushing again is safe: what is there is not sent again.
    The card is made for the repository, unless the folder has a README.md that a person wrote. Results and evaluations go with it
    only if they are of these very weights; those on the Hub that are not are deleted with the commit.

    Args:
        adapter: A folder with an adapter, of CAPT or saved by `CaptTrainer`; a `PeftModel`, or a model of transformers with an
            adapter; of a model, the active adapter.
        repo_id: Name of the repository; it is created if needed.
        token: A token with write permission; by default that of the environment or of `hf auth login`.
        private: True: create a private repository, and refuse a public one.
        revision: Branch; by default the main one. It is created from the main one if needed.
        commit_message: Title of the commit.
        strict: False: records of other weights stay behind, with a warning, instead of stopping it.
        card: What else the card says: fields of `CardDetails` (`license`, `tags`, `dataset_name`, ...).

    Returns:
        The commit.

    Raises:
        TypeError: A word for the card that it has no place for.
        ValueError: There is no whole CAPT adapter in the folder, a record in it is damaged or of other weights, or the repository
            is public and `private` is True.
    """
    details = CardDetails.of(card)
    with _as_folder(adapter) as folder:
        _, records = card_of(folder, strict=strict)  # refuses damaged files and other methods
        for reason in records.unshown:
            logger.warning("Not uploaded from %s: %s", folder, reason)
        has_images = records.evaluation is not None and records.evaluation.has_images(folder / EVALUATION)
        if not has_images and (folder / IMAGES).is_file():
            logger.warning("Not uploaded from %s: %s does not have the images of %s.", folder, IMAGES, EVALUATION)
        base = str(saved_config(folder).base_model_name_or_path or "")
        if not is_hub_id(base) and embedded_name(base) is None:
            logger.warning(_LOCAL_BASE, base[:300])
        try:
            api, repo_id = HfApi(), prepare_repo(repo_id, token=token, private=private)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            contents: dict[str, Path | bytes] = {name: folder / name for name in UPLOADED if (folder / name).is_file()}
            for name in contents.keys() & _RECORDS:
                contents[name] = _for_others((folder / name).read_bytes())
            contents[CARD] = _card_to_send(folder, repo_id, details, strict).encode()
            operations: list[CommitOperationAdd | CommitOperationDelete] = []
            for name, record in (
                (RESULTS, records.results),
                (EVALUATION, records.evaluation),
                (IMAGES, records.evaluation if has_images else None),
                (STRENGTH, records.front),
            ):
                if record is None:
                    contents.pop(name, None)
                    if api.file_exists(repo_id, name, revision=revision, token=token):
                        operations.append(CommitOperationDelete(name))
            operations += [CommitOperationAdd(name, content) for name, content in contents.items()]
            # not upload_folder, which may spread the files over several commits
            return api.create_commit(repo_id, operations, commit_message=commit_message, token=token, revision=revision)
        except Exception as error:
            error.add_note(
                f"The upload to {repo_id} failed. All of the adapter is there now or nothing of it; pushing it again is safe."
            )
            raise


@contextmanager
def _as_folder(adapter: nn.Module | str | Path) -> Iterator[Path]:
    if not isinstance(adapter, nn.Module):
        yield Path(adapter)
        return
    if not getattr(adapter, "peft_config", None):
        raise ValueError(f"{type(adapter).__name__} has no adapter to upload. Use the model's own push_to_hub.")
    with tempfile.TemporaryDirectory() as temporary:
        save_active_adapter(adapter, Path(temporary))
        yield Path(temporary)


def _card_to_send(folder: Path, repo_id: str, details: CardDetails, strict: bool) -> str:
    """Returns the card for a repository: ours or, where a person wrote one, theirs."""
    if is_replaceable(folder / CARD):
        return card_of(folder, repo_id, details=details, strict=strict)[0]
    if details != CardDetails():
        logger.warning("%s was written by a person and stays as it is: what was given for the card is not in it.", CARD)
    return without_local_paths((folder / CARD).read_text(encoding="utf-8", errors="replace"))


def _for_others(record: bytes) -> bytes:
    """Returns a JSON file in which an embedded model goes by its name, and not by where it is in this environment."""

    def named(literal: re.Match[bytes]) -> bytes:
        name = embedded_name(json.loads(literal[0]))
        return literal[0] if name is None else json.dumps(name).encode()

    return re.sub(rb'"(?:[^"\\]|\\.)*"', named, record)


@contextmanager
def _configurations_for_others(folder: Path) -> Iterator[None]:
    """While PEFT or transformers uploads a folder, its adapters' configurations name an embedded model by its name."""
    saved = {
        path: path.read_bytes() for path in (folder / CONFIG_NAME, *folder.glob(f"*/{CONFIG_NAME}")) if path.is_file()
    }
    try:
        for path, content in saved.items():
            path.write_bytes(_for_others(content))
        yield
    finally:
        for path, content in saved.items():
            path.write_bytes(content)


def saved_copy(model: nn.Module, home: Path) -> Path | None:
    """Returns where in a folder the active adapter is saved with the weights that it has now, or None."""
    if not getattr(model, "peft_config", None):
        return None
    fingerprint = adapter_fingerprint(model)
    for folder in (home, home / active_adapter(model)):
        with suppress(OSError, ValueError, TypeError, SafetensorError):  # nothing there, or damaged
            if adapter_fingerprint(folder) == fingerprint:
                return folder
    return None


def write_model_card(model: nn.Module, home: Path, repo_id: str, details: CardDetails) -> None:
    """Writes the card of the adapter that is saved in a folder into it or, where none is, of the model's active one."""
    if (home / SAFETENSORS_NAME).is_file():
        write_card(home, details=details)
        return
    with _as_folder(model) as folder:
        write_text(home / CARD, card_of(folder, repo_id, details=details)[0])


def _with_our_card(upload: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the upload of transformers' `push_to_hub`, which puts a card of its own over the one that was saved."""

    @functools.wraps(upload)
    def upload_with_our_card(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        readme = Path(working_dir, CARD)
        if is_replaceable(readme):
            if isinstance(self, nn.Module) and is_capt(Path(working_dir)):
                details = CardDetails(tags=kept_details(readme, None).tags)
                readme.write_text(card_of(Path(working_dir), repo_id, details=details)[0], encoding="utf-8")
            elif readme.is_file() and any(map(is_capt, Path(working_dir).glob("*/"))):
                readme.unlink()  # each adapter with a name has its card beside it
        with _configurations_for_others(Path(working_dir)):
            return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_our_card._capt_peft = True  # type: ignore[attr-defined]
    return upload_with_our_card


# `PeftModel` and `PreTrainedModel` have no other place where the card of an adapter could be made
if not hasattr(PushToHubMixin._upload_modified_files, "_capt_peft"):
    PushToHubMixin._upload_modified_files = _with_our_card(PushToHubMixin._upload_modified_files)  # type: ignore[method-assign]
