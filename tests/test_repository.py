"""Is what is documented true? Files, flags, commands, tables, style of the repository."""

import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import transformers

import common
import sea

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python (\w+\.py)(.*)", "\n".join(re.findall(r"^    .*", README, re.M)))


def test_help_lists_every_flag_in_seconds():
    done = subprocess.run(
        [sys.executable, ROOT / "sea.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    for field in fields(sea.Config):
        assert f"--{field.name}" in done.stdout
        assert field.metadata["help"]


@pytest.mark.parametrize("script, words", COMMANDS)
def test_readme_commands_parse(script, words):
    assert (ROOT / script).exists()
    parser = transformers.HfArgumentParser(sea.Config, allow_abbrev=False)
    sea.Config(**vars(parser.parse_args(shlex.split(words.split("#")[0]))))


def test_the_two_commands_of_the_readme_are_the_documented_ones():
    assert "pip install -r requirements.txt && python sea.py" in README
    tests = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert tests in README
    assert (ROOT / "requirements.txt").read_text().startswith("torch>=2.11,<2.14\n")


def test_flags_that_documents_name_exist():
    names = {field.name for field in fields(sea.Config)}
    for text in (README, sea.__doc__):
        assert set(re.findall(r"--([a-z_]+)", text)) - {"help"} <= names


def test_every_flag_is_read_somewhere():
    source = (ROOT / "sea.py").read_text() + (ROOT / "common.py").read_text()
    for field in fields(sea.Config):
        uses = re.findall(rf"(?:config|self)\.{field.name}\b", source)
        assert uses or field.name in ("debug", "resume"), field.name


def test_readme_paths_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md))`", README):
        assert (ROOT / name).exists() or name in ("selm.py", "pilaf.py"), name


def test_the_equation_table_names_functions_and_tests_that_exist():
    row = r"^\| .*? \| `(\w+)\.py`: `([\w.]+)` \| `(tests/\w+\.py)::(\w+)` \|$"
    rows = re.findall(row, README, re.M)
    assert len(rows) >= 10
    for module, name, file, test in rows:
        value = {"common": common, "sea": sea}[module]
        for part in name.split("."):
            value = getattr(value, part)
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_logged_keys_are_the_documented_keys(flags, folder):
    more = {"erm_backbone": str(folder / "erm_backbone"), "burn_in": 4, "best_of_n": 2}
    run = sea.train(sea.Config(**flags | more))
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        for key in json.loads(line):
            known = key.removeprefix("best_of_n_")
            assert f"`{known}`" in README or known in ("queries", "rounds", "compared_with"), key


def test_functions_are_short_typed_and_documented():
    for name in ("common.py", "sea.py"):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name
                assert node.returns is not None, node.name
                for argument in node.args.args:
                    assert argument.annotation or argument.arg == "self", (node.name, argument.arg)


def test_nothing_reaches_for_the_network_with_the_default_flags(tmp_path):
    """The default command, cut to one round, in a process whose sockets are shut."""
    code = (
        "import socket, sys\n"
        "def shut(*_): raise OSError('network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = shut\n"
        "import sea, common\n"
        f"sys.argv = ['sea.py', '--num_queries', '2', '--output_dir', {str(tmp_path / 'run')!r}]\n"
        "common.main(sea.Config, sea.train, sea.__doc__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "network" not in done.stderr


def test_the_folder_of_the_project_holds_no_pickle_and_asks_for_no_remote_code():
    for path in ROOT.glob("tiny/**/*"):
        assert path.suffix not in (".bin", ".pt", ".pkl", ".pickle")
    for name in ("common.py", "sea.py"):
        source = (ROOT / name).read_text()
        assert "trust_remote_code=True" not in source
        assert source.count("torch.load(") == source.count("weights_only=True")
