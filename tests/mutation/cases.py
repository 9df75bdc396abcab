"""A case of bad input, what came of it, and how data and files are damaged."""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progrpo.config import Config
from progrpo.settings import field_paths

LONGEST = 1500  # characters of a sentence
DEEP = "[" * 100_000
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1.0, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "nan",
        "1",
        "none",
        "a" * 100_000,
        "a\nb",
        "\0",
        "\ud800",
        "\u2028",
        "😀",
        "../../x",
        "/dev/null",
        "a:b",
        "*",
    ),
    *([], [[]], {}, {"a": 1}, [1, 2, 3], [[3, 4], [3, 4]], [[5, 4], [3, 2]], [[99, 2]], [[1, 99]], ["shapes"], [None]),
)
WORDS: tuple[str, ...] = (
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "x" * 100_000,
    "a\nb",
    "😀",
    "\udcff",
    "--",
    "-",
    "=",
    "--help=1",
    "--nope",
    "--seed",
    "--seed=x",
    "--plan.prune",
    "none",
    "None",
    "true",
    "{",
    "{}",
    "[]",
    '{"name": 3}',
    "2*",
    "x*ocr",
    "shapes",
    "nan*shapes",
    "no.such:thing",
    ".:x",
    "a..b:c",
    "os:path",
    "~nobody/x",
    "/",
    "/dev/null",
    ".",
    "null",
)


@dataclass(frozen=True)
class Case:
    kind: str
    tried: str
    run: Callable[[], object]
    names: tuple[str, ...] = ()
    """A refusal holds one of these; without any, the name of a field."""


class Reached(Exception):
    """Checks are passed, and the work would begin."""


def outcome(case: Case) -> tuple[str, str]:
    """`accepted`, `refused`, `unclear` or `traceback`, and the sentence."""
    try:
        case.run()
    except Reached:
        return "accepted", ""
    except ValueError as error:
        sentence = str(error)
        clear = sentence.isprintable() and len(sentence) <= LONGEST
        named = any(name in sentence for name in case.names or FIELDS)
        return ("refused" if clear and named else "unclear"), sentence
    except (Exception, SystemExit) as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "accepted", ""


FIELDS = tuple(
    {part for path in field_paths(Config) for part in path.split(".")} | {"is not a field", "configuration", "JSON"}
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every part of JSON data, as the way to it."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutate(data: Any, rng: random.Random) -> Any:
    """The same JSON data with something wrong in one place, most likely."""
    way = rng.choice([p for p in places(data) if p] or [()])
    if not way:
        return rng.choice(JUNK)
    parent = data
    for key in way[:-1]:
        parent = parent[key]
    value, act = parent[way[-1]], rng.randrange(8)
    if act == 0:
        parent.pop(way[-1])
    elif act == 1 and isinstance(parent, dict):
        parent[str(way[-1])[1:] + rng.choice(("", "s", "\n", "😀"))] = value  # a mistyped name
    elif act == 2:
        parent[way[-1]] = [value]
    elif act == 3:
        parent[way[-1]] = {"name": value, str(way[-1]): value}
    elif act == 4 and isinstance(value, int | float):
        parent[way[-1]] = value * rng.choice((-1, 0, 0.5, 2, 1000, 10**6, 10**18, 1e300))
    elif act == 5 and isinstance(value, str):
        parent[way[-1]] = value[: len(value) // 2] + rng.choice(("", "x", "\0", "*", ":"))
    else:
        parent[way[-1]] = rng.choice(JUNK)
    return data


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's bytes cut, flipped, encoded anew, or with something in them."""
    place, act = rng.randrange(len(content) + 1), rng.randrange(8)
    text = content.decode("utf-8", "replace")
    more = (
        b"\0",
        b"\xff",
        b"\r",
        b"\r\n",
        b"\xef\xbb\xbf",
        b"{",
        b'"',
        b"\xe2\x80\xa8",
        b"\n" * 1000,
        b"x" * 2_000_000,
        DEEP.encode(),
    )
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: content[:place],
        lambda: content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + rng.choice(more) + content[place:],
        lambda: text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"))),
        lambda: content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\0"))),
        lambda: b"",
        lambda: content * 3,
        lambda: bytes(rng.randrange(256) for _ in range(64)),
    )
    return choices[act]()


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty current folder, for the time being."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("p.txt").write_text("a cat\n")
        yield Path(folder).resolve()


def tally(cases: Iterator[Case], work: Path, wrong: list[str]) -> dict[str, Counter[str]]:
    """Outcomes by kind; what is wrong is added to `wrong`."""
    counts: dict[str, Counter[str]] = {}
    before = {path for path in work.rglob("*") if path.parts[len(work.parts)] != "trained"}
    for case in cases:
        status, sentence = outcome(case)
        left = {path for path in work.rglob("*") if path.parts[len(work.parts)] != "trained"} - before
        for path in left if status != "accepted" else ():
            wrong.append(f"{case.kind}: left {path}: {case.tried}")
        for path in sorted(left, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if status not in ("accepted", "refused"):
            wrong.append(f"{case.kind}: {status}: {case.tried[:300]} -> {sentence[:300]}")
        counts.setdefault(case.kind, Counter()).update(
            ["cases", status, *["files_left"] * bool(left and status != "accepted")]
        )
    return counts
