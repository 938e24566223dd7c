"""Curves of a metric of one or several runs.

    python notebooks/plot.py runs/sea-bai-0 runs/sea-passive-0
    python notebooks/plot.py runs/a runs/b --metric gold --output gold.png
    python notebooks/plot.py runs/a runs/b --metric reward --against kl

A point is an evaluation, a row of metrics.jsonl that has the metric. Runs whose flags differ in the
seed alone are one arm: a line of their means with a band of one standard error over seeds. The band
of a single run is the error that its rows have beside the metric (`win_rate_stderr`), if any; it
holds the held-out prompts' chance, not the seed's. Against what does not grow steadily, as `kl`,
points are joined by arrows. What was last is printed too, so a machine without a screen will do.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

try:
    import drawing
    import matplotlib.pyplot as plt
except ImportError as error:
    sys.exit(f"error: {error}; pip install -r notebooks/requirements.txt")

SCRIPTS = {"explore": "sea", "bonus": "selm", "sampler": "pilaf"}
# Flags that make no other arm.
IGNORED = ("output_dir", "resume", "overwrite", "debug", "seed", "device", "planned_queries")

Rows = list[dict]


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read(folder: str) -> tuple[dict, Rows]:
    """Flags and evaluations of a run."""
    path = Path(folder).expanduser()
    for name in ("config.json", "metrics.jsonl"):
        if not (path / name).is_file():
            fail(f"{folder} is no folder of a run: it has no {name}")
    flags = json.loads((path / "config.json").read_text(encoding="utf-8"))["flags"]
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    if not lines:
        fail(f"{folder} has no evaluation yet")
    return flags, [json.loads(line) for line in lines]


def check(folder: str, rows: Rows, name: str) -> None:
    known = {key for row in rows for key, value in row.items() if not isinstance(value, str)}
    if name not in known:
        fail(f"{folder} has no metric {name}, but {', '.join(sorted(known))}")


def arm_of(flags: dict) -> str:
    """Script and arm, as drawing.py names them."""
    return next((f"{s}-{flags[key]}" for key, s in SCRIPTS.items() if key in flags), "")


def grouped(folders: list[str]) -> dict[str, tuple[str, list[Rows]]]:
    """Label -> arm and a run a seed. Seeds of one arm have the same flags and, but for the seed at
    its end, the same folder's name (another oracle, for instance, is no flag)."""
    groups = defaultdict(list)
    for folder in folders:
        flags, rows = read(folder)
        name, end = Path(folder).resolve().name, f"-{flags['seed']}"
        stem = name.removesuffix(end) if name.endswith(end) else ""
        key = json.dumps([stem, {k: v for k, v in flags.items() if k not in IGNORED}])
        groups[key].append((name, stem, flags, rows))
    arms = {}
    for runs in groups.values():
        is_one = len({flags["seed"] for _, _, flags, _ in runs}) == len(runs)
        for part in [runs] if is_one else [[run] for run in runs]:
            label = (is_one and part[0][1]) or " + ".join(name for name, *_ in part)
            arm, stem = arm_of(part[0][2]), part[0][1]
            # The default folder of another script with the same flags, as my_rule-bai-0.
            is_own = arm[arm.find("-") :] in stem and not stem.startswith(arm)
            arms[label] = stem if is_own else arm, [rows for *_, rows in part]
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description="Curves of a metric of one or several runs.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of runs, as runs/sea-bai-0")
    parser.add_argument("--metric", default="win_rate", help="a key of metrics.jsonl (win_rate)")
    parser.add_argument("--against", default="queries", help="another key (queries: labels)")
    parser.add_argument("--output", help="a file, as curves.png, instead of a window")
    flags = parser.parse_args()
    drawing.use_style()
    for folder in flags.folders:
        for name in (flags.metric, flags.against):
            check(folder, read(folder)[1], name)
    if not flags.output and plt.get_backend().lower() == "agg":
        fail("no window can be opened here: name a file, --output curves.png")
    arms, axis = grouped(flags.folders), plt.subplots(figsize=(6, 3.6))[1]
    names = [arm for arm, _ in arms.values()]
    names = [n if n and n not in names[:i] else label
             for i, (n, label) in enumerate(zip(names, arms))]  # fmt: skip
    for (label, (_, runs)), look in zip(arms.items(), drawing.looks(names)):
        drawing.curve(axis, runs, flags.metric, flags.against, label=label, **look)
        x, y, error = drawing.points(runs, flags.metric, flags.against)
        words = "" if error is None else f" ± {error[-1]:.3f}"
        print(f"{label}: {flags.metric} {y[0]:.3f} -> {y[-1]:.3f}{words}", end=" ")
        print(f"at {flags.against} {x[-1]:.6g}, {len(x)} evaluations, {len(runs)} seed(s)")
    against = {"queries": "labels", "kl": "kl (nats a response)"}.get(flags.against, flags.against)
    axis.set(xlabel=against, ylabel=flags.metric)
    axis.legend(fontsize=7)
    if not flags.output:
        plt.show()
        return
    try:
        plt.savefig(flags.output)
    except (OSError, ValueError) as error:
        fail(f"--output {flags.output}: {error}")
    print(f"drawn in {flags.output}")


if __name__ == "__main__":
    main()
