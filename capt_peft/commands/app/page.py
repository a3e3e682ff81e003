"""The Gradio page: what it looks like, and what its components do."""

from __future__ import annotations

import html
import itertools
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: nothing is sent anywhere

import gradio as gr
from gradio.context import LocalContext
from PIL import Image
from starlette.middleware import Middleware

from .attack import (
    CAPT,
    CLIP,
    MAX_BYTES,
    MAX_EPSILON,
    MAX_SIDE,
    MAX_STEPS,
    Cancelled,
    Outcome,
    Page,
    Refused,
    example_files,
    read_class_names,
)
from .defences import NO_DEFENCE, OFFERS
from .visitors import Visitors

logger = logging.getLogger(__name__)

CSS = """
.pixels img { image-rendering: pixelated; }
#upload img { width: 100%; height: 100%; object-fit: contain; }
#examples .container, #examples .container img { width: 64px; height: 64px; }
#upload .wrap { background: color-mix(in srgb, var(--block-background-fill) 60%, transparent); pointer-events: none; }
#upload .wrap:has(.error) { display: none; } /* a message says it */
input[type="range"]:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 4px; }
.verdict { font-size: 1.15em; padding: 2px 0; scroll-margin-top: 8px; }
.verdict b { color: var(--body-text-color); }
.verdict .held b { color: #1a7f37; } .verdict .fooled b { color: #cf222e; }
.dark .verdict .held b { color: #4ac26b; } .dark .verdict .fooled b { color: #ff8182; }
.model { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); }
.model h2 { font-size: var(--text-xl) !important; }
.model .pixels .image-container { padding-top: 26px; } /* below the label */
@media (max-width: 1100px) {
  .model { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  .model > * { grid-column: span 2; } .model > :nth-child(n + 4) { grid-column: span 3; }
}
@media (max-width: 640px) {
  .model > *, .model > :nth-child(n + 4) { grid-column: span 3; }
  .model > :nth-child(3) { grid-column: 1 / -1; order: 1; }
  .model .pixels { height: 190px !important; }
}
"""
# where the results lie below what is seen, as on a phone, they are brought up
SHOW_RESULTS = """() => {
  const verdict = document.querySelector(".verdict:has(.held, .fooled, .wrong)");
  const top = verdict ? verdict.getBoundingClientRect().top : 0;
  if (top < 0 || top > innerHeight / 2) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    verdict.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
  }
}"""
INTRO = """# {clip} under attack, and {clip} + {method}
Choose an example or upload an image, and press *Attack*: it searches for a change, too small to matter to you, that turns
the model's answer. {method} is a small adapter that was tuned to withstand such changes{paper}."""
PAPER = " ([paper](https://arxiv.org/abs/2405.11154))"
NO_ADAPTER = """**There is no adapter here, so only {clip} is shown.** `capt-peft demo` tunes one in about five minutes; then
start this page again, or name any CAPT adapter with `--adapter` (folder or Hub id)."""


def serve(page: Page, host: str | None = None, port: int | None = None) -> None:
    """Serves the page until it is stopped.

    Args:
        page: The models.
        host: Address to listen at; by default only this machine's.
        port: By default the first free one from 7860.
    """
    Image.MAX_IMAGE_PIXELS = MAX_SIDE**2  # anything in this process that opens an image refuses twice as many
    visitors = Visitors()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(  # readable: 4.5 to 1 and more
        block_info_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    with tempfile.TemporaryDirectory() as folder:
        demo = build(page, example_files(folder, page), visitors)
        demo.queue(default_concurrency_limit=None, max_size=100)  # whose turn it is, `visitors` knows
        demo.launch(
            server_name=host,
            server_port=port,
            max_file_size=MAX_BYTES,
            css=CSS,
            theme=theme,
            show_error=True,
            share=False,
            footer_links=["api"],
            app_kwargs={"middleware": [Middleware(visitors.watch)]},
        )


def verdict(name: str, outcome: Outcome, event: str) -> str:
    """Returns what happened to a model of this name, as HTML; the event makes the same outcome again a change of it."""
    fooled = outcome.sentence.startswith("is fooled")
    kind = "held" if outcome.held else "fooled" if fooled else "wrong"
    sentence = html.escape(f"{name} {outcome.sentence}")
    return f'<div class="{kind}" role="status" data-event="{event}"><b>{sentence}</b></div>'


def show_progress(number: int, unit: str) -> None:
    """Shows how far the request of this context is."""
    gr.Progress()((number, None), unit=unit)


def refuse(message: str) -> gr.Error:
    """Returns an error that shows a sentence, and no more."""
    return gr.Error(html.escape(message, quote=False), duration=15, print_exception=False)


def build(page: Page, examples: list[list[str]], visitors: Visitors) -> gr.Blocks:
    """Returns the page."""

    async def attack(
        image: Any,
        names: Any,
        template: Any,
        epsilon: Any,
        steps: Any,
        true_class: Any,
        defence: Any,
        request: gr.Request,
    ) -> list[Any]:
        """Attacks each model; epsilon is in levels of 255, true_class may be empty."""
        event = str(LocalContext.event_id.get())

        def work(over: Callable[[], bool]) -> tuple[list[Outcome], str]:
            steps_done = itertools.count()

            def cancelled() -> bool:
                show_progress(next(steps_done), "steps")
                return over()

            path = uploaded(image, upload.GRADIO_CACHE)
            return page.run(path, names, template, epsilon, steps, true_class, defence, cancelled)

        def wait(first: int) -> None:
            show_progress(first, "ahead")

        try:
            outcomes, description = await visitors.serve(request, event, work, wait)
        except Cancelled:
            return [gr.skip()] * (1 + len(outputs))
        except Refused as error:
            raise refuse(str(error)) from None
        except Exception:
            logger.exception("A request failed")
            raise refuse("Something went wrong here, and was logged. Try another image or other settings.") from None
        shown: list[Any] = [html.escape(description, quote=False)]
        for outcome in outcomes:
            guarded = "" if defence == NO_DEFENCE else f" with {OFFERS[defence].label}"
            sentence = verdict(page.called(outcome.name) + guarded, outcome, event)
            shown += [sentence, *outcome.images, outcome.clean, outcome.attacked]
        return shown

    async def leave(request: gr.Request) -> None:
        visitors.stop(request.session_hash)

    async def change_image(image: Any, request: gr.Request) -> gr.Button:
        visitors.stop(request.session_hash)
        return gr.Button(interactive=image is not None)

    with gr.Blocks(
        title=f"{page.called(CLIP)} under attack", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as demo:
        words = INTRO if CAPT in page.models else f"{INTRO}\n\n{NO_ADAPTER}"
        paper = PAPER if page.method == "CAPT" else ""
        gr.Markdown(words.format(clip=page.called(CLIP), method=page.method, paper=paper))
        samples = gr.Row()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                upload = upload_component()
                button = gr.Button("Attack", variant="primary", elem_id="attack", interactive=False)
                inputs = [upload, *settings_components(page)]
            with gr.Column(scale=3):
                outputs = [
                    component for name in page.models for component in output_components(name, page.called(name))
                ]
                description = gr.HTML(elem_id="description")
        with samples:
            _, names, template, _, _, true_class, _ = inputs
            what = "handwritten digits" if page.examples is None else page.examples.name
            gr.Examples(
                examples,
                [upload, names, template, true_class],
                label=f"Examples: {what}",
                visible_columns=[0],
                elem_id="examples",
            )
        private: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # preprocess=False: what is given is checked here, and nobody opens an image before its size is known
        button.click(leave, **private).then(
            attack,
            inputs,
            [description, *outputs],
            preprocess=False,
            api_name="attack",
            trigger_mode="multiple",
            show_progress_on=[upload],  # once and beside the button, not on each of a dozen components
        )
        upload.change(change_image, upload, button, preprocess=False, **private)
        outputs[0].change(None, js=SHOW_RESULTS)
    demo.preprocess_data = in_a_sentence(demo.preprocess_data)
    return demo


def upload_component() -> gr.Image:
    """Returns where an image is given."""
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
    return upload


def settings_components(page: Page) -> list[Any]:
    """Returns the class names, template, epsilon, steps, true class and defence, in the order of `Page.run`."""
    names = gr.Textbox(
        page.class_text,
        label="Class names",
        info="Separated by commas, or one a line",
        lines=2,
        max_lines=6,
        elem_id="names",
    )
    true_class = gr.Dropdown(
        page.class_names,
        value=None,
        allow_custom_value=True,
        label="True class",
        info="If empty, each model's own clean answer counts as true",
        elem_id="true_class",
    )
    epsilon = gr.Slider(
        0,
        MAX_EPSILON,
        page.epsilon,
        step=0.5,
        label="Epsilon × 255",
        info="Largest change of a pixel",
        elem_id="epsilon",
    )
    steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Attack steps", elem_id="steps")
    defence = gr.Dropdown(
        [(offer.label, name) for name, offer in OFFERS.items()],
        value=NO_DEFENCE,
        label="Defence",
        info=OFFERS[NO_DEFENCE].keeps,
        elem_id="defence",
    )
    with gr.Accordion("Template", open=False):
        template = gr.Textbox(
            page.template,
            label="Text of a class",
            info="{} stands for the class name; of several, one a line, the mean is taken",
            lines=min(5, len(page.template.splitlines())),
        )
    names.change(
        update_choices, [names, true_class], true_class, preprocess=False, queue=False, show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    defence.change(
        say_what_it_keeps,
        defence,
        defence,
        preprocess=False,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return [names, template, epsilon, steps, true_class, defence]


def output_components(name: str, title: str) -> list[Any]:
    """Returns where the verdict, the three images and the two scores of a model are shown."""
    key = "capt" if name == CAPT else "clip"
    sentence = gr.HTML(f"<b>{html.escape(title)}</b>", elem_id=f"{key}_verdict", elem_classes="verdict")
    with gr.Row(elem_classes="model", equal_height=True):
        images = [
            gr.Image(label=label, height=210, format="png", elem_id=f"{key}_{part}", elem_classes="pixels", min_width=120,
                     interactive=False, buttons=[])
            for part, label in (("image", "Image"), ("attacked", "Attacked"), ("noise", "Noise, magnified"))
        ]  # fmt: skip
        scores = [
            gr.Label(label=label, num_top_classes=3, elem_id=f"{key}_{part}", min_width=120)
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


def say_what_it_keeps(name: Any) -> Any:
    """Says of the chosen defence what it keeps under an attacker who knows it."""
    known = isinstance(name, str) and name in OFFERS
    return gr.Dropdown(info=OFFERS[name].keeps) if known else gr.skip()


def update_choices(names: Any, true_class: Any) -> Any:
    """Offers the class names as true classes; keeps the chosen one if it is still there."""
    try:
        choices = read_class_names(names)
    except Refused:
        choices = []
    return gr.Dropdown(choices=choices, value=true_class if true_class in choices else None)
