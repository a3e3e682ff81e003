"""The options that say which texts a class has, which every command with class names shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..data.texts import read_class_texts, read_template
from ..utils.text import cut


@dataclass
class TextArguments:
    """Texts: what stands for a class."""

    template: str | None = field(
        default=None,
        metadata={
            "help": "Text of a class, e.g. 'a photo of a {}.'; or several: a published set, as clip-imagenet-7, or a file with "
            "one a line. By default the adapter's or the data set's."
        },
    )
    class_texts: str | None = field(
        default=None, metadata={"help": 'JSON file of texts of one\'s own: {"class name": ["text", ...], ...}.'}
    )

    def __post_init__(self) -> None:
        # what the files hold, which then stands in the records
        template = None if self.template is None else read_template(self.template)
        try:
            vars(self).update(template=template, class_texts=read_class_texts(self.class_texts))
        except FileNotFoundError as error:
            raise ValueError(f"There is no file {cut(self.class_texts, 200)} (--class_texts).") from error

    @property
    def texts(self) -> dict[str, Any]:
        """The template and the texts of classes that were asked for, for a task or a classifier; None where none were."""
        return {"template": self.template, "class_texts": self.class_texts}
