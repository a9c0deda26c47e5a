"""The report as one self-contained HTML page: no network, light and dark, drawn by `page.js` as SVG."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from .markdown import LATENCIES
from .page_frames import PageInputs

_HERE = Path(__file__).parent


def write_page(document: dict[str, Any], inputs: PageInputs, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(document, inputs), encoding="utf-8")


def page(document: dict[str, Any], inputs: PageInputs) -> str:
    """The page. Everything of the report is in it but the chunks kept for comparisons."""
    shown = {name: value for name, value in document.items() if name != "actions"}
    data = json.dumps({"report": shown, "labels": LATENCIES, **inputs.data()}, separators=(",", ":"))
    # "<" may not stand in a script element as it is: "</script>" in an instruction would end it.
    data = data.replace("<", "\\u003c")
    title = html.escape(
        f"Replay of {document['bag']['name']}: {document['policy']['family']}, {document['mode']}"
    )
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # No request leaves the page, whatever is in the data.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        '<link rel="icon" href="data:,">\n'
        f'<style>\n{style}</style></head>\n<body><main id="page"></main>\n'
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )
