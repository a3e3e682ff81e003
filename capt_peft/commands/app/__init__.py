"""A page to try an adapter on: an image, an adversarial example, the noise, what CLIP and CLIP + CAPT say. Needs the extra `app`.

capt-peft app                                  # the demo's adapter (make demo), or tiny CLIP alone
capt-peft app you/your-adapter       # any CAPT adapter, on its own base model
"""

from __future__ import annotations

import html
import logging
import os
import tempfile
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing is sent anywhere

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from ..ending import loading
from ..parser import Parser
from ..places import check_places
from .attack_page import (
    CAPT,
    CLIP,
    MAX_BYTES,
    MAX_SIDE,
    MAX_STEPS,
    Cancelled,
    Outcome,
    Page,
    Refused,
    example_files,
    read_class_names,
)
from .visitors import Visitors

DEMO = Path("outputs/demo")
logger = logging.getLogger(__name__)

CSS = """
.pixels img { image-rendering: pixelated; }
#upload img { width: 100%; height: 100%; object-fit: contain; }
#examples .container, #examples .container img { width: 64px; height: 64px; }
.verdict { font-size: 1.15em; padding: 2px 0; }
.verdict b { color: #57606a; } .verdict .held b { color: #1a7f37; } .verdict .fooled b { color: #cf222e; }
"""
INTRO = """# {clip} under attack, and {clip} + CAPT
Choose an example or upload an image, and press *Attack*: it searches for a change, too small to matter to you, that turns
the model's answer. CAPT is a small adapter that was tuned to withstand such changes ([paper](https://arxiv.org/abs/2405.11154))."""
NO_ADAPTER = """**There is no adapter here, so only {clip} is shown.** `make demo` tunes one in about five minutes; then start
this page again, or name any CAPT adapter with `--adapter` (folder or Hub id)."""


def verdict(name: str, outcome: Outcome) -> str:
    """Returns what happened to a model of this name, as HTML; class names are whatever users wrote."""
    fooled = outcome.sentence.startswith("is fooled")
    kind = "held" if outcome.held else "fooled" if fooled else "wrong"
    return f'<div class="{kind}"><b>{html.escape(name)} {html.escape(outcome.sentence)}</b></div>'


def refuse(message: str) -> gr.Error:
    """Returns an error that shows a sentence, and no more."""
    return gr.Error(html.escape(message, quote=False), title="Not done", duration=15, print_exception=False)


def build(page: Page, examples: list[list[str]], visitors: Visitors) -> gr.Blocks:
    """Returns the page."""

    def attack(
        image: Any, names: Any, template: Any, epsilon: Any, steps: Any, true_class: Any, request: gr.Request
    ) -> list[Any]:
        """Attacks each model; epsilon is in levels of 255, true_class may be empty."""
        try:
            with visitors.request(request) as cancelled:
                outcomes, description = page.run(
                    uploaded(image, inputs[0].GRADIO_CACHE), names, template, epsilon, steps, true_class, cancelled
                )
        except Cancelled:
            return [gr.skip()] * (1 + len(outputs))
        except Refused as error:
            raise refuse(str(error)) from None
        except Exception:
            logger.exception("A request failed")
            raise refuse("Something went wrong here, and was logged. Try another image or other settings.") from None
        shown: list[Any] = [html.escape(description, quote=False)]
        for outcome in outcomes:
            shown += [verdict(page.called(outcome.name), outcome), *outcome.images, outcome.clean, outcome.attacked]
        return shown

    with gr.Blocks(
        title=f"{page.called(CLIP)} under attack", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as demo:
        words = INTRO if CAPT in page.models else f"{INTRO}\n\n{NO_ADAPTER}"
        gr.Markdown(words.format(clip=page.called(CLIP)))
        samples = gr.Row()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs = input_components(page)
                button = gr.Button("Attack", variant="primary", elem_id="attack", interactive=False)
            with gr.Column(scale=3):
                outputs = [
                    component for name in page.models for component in output_components(name, page.called(name))
                ]
                description = gr.HTML(elem_id="description")
        with samples:
            upload, names, template, _, _, true_class = inputs
            gr.Examples(
                examples,
                [upload, names, template, true_class],
                label="Examples: handwritten digits",
                visible_columns=[0],
                elem_id="examples",
            )
        # preprocess=False: what is given is checked here, and nobody opens an image before its size is known
        button.click(
            attack,
            inputs,
            [description, *outputs],
            preprocess=False,
            api_name="attack",
            trigger_mode="multiple",
            show_progress_on=[description],  # an error is shown there, not on each of a dozen components
        )
        inputs[0].change(
            lambda image: gr.Button(interactive=image is not None), inputs[0], button, preprocess=False, queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    demo.preprocess_data = in_a_sentence(demo.preprocess_data)
    return demo


def input_components(page: Page) -> list[Any]:
    """Returns the image, class names, template, epsilon, steps and true class, in the order of `Page.run`."""
    upload = gr.Image(
        label="Image",
        type="filepath",
        sources=["upload", "clipboard"],
        height=230,
        elem_id="upload",
        elem_classes="pixels",
    )
    cached: Any = upload
    cached.async_move_resource_to_block_cache = only_uploads(upload.async_move_resource_to_block_cache)
    names = gr.Textbox(
        page.class_text, label="Class names", info="Separated by commas, or one a line", lines=2, elem_id="names"
    )
    true_class = gr.Dropdown(
        page.class_names,
        value=None,
        allow_custom_value=True,
        label="True class",
        info="If empty, each model's own clean answer counts as true",
        elem_id="true_class",
    )
    epsilon = gr.Slider(0, 32, 10, step=0.5, label="Epsilon, in levels of 255 (L-inf)", elem_id="epsilon")
    steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Attack steps", elem_id="steps")
    with gr.Accordion("Template", open=False):
        template = gr.Textbox(page.template, label="Text of a class", info="{} stands for the class name")
    names.change(
        update_choices, [names, true_class], true_class, preprocess=False, queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    return [upload, names, template, epsilon, steps, true_class]


def output_components(name: str, title: str) -> list[gr.components.Component]:
    """Returns where the verdict, the three images and the two scores of a model are shown."""
    key = "capt" if name == CAPT else "clip"
    sentence = gr.HTML(f"<b>{html.escape(title)}</b>", elem_id=f"{key}_verdict", elem_classes="verdict")
    with gr.Row():
        images = [
            gr.Image(label=label, height=210, format="png", elem_id=f"{key}_{part}", elem_classes="pixels", min_width=120,
                     interactive=False, buttons=[])
            for part, label in (("image", "Image"), ("attacked", "Attacked"), ("noise", "Noise, magnified"))
        ]  # fmt: skip
        scores = [
            gr.Label(label=label, num_top_classes=4, elem_id=f"{key}_{part}", min_width=120)
            for part, label in (("before", "Scores, clean"), ("after", "Scores, attacked"))
        ]
    return [sentence, *images, *scores]


def uploaded(image: Any, folder: str) -> str | None:
    """Returns the path of an image that a browser or a client uploaded; no other file of this machine is opened."""
    path = image.get("path") if isinstance(image, dict) else None
    if not isinstance(path, str) or "\0" in path:
        return None
    inside = Path(path).resolve().is_relative_to(Path(folder).resolve())
    return path if inside else None


def in_a_sentence(read: Any) -> Any:
    """Wraps what reads the values of a request: where Gradio would describe its insides, a sentence is enough."""

    async def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return await read(*args, **kwargs)
        except gr.Error:
            raise
        except Exception:
            raise refuse("This cannot be read: give an uploaded image and all values that the page asks for.") from None

    return checked


def only_uploads(move: Any) -> Any:
    """Wraps what brings a file into Gradio's cache, so that no address is downloaded."""

    async def checked(path: Any) -> Any:
        if "://" in str(path):
            raise refuse("Nothing is downloaded here: upload the image itself.")
        return await move(path)

    return checked


def update_choices(names: Any, true_class: Any) -> Any:
    """Offers the class names as true classes; keeps the chosen one if it is still there."""
    try:
        choices = read_class_names(names)
    except Refused:
        choices = []
    return gr.Dropdown(choices=choices, value=true_class if true_class in choices else None)


def main(argv: list[str]) -> None:
    """Loads the models and serves the page until it is stopped."""
    parser = Parser([], description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=os.environ.get("CAPT_ADAPTER"), help="CAPT adapter: folder or Hub id")
    parser.add_argument("--base", default=os.environ.get("CAPT_BASE"), help="CLIP, if not the adapter's own")
    parser.add_argument("--host", default=None, help="address to listen at; by default only this machine's")
    parser.add_argument("--port", type=int, default=None, help="by default the first free one from 7860")
    args = parser.parse_args(argv)
    check_places({"adapter": args.adapter, "base": args.base})
    logging.basicConfig(level=logging.WARNING)
    Image.MAX_IMAGE_PIXELS = MAX_SIDE**2  # anything in this process that opens an image refuses twice as many
    adapter = args.adapter or (str(DEMO) if (DEMO / "adapter_config.json").exists() else None)
    with loading(adapter or args.base or "tiny CLIP"):
        page = Page(adapter, args.base)
    visitors = Visitors()
    with tempfile.TemporaryDirectory() as folder:
        demo = build(page, example_files(folder), visitors)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        demo.queue(default_concurrency_limit=2, max_size=100)
        demo.launch(
            server_name=args.host,
            server_port=args.port,
            max_file_size=MAX_BYTES,
            css=CSS,
            theme=theme,
            show_error=True,
            share=False,
            footer_links=["api"],
            app_kwargs={"middleware": [Middleware(visitors.watch)]},
        )
