"""The HTML of pages in small functions. Every string that a user or a model wrote goes through `escape`."""

from __future__ import annotations

import base64
import html
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from progrpo.pages.charts import Figure
from progrpo.pages.run_data import inside
from progrpo.tracking.files import encode

if TYPE_CHECKING:
    from PIL import Image

_JPEG = {True: {"quality": 85, "subsampling": 0}, False: {"quality": 75, "subsampling": 2}}
"""JPEG settings of pictures that keep their size (True), and of those that are reduced (False)."""
_SCRIPT_ESCAPES = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "<>&'\u2028\u2029"})
"""JSON's escapes of characters that would end a script, or begin a comment in it."""


_MARKS: dict[bool | None, tuple[str, str]] = {True: ("pass", "✓"), False: ("fail", "✕")}


def escape(value: object) -> str:
    """A text as HTML, in pages and in Plotly's labels, which know no `&quot;`."""
    return html.escape(str(value), quote=True).replace("&quot;", "&#34;")


def document(title: str, body: str, charts: bool = True) -> str:
    """A whole page with its styles and scripts inside, and with Plotly for `charts`. It loads nothing."""
    room = files("progrpo.pages")
    style, script = ((room / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>\n{style}</style>'
        f"{_plotly() if charts else ''}</head>\n<body><main>\n{body}\n</main>"
        f"<script>\n{script}</script></body></html>\n"
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """A section of the page. `title`, `lead` and `body` are HTML; `lead` says how to read the section."""
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{title}</h2>{lead}\n{body}\n</section>\n'


def note(text: str) -> str:
    """A sentence in place of data that is missing."""
    return f'<p class="note">{text}</p>'


def anchor_of(title: str) -> str:
    """An id that is safe in HTML, CSS and scripts."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower())


def chart(figure: Figure, anchor: str, title: str = "", about: str = "") -> str:
    """A Plotly figure with its caption above. It stands in the page as JSON, and page.js draws it."""
    about = f"<span>{about}</span>" if about else ""
    caption = f"<figcaption><b>{title}</b>{about}</figcaption>" if title else ""
    data = encode(figure).strip().translate(_SCRIPT_ESCAPES)
    place = f'<div class="chart" id="{anchor}" style="height:{figure["layout"]["height"]}px"></div>'
    return f'<figure class="card">{caption}{place}<script type="application/json">{data}</script></figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells. All columns but the first hold numbers."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    numbers = f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{numbers}</div>'


def pairs(items: Mapping[str, object]) -> str:
    """A list of names and values in columns."""
    return (
        '<dl class="pairs">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items.items())
        + "</dl>"
    )


def read_picture(folder: Path, name: str) -> Image.Image | None:
    """A picture of a run folder. None for a file that is missing, outside the folder, not a PNG or too large."""
    from PIL import Image

    path = folder / name
    if not inside(folder, path):
        return None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("PNG",)) as file:
            return file.convert("RGB")  # opening some other formats runs programs, and a run writes only PNG
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def shot(picture: Image.Image, title: str, alt: str, strict: bool | None) -> str:
    """A picture with the mark of its strict verdict, if it has one. `title` and `alt` are HTML."""
    word, mark = _MARKS.get(strict, ("", ""))
    verdict = f'<span class="mark {word}">{mark}</span>' if mark else ""
    return f'<div class="shot" title="{title}"><img src="{picture_uri(picture)}" alt="{alt}">{verdict}</div>'


def picture_uri(picture: Image.Image, size: tuple[int, int] | None = None, longest: int = 192) -> str:
    """A picture as a data URI, resized to `size` or, if it is larger, to `longest` pixels.

    The small ones of the built-in models are not resized, and their colours keep their resolution too.
    """
    from PIL import Image

    whole = picture.size
    if size is not None and size != whole:
        picture = picture.resize(size, Image.Resampling.BOX)
    elif size is None:
        picture.thumbnail((longest, longest))
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", **_JPEG[picture.size == whole])
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
