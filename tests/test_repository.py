"""Is what is documented true? Files, flags, commands, tables, logged keys, sizes; and do the
scripts run as they are shipped, without a network?"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import common
import harness

import pytest
from conftest import ROOT, rows
from test_run import SCRIPTS

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {"common": common, "harness": harness, **SCRIPTS}
FLAGS = {field.name for script in SCRIPTS.values() for field in fields(script.Config)}
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES}
WHOLE_LINES = README.replace("\\\n", "")
COMMANDS = re.findall(r"(?:^    .*|`)python (\w+)\.py([^`\n]*)", WHOLE_LINES, re.M)
DOCSTRINGS = {name: re.findall(r"^ +python (\w+)\.py(.*)", SCRIPTS[name].__doc__, re.M)
              for name in SCRIPTS}  # fmt: skip


def nodes(kind: type, *names: str) -> list:
    return [n for name in names or TREES for n in ast.walk(TREES[name]) if isinstance(n, kind)]


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", MODULES)
def test_a_file_does_not_grow(name):
    """Of harness.py 520 lines are wanted, which it does not reach."""
    most = dict(common=450, harness=712, sea=390, selm=310, pilaf=300)[name]
    assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most


def test_functions_have_at_most_sixty_lines_and_types_and_the_runs_folder_is_a_small_class():
    for node in nodes(ast.FunctionDef):
        assert node.end_lineno - node.lineno < 60, node.name
        assert node.returns is not None, node.name
        for argument in node.args.args:
            assert argument.annotation or argument.arg == "self", (node.name, argument.arg)
    (run,) = [node for node in nodes(ast.ClassDef, "harness") if node.name == "Run"]
    assert run.end_lineno - run.lineno < 120
    assert sum(isinstance(node, ast.FunctionDef) for node in run.body) <= 10


def test_the_tests_do_not_grow():
    files = [path for path in (ROOT / "tests").glob("*.py") if "benchmark" not in path.name]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 4000


# ---------------------------------------------------------------- flags, commands, paths, tables


@pytest.mark.parametrize("name, words", [*COMMANDS, *sum(DOCSTRINGS.values(), [])])
def test_a_documented_command_is_taken_by_the_real_parser(name, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    config_class = SCRIPTS[name].Config
    parser = harness.Parser(config_class, allow_abbrev=False)
    config = config_class(**vars(parser.parse_args(shlex.split(words, comments=True))))
    assert config.output_dir


def test_documents_name_commands_and_flags_that_exist():
    assert len(COMMANDS) >= 2 and all(DOCSTRINGS.values())
    assert "pip install -r requirements.txt && python sea.py" in README
    assert "-r tests/requirements.txt && python -m pytest" in README
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("[tn]*/*.py")]
    known = FLAGS | {"help", "nproc_per_node", "dist"}
    known |= set(re.findall(r'"--(\w+)"', "".join(texts)))
    for text in (README, *(module.__doc__ for module in MODULES.values())):
        assert set(re.findall(r"--([a-z_]+)", text)) <= known


def test_every_flag_is_read_outside_of_the_flags_themselves():
    checks = {id(node) for config in nodes(ast.ClassDef) if config.name == "Config"
              for node in ast.walk(config)}  # fmt: skip
    read = {node.attr for node in nodes(ast.Attribute) if id(node) not in checks}
    elsewhere = {"debug", "reference_column", "other_column"}  # in sys.argv; by a computed name
    assert FLAGS - read == elsewhere


def test_paths_that_the_readme_names_exist():
    names = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|txt|md|ipynb))`", README)
    missing = [n for n in names if not any((ROOT / top / n).exists() for top in (".", "notebooks"))]
    assert len(names) >= 10 and not missing


def test_the_equation_table_names_functions_and_tests_that_exist():
    row = r"^\| .*? \| `(\w+)\.py`: `([\w.]+)` \| `(tests/\w+\.py)::(\w+)` \|$"
    table = re.findall(row, README, re.M)
    assert len(table) >= 20
    for module, name, file, test in table:
        value = MODULES[module]
        for part in name.split("."):
            value = getattr(value, part)
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_readmes_own_oracle_trains(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"^    import .*?^    \w+\.train\(.*?\)$", README, re.M | re.S)
    folder, shorter = str(tmp_path / "run"), "num_queries=8, eval_prompts=4"
    code = code.replace("num_queries=256", shorter).replace("runs/shortest", folder)
    exec("\n".join(line[4:] for line in code.splitlines()), {})
    lengths = [(len(row["chosen"].strip()), len(row["rejected"].strip()))
               for row in rows(tmp_path / "run" / "preferences.jsonl")]  # fmt: skip
    assert len(lengths) == 8
    assert sum(chosen < rejected for chosen, rejected in lengths) >= 6  # labels are noisy


# ---------------------------------------------------------------- the scripts as they are shipped


def test_importing_the_scripts_has_no_side_effects(tmp_path):
    code = (
        "import os, random, sys, torch, transformers, tqdm\n"
        "def state():\n"
        "    threads, out = torch.get_num_threads(), (sys.stdout, sys.stderr, tuple(sys.argv))\n"
        "    seeds = random.getstate(), torch.random.get_rng_state().tolist()\n"
        "    level = transformers.logging.get_verbosity()\n"
        "    return dict(os.environ), os.getcwd(), os.listdir(), threads, out, seeds, level\n"
        "os.environ.pop('GOMP_SPINCOUNT', None)\nbefore = state()\n"
        "import sea, selm, pilaf\nprint(state() == before)\n"
    )
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    done = subprocess.run([sys.executable, "-c", code], **options, capture_output=True, text=True)
    assert done.stdout == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
@pytest.mark.parametrize(
    "own, expected",
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(own, expected):
    """libgomp tells what it has read: too late, if torch was imported before common.py."""
    ours = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ours |= {"OMP_DISPLAY_ENV": "VERBOSE"} | own
    options = dict(cwd=ROOT, env=ours, capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", "import sea"], **options)
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {expected}


FEW = "--num_queries 12 --eval_prompts 4 --eval_every 4 --warmup_steps 0"
MORE = {
    "sea": "--burn_in 4 --best_of_n 2 --batch_size 4 --explore ee",
    "selm": "--num_iterations 2 --batch_size 2",
    "pilaf": "--importance_weights --num_iterations 2 --batch_size 4",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_on_tiny_without_a_network_and_writes_what_is_documented(name, tmp_path):
    """From the clone's folder, in a process whose sockets are shut."""
    folder = tmp_path / "run"
    words = [*shlex.split(f"{FEW} {MORE[name]}"), "--output_dir", str(folder)]
    code = (
        "import socket, sys\n"
        "def shut(*_): raise OSError('network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = shut\n"
        f"import {name} as script, harness\n"
        f"sys.argv = ['script.py', *{words}]\n"
        "harness.main(script.Config, script.train, script.__doc__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "network" not in done.stderr, done.stderr[-2000:]
    names = {path.name for path in folder.iterdir()}
    files = {f"{name}.jsonl" for name in ("metrics", "preferences", "samples", "labels")}
    assert names == files | {"config.json", "checkpoint.pt", "model"}
    for own in names - {"checkpoint.pt"}:
        assert f"`{own}" in README, own
    text = (ROOT / "notebooks" / "metrics.md").read_text(encoding="utf-8")
    keys = {key.removeprefix("best_of_n_") for row in rows(folder / "metrics.jsonl")
            for key in row}  # fmt: skip
    assert {"queries", "round", "win_rate", "kl", "loss", "truncated"} <= keys
    assert not {key for key in keys if f"`{key}`" not in text}
