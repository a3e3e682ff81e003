"""A page to try an adapter on: an image, an adversarial example, the noise, what CLIP and CLIP + CAPT say. Needs the extra `app`.

capt-peft app                        # the demo's adapter (capt-peft demo), or tiny CLIP alone
capt-peft app you/your-adapter       # any CAPT adapter, on its own base model
"""

from __future__ import annotations

import logging
import os
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from ..ending import loading
from ..parser import Parser
from ..places import check_places
from .attack import Page

DEMO = Path("outputs/demo")


def main(argv: list[str]) -> None:
    """Loads the models and serves the page until it is stopped."""
    from .page import serve  # Gradio, which nothing else here needs

    parser = Parser([], description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=os.environ.get("CAPT_ADAPTER"), help="CAPT adapter: folder or Hub id")
    parser.add_argument("--base", default=os.environ.get("CAPT_BASE"), help="CLIP, if not the adapter's own")
    parser.add_argument("--host", default=None, help="address to listen at; by default only this machine's")
    parser.add_argument("--port", type=int, default=None, help="by default the first free one from 7860")
    args = parser.parse_args(argv)
    check_places({"adapter": args.adapter, "base": args.base})
    if args.port is not None and not 0 <= args.port < 2**16:
        raise ValueError(f"port={args.port} must be between 0 and 65535.")
    logging.basicConfig(level=logging.WARNING)
    adapter = args.adapter or (str(DEMO) if (DEMO / "adapter_config.json").exists() else None)
    with loading(adapter or args.base or "tiny CLIP"):
        page = Page(adapter, args.base)
    serve(page, args.host, args.port)
