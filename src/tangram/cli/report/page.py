"""The page itself: one HTML file from a template, a style sheet, scripts and the data."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

_SCRIPTS = ("base.js", "charts.js", "lines.js", "sections.js")


def render(data: Mapping[str, Any]) -> str:
    """The whole page.

    Nothing in `data` is taken for HTML or script, whatever it holds. The page's own policy allows
    its one script and its one style sheet and forbids every request.

    Args:
        data: what `report_data` gives.
    """
    style = _asset("style.css")
    script = "\n".join(map(_asset, _SCRIPTS))
    facts = data["profile"]["facts"]
    return Template(_asset("page.html")).substitute(
        policy=escape(_policy(script, style)),
        style=style,
        script=script,
        data=_embedded(data),
        title=escape(facts[0][1]),
        facts="\n".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in facts[1:]
        ),
        cautions=_cautions(data["warnings"], data["remarks"]),
        chunk=escape(f"{data['chunk']:,}"),
        version=escape(data["version"]),
    )


def _cautions(warnings: list[str], remarks: list[str]) -> str:
    """What to know before serving, under a heading of its own, and how to read the figures."""
    if not warnings and not remarks:
        return '<p class="fine">Nothing about this profile calls for caution.</p>'
    remarked = "".join(f'\n<p class="fine">{escape(sentence)}</p>' for sentence in remarks)
    if not warnings:
        return f'<p class="fine">No cautions.</p>{remarked}'
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in warnings)
    return f'<h2>Before you serve with it</h2>\n<ul class="warnings">\n{items}\n</ul>{remarked}'


def _policy(script: str, style: str) -> str:
    """Content-Security-Policy: this script, this style, no requests."""
    return (
        f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; "
        f"style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: no `<`, so that nothing can end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")
