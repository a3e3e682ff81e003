"""Sharing adapters on the Hub: an adapter's own files, in one commit, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from peft import PeftModel
from transformers import Trainer

from .card import EVALUATION, RESULTS
from .runs import UPLOADED
from .tuner import CaptConfig
from .tuner.fingerprint import SAFETENSORS_NAME

if TYPE_CHECKING:
    from .classifier import ZeroShotClassifier

MEASURED = (RESULTS, EVALUATION)


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
    adapter: PeftModel | str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a CAPT adapter",
) -> CommitInfo:
    """Uploads an adapter's weights, configuration, card and figures, in one commit.

    Whatever fails, the Hub holds the old adapter or the new one, and pushing again is safe: what is there is not sent again.
    Results and evaluations on the Hub that the folder does not have are deleted with the commit: they are of other weights.

    Args:
        adapter: A folder with a CAPT adapter, or a `PeftModel`; of a model, the active adapter.
        repo_id: Name of the repository; it is created if needed.
        token: A token with write permission; by default that of the environment or of `hf auth login`.
        private: True: create a private repository, and refuse a public one.
        revision: Branch; by default the main one. It is created from the main one if needed.
        commit_message: Title of the commit.

    Returns:
        The commit.

    Raises:
        ValueError: There is no whole CAPT adapter in the folder, or the repository is public and `private` is True.
    """
    if isinstance(adapter, PeftModel):
        name = str(adapter.active_adapter)
        with tempfile.TemporaryDirectory() as temporary:
            adapter.save_pretrained(temporary, selected_adapters=[name])
            folder = Path(temporary) if name == "default" else Path(temporary, name)  # PEFT's layout
            return push_adapter(
                folder, repo_id, token=token, private=private, revision=revision, commit_message=commit_message
            )
    folder = Path(adapter)
    _check_folder(folder)
    try:
        return _commit(folder, repo_id, token, private, revision, commit_message)
    except Exception as error:
        error.add_note(
            f"The upload to {repo_id} failed. All of the adapter is there now or nothing of it; pushing it again is safe."
        )
        raise


def _check_folder(folder: Path) -> None:
    if not (folder / SAFETENSORS_NAME).is_file():
        raise ValueError(f"There is no adapter in {folder}: it has no {SAFETENSORS_NAME}. Save one: save_pretrained.")
    CaptConfig.from_pretrained(str(folder))  # refuses damaged files and other methods


def _commit(
    folder: Path, repo_id: str, token: str | bool | None, private: bool | None, revision: str | None, message: str
) -> CommitInfo:
    api = HfApi()
    repo_id = prepare_repo(repo_id, token=token, private=private)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, folder / name) for name in UPLOADED if (folder / name).is_file()
    ]
    for name in MEASURED:
        if not (folder / name).is_file() and api.file_exists(repo_id, name, revision=revision, token=token):
            operations.append(CommitOperationDelete(name))
    # not upload_folder, which may spread the files over several commits
    return api.create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


class HubTrainer(Trainer):
    """A Trainer that uploads its adapter and nothing else; `CaptTrainer` is one."""

    classifier: ZeroShotClassifier
    hub_model_id: Any  # the Trainer starts with None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository of `args.hub_model_id` before any long work; arguments as of `prepare_repo`."""
        if self.is_world_process_zero():
            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id = prepare_repo(self._repo_id(), token=token or self.args.hub_token, private=private)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Uploads the adapter, with the card and results of `args.output_dir` if they are of these very weights.

        Checkpoints stay at home, and so do the Trainer's pickled arguments, which hold the token.

        Args:
            commit_message: Title of the commit.
            token: As of `push_adapter`, as the others; by default `args.hub_token`.
            revision: By default `args.hub_revision`.
            private: By default `args.hub_private_repo`.

        Returns:
            The commit; None in all processes but the first.

        Raises:
            ValueError: The model has no adapter, or as of `push_adapter`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        model, home = self.classifier.model, Path(str(self.args.output_dir))
        if not isinstance(model, PeftModel):
            raise ValueError(f"{type(model).__name__} has no adapter to upload. Use the model's own push_to_hub.")
        commit = push_adapter(
            home if _holds_weights_of(home, model) else model,
            self._repo_id(),
            token=token if token is not None else self.args.hub_token,
            private=private if private is not None else self.args.hub_private_repo,
            revision=revision if revision is not None else self.args.hub_revision,
            commit_message=commit_message,
        )
        self.hub_model_id = commit.repo_url.repo_id
        return commit

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads nothing while it trains, whatever `args.hub_strategy` says."""


def _holds_weights_of(folder: Path, model: PeftModel) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        old, new = folder / SAFETENSORS_NAME, Path(temporary, SAFETENSORS_NAME)
        return old.is_file() and new.is_file() and old.read_bytes() == new.read_bytes()
