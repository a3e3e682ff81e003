"""Sharing adapters on the Hub: an adapter's own files, in one commit, and nothing else."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from safetensors import SafetensorError
from torch import nn
from transformers.utils import PushToHubMixin

from ..tuner import CaptConfig
from ..tuner.fingerprint import SAFETENSORS_NAME, active_adapter, adapter_fingerprint
from ..utils.files import write_text
from .card import CardDetails, adapter_config, card_of, is_capt, write_card
from .card_details import is_hub_id, is_replaceable, kept_details, without_local_paths
from .records import EVALUATION, RESULTS, Records
from .run import UPLOADED, save_active_adapter

logger = logging.getLogger(__name__)

CARD = "README.md"
# the arguments of transformers' `create_model_card`, in their order
CARD_ARGUMENTS = (
    "language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags", "dataset", "dataset_args",
)  # fmt: skip


def prepare_repo(repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
    """Creates a model repository unless it is there.

    Args:
        repo_id: Its name, with or without the namespace.
        token: A token with write permission; by default that of the environment or of `hf auth login`.
        private: True: nobody else may see it.

    Returns:
        Its full name, `namespace/name`.

    Raises:
        ValueError: It is there already and public, and `private` is True.
    """
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
    commit_message: str = "Upload a CAPT adapter",
    **card: Any,
) -> CommitInfo:
    """Uploads an adapter's weights, configuration, card and figures, in one commit.

    Whatever fails, the Hub holds the old adapter or the new one, and pushing again is safe: what is there is not sent again.
    The card is made for the repository, unless the folder has a README.md that a person wrote. Results and evaluations go with it
    only if they are of these very weights; those on the Hub that are not are deleted with the commit.

    Args:
        adapter: A folder with a CAPT adapter, a `PeftModel`, or a model of transformers with an adapter; of a model, the active
            adapter.
        repo_id: Name of the repository; it is created if needed.
        token: A token with write permission; by default that of the environment or of `hf auth login`.
        private: True: create a private repository, and refuse a public one.
        revision: Branch; by default the main one. It is created from the main one if needed.
        commit_message: Title of the commit.
        card: What else the card says: fields of `CardDetails` (`license`, `tags`, `dataset_name`, ...).

    Returns:
        The commit.

    Raises:
        TypeError: A word for the card that it has no place for.
        ValueError: There is no whole CAPT adapter in the folder, a record in it is damaged or of other weights, or the repository
            is public and `private` is True.
    """
    return upload(adapter, repo_id, token, private, revision, commit_message, CardDetails.of(card))


def upload(
    adapter: nn.Module | str | Path,
    repo_id: str,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    message: str,
    details: CardDetails,
    strict: bool = True,
) -> CommitInfo:
    """Does the work of `push_adapter`; with `strict=False` records of other weights stay behind instead of stopping it."""
    with _as_folder(adapter) as folder:
        _, records = card_of(folder, strict=strict)  # refuses damaged files and other methods
        for reason in records.unshown:
            logger.warning("Not uploaded from %s: %s", folder, reason)
        _say_if_local(adapter_config(folder))
        try:
            return _commit(folder, records, repo_id, token, private, revision, message, details, strict)
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


def _say_if_local(config: CaptConfig) -> None:
    base = str(config.base_model_name_or_path or "")
    if not is_hub_id(base):
        logger.warning(
            "The base model was loaded from the folder %r, which %s names: others cannot load it from there, and read where it "
            "lies. They give their own with base=. Load the base by its Hub id before you tune an adapter to share.",
            base[:300],
            "adapter_config.json",
        )


def _commit(
    folder: Path,
    records: Records,
    repo_id: str,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    message: str,
    details: CardDetails,
    strict: bool,
) -> CommitInfo:
    api = HfApi()
    repo_id = prepare_repo(repo_id, token=token, private=private)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        contents = {name: folder / name for name in UPLOADED if (folder / name).is_file()}
        contents[CARD] = Path(temporary, CARD)
        contents[CARD].write_text(_card_to_send(folder, repo_id, details, strict), encoding="utf-8")
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for name, record in ((RESULTS, records.results), (EVALUATION, records.evaluation)):
            if record is None:
                contents.pop(name, None)
                if api.file_exists(repo_id, name, revision=revision, token=token):
                    operations.append(CommitOperationDelete(name))
        operations += [CommitOperationAdd(name, path) for name, path in contents.items()]
        # not upload_folder, which may spread the files over several commits
        return api.create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def _card_to_send(folder: Path, repo_id: str, details: CardDetails, strict: bool) -> str:
    """Returns the card for a repository: ours or, where a person wrote one, theirs."""
    if is_replaceable(folder / CARD):
        return card_of(folder, repo_id, details=details, strict=strict)[0]
    if details != CardDetails():
        logger.warning("%s was written by a person and stays as it is: what was given for the card is not in it.", CARD)
    return without_local_paths((folder / CARD).read_text(encoding="utf-8", errors="replace"))


def saved_copy(model: nn.Module, home: Path) -> Path | None:
    """Returns where in a folder the active adapter is saved with the weights that it has now, or None."""
    if not getattr(model, "peft_config", None):
        return None
    fingerprint = adapter_fingerprint(model)
    return next((f for f in (home, home / active_adapter(model)) if _fingerprint_in(f) == fingerprint), None)


def write_model_card(model: nn.Module, home: Path, repo_id: str, details: CardDetails) -> None:
    """Writes the card of the adapter that is saved in a folder into it or, where none is, of the model's active one."""
    if (home / SAFETENSORS_NAME).is_file():
        write_card(home, details=details)
        return
    with _as_folder(model) as folder:
        write_text(home / CARD, card_of(folder, repo_id, details=details)[0])


def _fingerprint_in(folder: Path) -> str | None:
    try:
        return adapter_fingerprint(folder)
    except (OSError, ValueError, TypeError, SafetensorError):
        return None  # nothing there, or damaged: the adapter is saved again


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
        return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_our_card._capt_peft = True  # type: ignore[attr-defined]
    return upload_with_our_card


# `PeftModel` and `PreTrainedModel` have no other place where the card of an adapter could be made
if not hasattr(PushToHubMixin._upload_modified_files, "_capt_peft"):
    PushToHubMixin._upload_modified_files = _with_our_card(PushToHubMixin._upload_modified_files)  # type: ignore[method-assign]
