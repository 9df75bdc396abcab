"""When two texts say the same: Unicode has several forms for many a letter, quotation mark, dash and space."""

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
_VARIANTS = range(0xFE00, 0xFE10)  # of a picture or a letter, chosen by a character after it


def folded(text: str) -> str:
    """The form that all ways to write a text have in common, to be compared and not shown.

    Letters are composed and without case, width or ligature (NFKC, ß as ss, Turkish i's alike), quotation marks and dashes are
    ASCII's, white space is single spaces, and what has no width is left out. Accents stay: é is not e.
    """
    if text.isascii():
        return " ".join(text.lower().replace("`", "'").replace("''", '"').split())
    letters = unicodedata.normalize("NFKC", text.translate(_FORMS)).casefold().replace("i\N{COMBINING DOT ABOVE}", "i")
    plain = unicodedata.normalize("NFKC", letters).translate(_FORMS).replace("''", '"')
    seen = (c for c in plain if unicodedata.category(c) != _NO_WIDTH and ord(c) not in _VARIANTS)
    return " ".join("".join(seen).split())


def shared(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of the texts that say the same as one of the others."""
    known = {folded(other) for other in others}
    return [text for text in texts if folded(text) in known]
