"""Runs notebooks from top to bottom and keeps their results in them: how the committed ones were made.

    python notebooks/run.py                    # all of this folder
    python notebooks/run.py first_sae.ipynb    # some

Kept is what a reader needs. Progress lines (standard error), execution times and the version of Python are left out, so that a second run
of the same code gives nearly the same file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
KERNEL = "saebench-run"
WIDGET = "application/vnd.jupyter.widget-view+json"
TIMEOUT = 1800  # seconds for a cell


def execute(path: Path, directory: Path, *, timeout: int = TIMEOUT) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `directory`, by the Python that runs this. Raises nbclient's CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as kernels:
        specification = Path(kernels) / "kernels" / KERNEL / "kernel.json"
        specification.parent.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        specification.write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [kernels, before]))  # found first: no other Python is taken
        try:
            client = NotebookClient(
                notebook,
                kernel_name=KERNEL,
                timeout=timeout,
                record_timing=False,
                coalesce_streams=True,
                resources={"metadata": {"path": str(directory)}},
            )
            client.execute()
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before
    return tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without standard error and without what differs from machine to machine."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop(
                    WIDGET, None
                )  # a widget has no model until its cell is run; its table stands beside it
            cell.metadata.pop("execution", None)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def main() -> None:
    chosen = [FOLDER / Path(name).name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in chosen:
        nbformat.write(execute(path, FOLDER), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
