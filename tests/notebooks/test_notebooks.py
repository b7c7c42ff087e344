"""Every notebook runs from top to bottom on small settings, and is committed with the results of a whole run."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = {"first_sae.ipynb"}  # the others take longer than a fast test should
LARGEST = 400 * 1024
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|work|tmp|root|Users)/")


@pytest.fixture(scope="module")
def run():
    return runpy.run_path(str(FOLDER / "run.py"))


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.name in QUICK else pytest.mark.slow) for path in NOTEBOOKS]
)
def test_it_runs(path, run, tmp_path, monkeypatch):
    """In an empty folder, as on a machine that has nothing but the package."""
    monkeypatch.setenv("SAEBENCH_SMALL", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    directory = tmp_path / "a" / "b"
    directory.mkdir(parents=True)
    notebook = run["execute"](path, directory, timeout=600)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in notebook.cells))
    )
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert {child.name for child in tmp_path.rglob("*") if child.parent == directory} <= {"runs"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_results(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `python notebooks/run.py` on it"
    assert outputs(notebook)
    assert not [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size < LARGEST
    found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
    assert found is None, f"a path of one machine: {found}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_settings_are_in_one_cell_and_its_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    asking = [cell for cell in notebook.cells if cell.cell_type == "code" and "SAEBENCH_SMALL" in cell.source]
    assert len(asking) == 1
    said = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", said) if not (FOLDER / link).exists()]
    assert not missing


def test_the_kernel_is_the_python_of_the_tests(run, tmp_path):
    path = tmp_path / "one.ipynb"
    cell = nbformat.v4.new_code_cell(
        "import sys, os\nprint(sys.executable)\nprint(os.getcwd())\nprint('hidden', file=sys.stderr)"
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    before = os.environ.get("JUPYTER_PATH")
    (output,) = outputs(run["execute"](path, tmp_path))
    assert output.text.split() == [sys.executable, str(tmp_path)]
    assert os.environ.get("JUPYTER_PATH") == before


def test_what_differs_between_machines_is_not_kept(run):
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.status.busy": "2020-01-01"}, "tags": ["kept"]})
    cell.outputs = [nbformat.v4.new_output("stream", name=name, text=name) for name in ("stdout", "stderr")]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11.9"}})
    tidied = run["tidy"](notebook)
    assert [output.name for output in outputs(tidied)] == ["stdout"]
    assert tidied.cells[0].metadata == {"tags": ["kept"]}
    assert "version" not in json.dumps(tidied.metadata)
