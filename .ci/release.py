"""Check what is to be published: one version everywhere, the weights inside, and a wheel that the sdist gives again.

    python .ci/release.py dist                  # after make dist
    python .ci/release.py --tag v0.1.0 dist     # also what a tag promises

It needs the standard library alone, so that a release is checked by few hands.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version() -> str:
    """The version, where it is written: `progrpo.__version__`."""
    text = (ROOT / "src/progrpo/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found
    return found[1]


def tag_faults(tag: str, changelog: str) -> Iterator[str]:
    """The faults of a tag: another number, no semantic version, or no dated section of the changelog."""
    number = tag.removeprefix("v")
    if tag == number or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", number):
        yield f"the tag {tag} is not vMAJOR.MINOR.PATCH, with a, b or rc and a number after it for a pre-release"
    if number != version():
        yield f"the tag {tag} is not the version {version()} of src/progrpo/__init__.py"
    if not re.search(rf"^## {re.escape(number)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md has no section '## {number} (YYYY-MM-DD)'"


def contents(wheel: Path) -> dict[str, str]:
    """The SHA-256 of every file of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}


def dist_faults(folder: Path) -> Iterator[str]:
    """The faults of a folder's files: its sdist, its wheel, and `direct/`, a wheel of the sources."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        yield f"{folder} holds {len(wheels)} wheels and {len(sdists)} sdists, not one of each"
        return
    own = version()
    for path in (wheels[0], sdists[0]):
        if not path.name.startswith(f"progrpo-{own}"):
            yield f"{path.name} is not of version {own}"
    files = contents(wheels[0])
    package = ROOT / "src"
    for weights in sorted(package.glob("progrpo/zoo/weights/**/*.safetensors")):
        if weights.relative_to(package).as_posix() not in files:
            yield f"{wheels[0].name} has no {weights.relative_to(package)}"
    for direct in folder.glob("direct/*.whl"):
        if (other := contents(direct)) != files:
            different = sorted(name for name in {*files, *other} if files.get(name) != other.get(name))
            yield f"the wheel of the sdist and that of the sources differ in {', '.join(different[:5])}"
    with tarfile.open(sdists[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for needed in ("LICENSE", "README.md", "CITATION.cff", "constraints.txt", "tests/conftest.py", "docs/README.md"):
        if needed not in names:
            yield f"{sdists[0].name} has no {needed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dist", type=Path)
    parser.add_argument("--tag")
    args = parser.parse_args()
    faults = list(dist_faults(args.dist))
    if args.tag is not None:
        faults += tag_faults(args.tag, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for fault in faults:
        print(f"release: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
