"""The film of an audit group: the previews of its members at every step, and when each would have been pruned."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from progrpo.pages.page import escape, note, picture_uri, read_picture
from progrpo.tracking.records import AuditRecord
from progrpo.tracking.statistics import spearman
from progrpo.tracking.wording import number

if TYPE_CHECKING:
    from PIL import Image

_CELL, _SMALLEST_CELL = 96, 64  # pixels
_PIXELS = 1000 * _CELL**2  # of all films together, which take about 5 MB
_ROWS_SHOWN = 10
_EMBEDDED = 6


def spread(count: int, chosen: int) -> list[int]:
    """The indices of `chosen` of `count` items, evenly spaced from the first to the last; all if there are no more."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, chosen))}) if count else []


def films(folder: Path, audits: Sequence[AuditRecord]) -> str:
    """The films with a box to choose one, the latest shown. Of many audits, an even selection is embedded.

    The selection and its pictures are smaller where groups are large.
    """
    cells = max(1, *(len(audit["final"]) * (len(audit["steps"]) + 1) for audit in audits))
    most = max(1, min(_EMBEDDED, _PIXELS // (cells * _SMALLEST_CELL**2)))
    chosen = [audits[i] for i in reversed(spread(len(audits), most))]
    side = min(_CELL, isqrt(_PIXELS // (len(chosen) * cells)))
    options = "".join(
        f'<option value="film-{i}">iteration {i + 1}: {escape(prompt)}</option>'
        for i, prompt in ((audit["iteration"], audit["prompt"]) for audit in chosen)
    )
    count = f"<span>{len(chosen)} of {len(audits)} audits</span>" if len(chosen) < len(audits) else ""
    box = f'<label class="choose">Audit group <select id="choose-film">{options}</select>{count}</label>'
    return box + LEGEND + "".join(_film(folder, audit, side, i == 0) for i, audit in enumerate(chosen))


LEGEND = (
    '<p class="legend"><span><i class="alive"></i>kept</span><span><i class="out"></i>pruned after this step</span>'
    '<span><i class="ghost"></i>already pruned: a training group would not compute it</span></p>'
)


def _film(folder: Path, audit: AuditRecord, side: int, shown: bool) -> str:
    anchor = f"film-{audit['iteration']}"
    strip = read_picture(folder, audit["strip"])
    if strip is None:
        sheet = note(f"The pictures of this audit ({escape(audit['strip'])}) are missing.")
    else:
        sheet = sheet_of(audit, strip, anchor, side)
    hidden = "" if shown else " hidden"
    return f'<div class="film" id="{anchor}"{hidden}>{_agreements(audit)}{sheet}</div>'


def _points(audit: AuditRecord) -> list[int]:
    """The steps after which members are pruned. Members that are dropped on final rewards have none of the steps."""
    return sorted(set(audit["steps"]).intersection(audit["stopped_at"]))


def _agreements(audit: AuditRecord) -> str:
    correlations = [f"{number(_agreement(audit, step), 2)} at step {step}" for step in _points(audit)]
    text = f" Rank correlation of previews and final rewards: {', '.join(correlations)}." if correlations else ""
    return f'<p class="prompt"><b>{escape(audit["prompt"])}</b>{text}</p>'


def _agreement(audit: AuditRecord, step: int) -> float | None:
    """The rank correlation of the previews that the run decides by."""
    return spearman(audit.get("used", audit["scores"])[list(audit["steps"]).index(step)], audit["final"])


def sheet_of(audit: AuditRecord, strip: Image.Image, anchor: str, side: int = _CELL) -> str:
    """The table of an audit's pictures within the element `anchor`, a row per member.

    `strip` is their contact sheet: a row per member, a column per step and one for the final pictures. It is
    reduced to at most `side` pixels a cell.
    """
    group, columns = len(audit["final"]), len(audit["steps"]) + 1
    width, height = strip.width // columns, strip.height // group
    scale = min(1.0, side / width)
    size = (round(width * scale) * columns, round(height * scale) * group)
    uri = picture_uri(strip, size)
    style = (
        f"#{anchor} {{ --columns: {columns}; --members: {group}; --shape: {height / width:.4g} }} "
        f"#{anchor} i {{ background-image: url({uri}) }}"
    )
    more = "" if group <= _ROWS_SHOWN else f'<button class="more">Show all {group} members</button>'
    return f'<style>{style}</style><div class="scroll"><table>{_head(audit)}{_rows(audit)}</table></div>{more}'


def _head(audit: AuditRecord) -> str:
    points = _points(audit)
    cells = "".join(f'<th class="{"cut" if s in points else ""}">step {s}</th>' for s in audit["steps"])
    return f'<thead><tr><th></th>{cells}<th class="last">final</th></tr></thead>'


def _rows(audit: AuditRecord) -> str:
    """The members by final reward, missing ones last. Of a large group most rows are hidden at first."""
    final = audit["final"]
    order = sorted(range(len(final)), key=lambda g: (final[g] is None, -(final[g] or 0.0)))
    shown = set(spread(len(order), _ROWS_SHOWN))
    return "<tbody>" + "".join(_row(audit, g, rank, rank in shown) for rank, g in enumerate(order)) + "</tbody>"


def _row(audit: AuditRecord, member: int, rank: int, shown: bool) -> str:
    stopped = audit["stopped_at"][member]
    cells = [
        _cell(i, member, audit["scores"][i][member], _state(step, stopped)) for i, step in enumerate(audit["steps"])
    ]
    cells.append(_cell(len(cells), member, audit["final"][member], f"{_state(len(cells), stopped)} last"))
    more = "" if shown else ' class="beyond"'
    head = f'<th title="member {member}, rank {rank + 1} by final reward"><b>{rank + 1}</b>{_fate(audit, stopped)}</th>'
    return f"<tr{more}>{head}{''.join(cells)}</tr>"


def _fate(audit: AuditRecord, stopped: int | None) -> str:
    if stopped is None:
        return '<span class="kept">kept</span>'
    return f"<span>pruned at {stopped if stopped in audit['steps'] else 'the end'}</span>"


def _state(step: int, stopped: int | None) -> str:
    if stopped is None or step < stopped:
        return "alive"
    return "out" if step == stopped else "ghost"


def _cell(column: int, row: int, score: float | None, state: str) -> str:
    return f'<td class="{state}"><i style="--c:{column};--r:{row}"></i>{number(score, 2)}</td>'
