"""Comparison of texts: Unicode has several forms of many letters, quotation marks, dashes and spaces."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_FORMS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛‹›′‵ʹʻʼ´`ꞌ", "'"),
        **dict.fromkeys("“”„‟«»″‶〝〞〟", '"'),
        **dict.fromkeys("‐‑‒–—―⸺⸻−⁃˗", "-"),
        **dict.fromkeys("⁄∕", "/"),
        **dict.fromkeys("〜∼", "~"),
        "ı": "i",
    }
)
_NO_WIDTH = "Cf"  # soft hyphens, joiners, marks of direction
_VARIANTS = range(0xFE00, 0xFE10)  # characters that choose a variant of the character before them


def folded(text: str) -> str:
    """The common form of all ways to write a text, for comparison and not for display.

    Letters are composed and have no case, width or ligatures (NFKC, ß as ss, both Turkish i's as i). Quotation marks
    and dashes are ASCII, white space is single spaces, and characters without width are left out. Accents stay: é is
    not e.
    """
    if text.isascii():
        return " ".join(text.lower().replace("`", "'").replace("''", '"').split())
    letters = unicodedata.normalize("NFKC", text.translate(_FORMS)).casefold().replace("i\N{COMBINING DOT ABOVE}", "i")
    plain = unicodedata.normalize("NFKC", letters).translate(_FORMS).replace("''", '"')
    visible = (c for c in plain if unicodedata.category(c) != _NO_WIDTH and ord(c) not in _VARIANTS)
    return " ".join("".join(visible).split())


def matching_texts(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """The texts that have the same `folded` form as one of the others."""
    known = {folded(other) for other in others}
    return [text for text in texts if folded(text) in known]
