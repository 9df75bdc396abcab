"""The size and shape of the code as a table: files, functions, parameters, methods, types, columns, settings.

    python benchmarks/house.py                # this checkout
    python benchmarks/house.py ../other       # another one, such as a worktree of an older commit
    python benchmarks/house.py --offenders    # also what is above each goal, by place

Sources are read, never imported, so any checkout can be measured. Only the start-up time runs a command of it.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLUMNS = 120
MOST_PARAMETERS = 6
OPENINGS = (
    *("Of ", "As ", "That ", "Says ", "Said ", "Those ", "The same", "Its ", "Their ", "Where ", "By "),
    *("What ", "How "),
)
"""First words of docstrings that name no subject and give no order."""
THIRD_PERSON = re.compile(r"[A-Z][a-z]*[a-rtv-z]s (a|an|the|each|every|what) |(Compares|Multiplies|Samples) ")
"""The beginnings of docstrings whose subject is left out: a verb in the third person and its object."""
PRIVATE_WORDS = ("told", "found", "wanted", "how")
"""Names that say nothing about what they hold."""
STARTS = 7


@dataclass(frozen=True)
class Function:
    """One function or method: its place, its length in lines, and its parameters without self and cls."""

    place: str
    lines: int
    parameters: int


@dataclass(frozen=True)
class Record:
    """One dataclass: its place and the annotations of its fields by name."""

    place: str
    fields: dict[str, str]


def sources(root: Path) -> list[Path]:
    return sorted((root / "src/progrpo").rglob("*.py"))


def scripts(root: Path) -> list[Path]:
    """Every file of Python: sources, tests, benchmarks, examples and the scripts of the docs."""
    folders = ("src", "tests", "benchmarks", "examples", "docs")
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def texts(root: Path) -> list[Path]:
    """Every file whose lines end at 120 columns: Python and prose."""
    return sorted([*scripts(root), *root.glob("*.md"), *(root / "docs").rglob("*.md")])


def functions(file: Path, tree: ast.AST, root: Path) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            place = f"{file.relative_to(root)}:{node.lineno} {node.name}"
            yield Function(place, (node.end_lineno or node.lineno) - node.lineno + 1, len(own))


def methods(file: Path, tree: ast.AST, root: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            yield len(own), f"{file.relative_to(root)}:{node.lineno} {node.name}"


def records(file: Path, tree: ast.AST, root: Path) -> Iterator[Record]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = {
                part.target.id: ast.unparse(part.annotation)
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
                if "ClassVar" not in ast.unparse(part.annotation)
            }
            yield Record(f"{file.relative_to(root)}:{node.lineno} {node.name}", fields)


def declared_twice(every: list[Record]) -> list[str]:
    """Fields of settings that another dataclass has too, where both have three or more names in common: a copy.

    Settings stand in `config.py` or a `settings.py`. Settings that share a field by inheritance declare it once, and
    two settings that both have a `name` or a `seed` are no copies. `Config` itself is left out, whose fields are the
    rooms' sections, and so are the command line's options and the settings of other frameworks (`imports/`).
    """
    settings = [record for record in every if re.search(r"(config|settings)\.py:\d+ (?!Config$)", record.place)]
    others = [record for record in every if not re.search(r"(config|settings)\.py|/cli\b|/imports/", record.place)]
    copies: dict[str, list[str]] = {}
    for record in settings:
        for other in others:
            common = record.fields.keys() & other.fields.keys()
            for name in sorted(common) if len(common) >= 3 else ():
                copies.setdefault(f"{record.place} {name}", []).append(other.place.split()[-1])
    return [f"{place} (also {', '.join(names)})" for place, names in sorted(copies.items())]


def docstrings(file: Path, tree: ast.AST, root: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of modules, classes, functions and fields, with their places."""
    for node in ast.walk(tree):
        for part in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                yield f"{file.relative_to(root)}:{part.lineno}", part.value.value


def lacks_subject(text: str) -> bool:
    """Whether a docstring begins with neither its noun nor a verb in the imperative."""
    return text.startswith(OPENINGS) or THIRD_PERSON.match(text) is not None


def private_words(file: Path, tree: ast.AST, root: Path) -> Iterator[str]:
    """The places of variables, arguments, attributes, imports, functions and classes whose name says nothing."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
                pass
            case ast.ExceptHandler(name=name) | ast.alias(asname=name):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case _:
                continue
        if name in PRIVATE_WORDS:
            yield f"{file.relative_to(root)}:{node.lineno} {name}"


def start_up(root: Path) -> float:
    """Seconds of `progrpo --help`, the median of several processes."""
    environment = {**os.environ, "PYTHONPATH": str((root / "src").resolve())}
    seconds = []
    for _ in range(STARTS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "progrpo", "--help"], env=environment, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(root: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The rows of the table, and by goal the places above it."""
    files = sources(root)
    trees = {file: ast.parse(file.read_text()) for file in files}
    lengths = [len(file.read_text().splitlines()) for file in files]
    every = [function for file, tree in trees.items() for function in functions(file, tree, root)]
    sizes = sorted(function.lines for function in every)
    classes = sorted((pair for file, tree in trees.items() for pair in methods(file, tree, root)), reverse=True)
    code = "\n".join(file.read_text() for file in files)
    anys = len(re.findall(r"\bAny\b", code)) - len(re.findall(r"^from typing import .*\bAny\b", code, re.MULTILINE))
    twice = declared_twice([record for file, tree in trees.items() for record in records(file, tree, root)])
    long_lines = [
        f"{file.relative_to(root)}:{number}"
        for file in texts(root)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    in_sources = sum(line.startswith("src/") for line in long_lines)
    openings = [
        f"{place} {text.splitlines()[0][:60] if text else ''}"
        for file, tree in trees.items()
        for place, text in docstrings(file, tree, root)
        if lacks_subject(text)
    ]
    private = [place for file, tree in trees.items() for place in private_words(file, tree, root)]
    long_lists = [
        f"{function.place}: {function.parameters}" for function in every if function.parameters > MOST_PARAMETERS
    ]
    rows = {
        "files in src/progrpo, lines": f"{len(files)}, {sum(lengths):,}",
        "lines of a file: median, max": f"{statistics.median(lengths):.0f}, {max(lengths)}",
        "lines of a function: median, p90, max": (
            f"{statistics.median(sizes):.0f}, {sizes[int(0.9 * len(sizes))]}, {sizes[-1]}"
        ),
        f"parameters of a function: max, above {MOST_PARAMETERS}": (
            f"{max(function.parameters for function in every)}, {len(long_lists)}"
        ),
        "methods of a class: max": f"{classes[0][0]} ({classes[0][1].split()[-1]})",
        "`Any` per 1,000 lines of src": f"{1000 * anys / sum(lengths):.1f}",
        "settings fields that another dataclass copies": str(len(twice)),
        f"lines over {COLUMNS} columns: src, all": f"{in_sources}, {len(long_lines)}",
        "docstrings without a subject": str(len(openings)),
        f"names {', '.join(PRIVATE_WORDS)}": str(len(private)),
        "seconds of `progrpo --help`": f"{start_up(root):.2f}",
    }
    above = {
        "parameters": long_lists,
        "classes of more than 12 methods": [f"{place}: {number}" for number, place in classes if number > 12],
        "declared twice": twice,
        "long lines": long_lines,
        "docstrings": openings,
        "names": private,
    }
    return rows, above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--offenders", action="store_true", help="print what is above each goal, by place")
    given = parser.parse_args()
    rows, above = measure(given.root.resolve())
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    if given.offenders:
        for goal, places in above.items():
            print(f"\n{goal}: {len(places)}", *places, sep="\n  ")


if __name__ == "__main__":
    main()
