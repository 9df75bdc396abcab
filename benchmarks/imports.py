"""The import of settings files of another framework: how many are translated, and why others are refused.

    python benchmarks/imports.py FRAMEWORK PATH... [--gpus 8]

FRAMEWORK is flow_grpo, flow-factory, verl-omni or unirl. A PATH is a settings file of it, or a folder of a clone of its
repository: all YAML files, scripts or, of flow_grpo, Python files below it are read. Of a Python file each function
without arguments is, but for `get_config`. `--gpus` is for those functions that do not say on how many GPUs they run.

Columns: the settings in each list of `progrpo import` (translated, not needed here, no equal here, could not be read),
then the file; for one that is refused, the reason. At the end, how many were translated, and refused for each reason.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from progrpo.imports.flow_factory.read import import_flow_factory
from progrpo.imports.flow_grpo.read import import_flow_grpo
from progrpo.imports.outcome import STATUSES
from progrpo.imports.translation import Translation
from progrpo.imports.unirl.read import import_unirl
from progrpo.imports.verl_omni.read import import_verl_omni

ENDS = {"flow_grpo": (".py",), "verl-omni": (".sh", ".yaml"), "flow-factory": (".yaml",), "unirl": (".yaml",)}


def settings_of(path: Path, ends: tuple[str, ...]) -> Iterator[str]:
    """The settings in a file or below a folder, as `progrpo import` takes them."""
    files = sorted(file for file in path.rglob("*") if file.suffix in ends) if path.is_dir() else [path]
    for file in files:
        if file.suffix != ".py":
            yield str(file)
            continue
        functions = re.findall(r"^def (\w+)\(\):", file.read_text(), re.MULTILINE)
        yield from (f"{file}:{name}" for name in functions if name != "get_config")


def reason(error: ValueError) -> str:
    """The reason of a refusal, without the file and the choices that there are."""
    text = re.sub(r"^.*?( asks for what cannot be run here)?: ", "", str(error), count=1)
    return re.sub(r";? there are .*", "", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=ENDS)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH")
    parser.add_argument("--gpus", type=int, default=8)
    options = parser.parse_args()
    importers: dict[str, Callable[[str], Translation]] = {
        "flow_grpo": lambda config: import_flow_grpo(config, _missing_gpus(config, options.gpus)),
        **{"flow-factory": import_flow_factory, "verl-omni": import_verl_omni, "unirl": import_unirl},
    }
    refused: Counter[str] = Counter()
    read = 0
    for path in options.paths:
        for settings in settings_of(path, ENDS[options.framework]):
            read += 1
            try:
                translation = importers[options.framework](settings)
            except ValueError as error:
                refused[reason(error)] += 1
                print(f"{'refused':>19}  {settings}: {reason(error)}")
                continue
            counts = Counter(row.outcome.status for row in translation.rows)
            print("".join(f"{counts[status]:4d} " for status in STATUSES), settings)
    print(f"\n{read} read, {read - refused.total()} translated, {refused.total()} refused")
    for why, count in refused.most_common():
        print(f"{count:4d}  {why}")


def _missing_gpus(config: str, gpus: int) -> int | None:
    """The number of GPUs for a function whose file does not say it; None if it does."""
    try:
        import_flow_grpo(config)
    except ValueError as error:
        return gpus if "give --gpus" in str(error) else None
    return None


if __name__ == "__main__":
    main()
