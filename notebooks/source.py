"""Look at the source of a formula, break a line of it, and see which picture or test notices.

    show(function)                         print its source
    broken(function, old, new)             the same function with `old` replaced by `new`
    noticed("sea.py", old, new, "anchor")  what the tests named so say of such a repository
    python notebooks/source.py sea.py "(now - start)" now anchor      the same, in a terminal

None changes a file: `broken` compiles the source with the line changed, `noticed` works on a copy
of the repository in a folder that it deletes.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def show(*functions: Callable) -> None:
    sources = [textwrap.dedent(inspect.getsource(function)) for function in functions]
    print("\n\n".join(sources).rstrip())


def replaced(source: str, old: str, new: str) -> str:
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in the source, not once")
    return source.replace(old, new)


def broken(function: Callable, old: str, new: str) -> Callable:
    """The function, or method, with a part of its source replaced."""
    source = replaced(textwrap.dedent(inspect.getsource(function)), old, new)
    names = {}
    exec(compile(source, "broken", "exec"), function.__globals__, names)
    return names[function.__name__]


def noticed(file: str, old: str, new: str, tests: str) -> str:
    """Run the tests of a script whose names contain `tests` (as pytest's -k has it) on a copy of
    the repository with `old` replaced by `new` in the file: the names of those that fail."""
    if subprocess.run([sys.executable, "-c", "import pytest, xdist"]).returncode:
        return "pip install -r tests/requirements.txt, to see the tests"
    with tempfile.TemporaryDirectory() as name:
        unused = shutil.ignore_patterns(".*", "*env", "runs", "notebooks")  # .venv is large
        folder = shutil.copytree(ROOT, Path(name) / "copy", ignore=unused)
        source = (folder / file).read_text(encoding="utf-8")
        (folder / file).write_text(replaced(source, old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider"]
        command += ["--tb=no", "--color=no", f"tests/test_{Path(file).stem}.py", "-k", tests]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        out = subprocess.run(command, **options).stdout
    failed = re.findall(r"^FAILED tests/\S+::([\w]+)", out, re.M)
    passed = (re.findall(r"(\d+) passed", out) or ["0"])[0]
    return "\n".join(["failed: " + test for test in dict.fromkeys(failed)] + [f"passed: {passed}"])


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        print(noticed(*sys.argv[1:]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
