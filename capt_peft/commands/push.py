"""Uploads an adapter with its card and results to the Hub, in one commit.

capt-peft push outputs/demo you/tiny-capt
capt-peft push outputs/demo you/tiny-capt --private

`capt-peft card` sets the licence and other words of the card.
The token is that of the environment (HF_TOKEN) or of `hf auth login`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..results.evaluation import EVALUATION, Evaluation
from ..results.hub import IMAGES, push_adapter
from .card import adapter_folder
from .parser import Parser


@dataclass
class Arguments:
    """What is uploaded, and where to."""

    adapter: str = field(default="", metadata={"help": "Folder of an adapter."})
    repo_id: str = field(default="", metadata={"help": "Name on the Hub: you/name; it is made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Make a private repository; a public one is refused."})
    revision: str | None = field(default=None, metadata={"help": "Branch; by default the main one."})


def main(argv: list[str]) -> None:
    """Uploads."""
    (args,) = Parser(Arguments).into_dataclasses(argv)
    folder = adapter_folder(args.adapter)
    if not args.repo_id:
        raise ValueError(f"Give the name that {args.adapter} gets on the Hub: capt-peft push {args.adapter} you/name.")
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise ValueError(f"{args.repo_id!r} cannot be a name on the Hub: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError("Nothing can be uploaded while HF_HUB_OFFLINE is set.")
    commit = push_adapter(folder, args.repo_id, private=args.private or None, revision=args.revision)
    with_images = ""
    if (folder / IMAGES).is_file() and (folder / EVALUATION).is_file():
        images = Evaluation.load(folder, with_examples=False).images
        with_images = "" if images is None else f", with {images.size} of worst-case images"
    print(f"Uploaded to {commit.commit_url}{with_images}")
