"""Mutation test: does some quick test fail for each small error that is put into a function?

    python tests/mutants.py --num 150 --seed 0     # random mutants of the formula functions

A mutant is a change by the syntax tree: another operator, constant or reduction, a negation, an
argument exchanged or left out. A failing quick test, or one of 20 minutes, kills it.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # the files that matter, those first that kill most
    "common.py": "formulas packing selm pilaf sea oracle run loading",
    "harness.py": "formulas oracle run loading bad_input",
    "tiny/gold.py": "formulas run",
    **{f"{name}.py": f"{name} run bad_input" for name in ("sea", "selm", "pilaf")},
}
# The formula functions: all but these, and of harness.py these alone.
PLUMBING = {"Cache", "Config", "autocast", "load_ensemble", "plan", "train"}
HARNESS = {"Oracle", "evaluate", "next_prompts", "win_metrics"}
PAIRS = [
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or),
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn),
    ("sum", "mean"), ("max", "min"), ("argmax", "argmin"), ("any", "all"), ("var", "std"),
]  # fmt: skip
OTHER = dict(PAIRS) | {b: a for a, b in PAIRS} | {ast.Pow: ast.Mult, ast.FloorDiv: ast.Div}


def inside(node):
    """The nodes of a function, but no annotations, decorators and texts for a person."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            is_text = getattr(getattr(child, "func", None), "id", "") in ("require", "print")
            is_skipped = is_text or field in ("annotation", "returns", "decorator_list")
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) | is_skipped:
                yield from inside(child)


def changes(function):
    """(node, field, new value) of every mutant of a function."""
    for node in inside(function):
        if type(getattr(node, "op", None)) in OTHER:
            yield node, "op", OTHER[type(node.op)]()
        if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
            yield node, "ops", [OTHER[type(node.ops[0])](), *node.ops[1:]]
        if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            yield node, "operand", ast.UnaryOp(node.op, node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            yield node, "value", not node.value if type(node.value) is bool else node.value + 1
        if isinstance(node, ast.Attribute) and node.attr in OTHER:
            yield node, "attr", OTHER[node.attr]
        if isinstance(node, ast.Call) and ast.unparse(node.func) not in ("max", "min"):
            args, words = node.args, node.keywords
            for i, (one, two) in enumerate(zip(args, args[1:])):
                if type(one) is type(two) and ast.dump(one) != ast.dump(two):
                    yield node, "args", [*args[:i], two, one, *args[i + 2 :]]
            for i in [i for i in range(len(words)) if words[i].arg not in ("device", "dtype")]:
                yield node, "keywords", words[:i] + words[i + 1 :]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "value", ast.Constant(None)


def mutants(file, wanted):
    """(file, what is changed, the new source) of every mutant of the wanted functions."""
    tree = ast.parse((ROOT / file).read_text())
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            name = f"{getattr(owner, 'name', '')}.{function.name}".lstrip(".")
            names = {"all", name, name.split(".")[0]}
            is_formula = names & HARNESS if file == "harness.py" else not names & PLUMBING
            is_wanted = names & wanted if wanted else is_formula
            for node, field, new in changes(function) if is_wanted else []:
                old, before = getattr(node, field), ast.unparse(node).split("\n")[0]
                setattr(node, field, new)
                what = f"{file}:{node.lineno} {name}, {field}: {before} => "
                yield file, what + ast.unparse(node).split("\n")[0], ast.unparse(tree)
                setattr(node, field, old)


def is_killed(folder, file):
    command = ["timeout", "1200", sys.executable, "-m", "pytest", "-xq", "-pno:cacheprovider"]
    command += [f"tests/test_{name}.py" for name in TESTS[file].split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--functions", nargs="+", default=[], help="all, or: dpo Oracle.prefer")
    args, num_killed = parser.parse_args(), 0
    every = [mutant for file in TESTS for mutant in mutants(file, set(args.functions))]
    chosen = random.Random(args.seed).sample(every, min(args.num, len(every)))
    with tempfile.TemporaryDirectory() as name:
        unused = shutil.ignore_patterns(".*", "*env", "runs", "results")
        folder = shutil.copytree(ROOT, Path(name) / "copy", ignore=unused)
        for file in {file for file, *_ in chosen}:
            assert not is_killed(folder, file), f"the tests of {file} fail without a mutant"
        for file, what, source in chosen:
            (folder / file).write_text(source)
            is_dead = is_killed(folder, file)
            (folder / file).write_text((ROOT / file).read_text())
            num_killed += is_dead
            print("killed  " if is_dead else "SURVIVED", what, flush=True)
    print(f"{num_killed} of {len(chosen)} killed (of {len(every)} mutants)")
    sys.exit(num_killed < 0.95 * len(chosen))


if __name__ == "__main__":
    main()
