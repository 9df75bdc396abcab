"""The notebooks of examples/, executed and saved with their outputs:

    make notebooks                           # all of them, minutes on a CPU
    python docs/notebooks.py examples/method.ipynb

Cells tagged `remove-output` lose theirs, a log with seconds. Nothing of standard error is kept, where libraries name
folders of the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook after a new kernel has executed it in a folder."""
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return notebook


def kept_outputs(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The outputs of a cell that say the same when it is executed again; of a picture's two forms the smaller, JPEG."""
    if "remove-output" in cell.metadata.get("tags", ()):
        return []
    for output in cell.outputs:
        if "image/jpeg" in output.get("data", {}):
            output.data.pop("image/png", None)
    return [output for output in cell.outputs if output.get("name") != "stderr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(EXAMPLES.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        with TemporaryDirectory() as folder:
            notebook = executed(nbformat.read(path, as_version=4), Path(folder))
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = kept_outputs(cell)
        notebook.metadata.language_info = {"name": "python"}
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
