"""Do the notebooks run from top to bottom, offline, and are they what a student can read?"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@EACH
def test_a_notebook_runs_from_its_own_folder_and_its_checks_hold(path, monkeypatch):
    """A cell that fails, an exercise's check too, raises here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    resources = {"metadata": {"path": str(path.parent)}}
    notebook = nbformat.read(path, as_version=4)
    done = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
    assert all("traceback" not in output for cell in code_cells(path) for output in cell.outputs)
    assert done.execute().cells[-1]


@EACH
def test_a_notebook_is_short_and_its_outputs_are_committed(path):
    cells = nbformat.read(path, as_version=4).cells
    assert len(cells) <= 40
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 15, cell.source
    assert sum(bool(cell.outputs) for cell in code_cells(path)) >= 5
    assert any("image/png" in str(cell.outputs) for cell in code_cells(path))
    assert path.stat().st_size < 1_500_000


@EACH
def test_a_notebook_names_no_path_of_a_machine_and_starts_as_the_others_do(path):
    text = json.dumps(nbformat.read(path, as_version=4), ensure_ascii=False)
    assert not re.search(r"(?<![\w.:/])/(?:home|root|mnt|opt|work|tmp|Users)/\w+", text)
    assert code_cells(path)[0].source == code_cells(NOTEBOOKS[0])[0].source


def test_the_first_cell_fetches_and_installs_only_where_the_repository_is_not(tmp_path):
    """In the root, in notebooks/, and alone (as in Colab), from a stand-in for the address."""
    address = tmp_path / "address"
    address.mkdir()
    subprocess.run(["git", "init", "-q", address], check=True)
    (address / "notebooks").mkdir()
    for name in ("sea.py", "requirements.txt", "notebooks/requirements.txt"):
        shutil.copy(ROOT / name, address / name)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", address, "add", "."], check=True)
    subprocess.run(["git", "-C", address, *who, "commit", "-qm", "all"], check=True)
    record = (  # pip is recorded, not run
        "import os, subprocess\n"
        "real, calls = subprocess.run, []\n"
        "def run(words, **options):\n"
        "    calls.append(words[0])\n"
        "    return real(words, **options) if words[0] == 'git' else None\n"
        "subprocess.run = run\n"
    )
    show = "\nprint(os.getcwd(), len(calls), os.path.exists('sea.py'), sys.path[0] == os.getcwd())"
    code = record + code_cells(NOTEBOOKS[0])[0].source + show
    expected = [
        (address, address, 0),
        (address / "notebooks", address, 0),
        (tmp_path, tmp_path / "repository", 2),
        (tmp_path / "repository", tmp_path / "repository", 0),  # run once more
    ]
    for start, end, num_calls in expected:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=start, capture_output=True, text=True,
            env=os.environ | {"REPOSITORY": str(address)},
        )  # fmt: skip
        assert done.stdout.split() == [str(end), str(num_calls), "True", "True"], done.stderr
