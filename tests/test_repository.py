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
import pilaf
import sea
import selm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"sea": sea, "selm": selm, "pilaf": pilaf}
FLAGS = {field.name for script in SCRIPTS.values() for field in fields(script.Config)}
MAKE_FLAGS = set(re.findall(r'"--(\w+)"', (ROOT / "tiny" / "make.py").read_text()))
COMMANDS = re.findall(r"python (\w+\.py)(.*)", "\n".join(re.findall(r"^    .*", README, re.M)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_flag_in_seconds(name):
    done = subprocess.run(
        [sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    for field in fields(SCRIPTS[name].Config):
        assert f"--{field.name}" in done.stdout
        assert field.metadata["help"]


def parses(script: str, words: str) -> bool:
    config_class = SCRIPTS[script.removesuffix(".py")].Config
    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False)
    config_class(**vars(parser.parse_args(shlex.split(words.split("#")[0]))))
    return True


@pytest.mark.parametrize("script, words", COMMANDS)
def test_readme_commands_parse(script, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / script).exists()
    assert parses(script, words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_a_docstring_parse(name):
    commands = re.findall(r"^ +python (\w+\.py)(.*)", SCRIPTS[name].__doc__, re.M)
    assert commands and all(parses(*command) for command in commands)


def test_the_two_commands_of_the_readme_are_the_documented_ones():
    assert "pip install -r requirements.txt && python sea.py" in README
    tests = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest"
    assert tests in README
    assert (ROOT / "requirements.txt").read_text().startswith("torch>=2.11,<2.14\n")


def test_flags_that_documents_name_exist():
    for text in (README, *(script.__doc__ for script in SCRIPTS.values())):
        assert set(re.findall(r"--([a-z_]+)", text)) - {"help"} <= FLAGS | MAKE_FLAGS
    for words in re.findall(r"python tiny/make\.py(.*)", README):
        assert set(re.findall(r"--([a-z_]+)", words)) <= MAKE_FLAGS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_somewhere(name):
    source = (ROOT / f"{name}.py").read_text() + (ROOT / "common.py").read_text()
    for field in fields(SCRIPTS[name].Config):
        uses = re.findall(rf"(?:config|self)\.{field.name}\b", source)
        assert uses or field.name in ("debug", "resume"), field.name


def test_readme_paths_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md))`", README):
        assert (ROOT / name).exists(), name


def test_the_equation_table_names_functions_and_tests_that_exist():
    row = r"^\| .*? \| `(\w+)\.py`: `([\w.]+)` \| `(tests/\w+\.py)::(\w+)` \|$"
    rows = re.findall(row, README, re.M)
    assert len(rows) >= 10
    for module, name, file, test in rows:
        value = (SCRIPTS | {"common": common})[module]
        for part in name.split("."):
            value = getattr(value, part)
        tree = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    "name, more",
    [
        ("sea", {"burn_in": 4, "best_of_n": 2}),
        ("selm", {}),
        ("pilaf", {"importance_weights": True, "num_iterations": 2}),
    ],
)
def test_logged_keys_are_the_documented_keys(name, more, flags, folder):
    if name == "sea":
        more = more | {"erm_backbone": str(folder / "erm_backbone")}
    run = SCRIPTS[name].train(SCRIPTS[name].Config(**flags | more))
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        for key in json.loads(line):
            known = key.removeprefix("best_of_n_")
            assert f"`{known}`" in README or known in ("queries", "rounds", "compared_with"), key


def test_functions_are_short_typed_and_documented():
    for name in ("common.py", *(f"{script}.py" for script in SCRIPTS)):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name
                assert node.returns is not None, node.name
                for argument in node.args.args:
                    assert argument.annotation or argument.arg == "self", (node.name, argument.arg)


@pytest.mark.parametrize("name, labels", [("sea", 2), ("selm", 3), ("pilaf", 2)])
def test_nothing_reaches_for_the_network_with_the_default_flags(name, labels, tmp_path):
    """The default command, cut to one round, in a process whose sockets are shut."""
    code = (
        "import socket, sys\n"
        "def shut(*_): raise OSError('network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = shut\n"
        f"import {name} as script, common\n"
        f"sys.argv = ['script.py', '--num_queries', '{labels}']\n"
        f"sys.argv += ['--output_dir', {str(tmp_path / 'run')!r}]\n"
        "common.main(script.Config, script.train, script.__doc__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "network" not in done.stderr


def test_the_folder_of_the_project_holds_no_pickle_and_asks_for_no_remote_code():
    for path in ROOT.glob("tiny/**/*"):
        assert path.suffix not in (".bin", ".pt", ".pkl", ".pickle")
    for name in ("common.py", *(f"{script}.py" for script in SCRIPTS)):
        source = (ROOT / name).read_text()
        assert "trust_remote_code=True" not in source
        assert source.count("torch.load(") == source.count("weights_only=True")
