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

if TYPE_CHECKING:
    from PIL import Image

_CHART_CONFIG = {"displayModeBar": False, "responsive": True}


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def document(title: str, body: str, charts: bool = True) -> str:
    """A whole page with its styles and scripts inside, and with Plotly for `charts`. It loads nothing."""
    room = files("progrpo.pages")
    style, script = ((room / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
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
    """A Plotly figure with its caption above. Plotly's writer escapes what would end the script."""
    import plotly.io

    div = plotly.io.to_html(
        figure, config=_CHART_CONFIG, include_plotlyjs=False, full_html=False, div_id=anchor, default_width="100%"
    )
    about = f"<span>{about}</span>" if about else ""
    caption = f"<figcaption><b>{title}</b>{about}</figcaption>" if title else ""
    return f'<figure class="card">{caption}{div}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells. All columns but the first hold numbers."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


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


def picture_uri(picture: Image.Image, size: tuple[int, int] | None = None, longest: int = 192) -> str:
    """A picture as a data URI, resized to `size` or, if it is larger, to `longest` pixels."""
    from PIL import Image

    if size is not None and size != picture.size:
        picture = picture.resize(size, Image.Resampling.BOX)
    elif size is None:
        picture.thumbnail((longest, longest))
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
