"""Run the experiments of notebooks/protocol.md: every arm, rule of labels and seed, into results/.

    python notebooks/experiments.py --stage rates       # first: each arm's learning rate
    python notebooks/experiments.py --stage claims      # then both rules of labels, seeds 0 to 7
    python notebooks/experiments.py --stage backbones --jobs 2  # or open: alpha, gamma, anchor
    python notebooks/experiments.py --stage claims --arms bai random --seeds 0 1 --list
    python notebooks/experiments.py --stage simulator   # the backbones without a policy, 20 seeds

Stop it at any moment: what is finished is kept, what was begun starts anew. A process trains on one
thread, run after run. A line of results/STAGE.jsonl is a row of a run's metrics.jsonl, with "arm",
"labels" (the rule), "seed", "rate", "seconds" (the whole run's), "commit" and "machine".
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"
SHARED = "--num_queries 1024 --eval_every 512 --eval_prompts 1000 --checkpoint_every 1000000"
RATES = (1.5e-4, 3e-4, 6e-4)
RULES = ("bernoulli", "argmax")
SEARCH = "--eval_every 4096 --eval_prompts 256"  # the search looks at the end alone
LONGER = "--num_queries 2048 --eval_every 4096"  # a ranking costs three labels a pair
MOVED = "--model {start}/model --ref_model ./tiny/sft"  # the policy of `start`, of the same seed

# Arm -> command.
ARMS = {
    "passive": "sea --explore passive",
    "repeated": "repeated_pairs",
    "bai": "sea --explore bai",
    "ee": "sea --explore ee",
    "random": "sea --explore random",
    "best_two": "sea --explore best_two",
    "bai-only": "sea --explore bai --gamma 1",  # labelled pairs only, no synthetic ones
    "ee-only": "sea --explore ee --gamma 1",
    "random-only": "sea --explore random --gamma 1",
    "best_two-only": "sea --explore best_two --gamma 1",
    "iterative": f"selm {LONGER} --bonus none",
    "selm": f"selm {LONGER}",
    # A sampled y is ranked too, so this arm has a baseline of its own.
    "iterative-sample": f"selm {LONGER} --bonus none --bonus_response sample",
    "selm-sample": f"selm {LONGER} --bonus_response sample",
    "vanilla": f"pilaf --sampler vanilla {MOVED}",
    "pilaf": f"pilaf --sampler pilaf {MOVED}",
}
KEYS = ("arm", "labels", "rate", "seed", "queries")  # of a row
START = "pilaf --sampler vanilla --num_iterations 1"
BACKBONES = {
    f"{rule}-{name}": f"sea --explore {rule} --erm_backbone {backbone}"
    for name, backbone in (("reference", "reference"), ("oracle", "./tiny/reward_model"))
    for rule in ("bai", "random", "best_two")
}
OPEN = {  # what else a reader may ask
    "selm-alpha0.01": f"selm {LONGER} --alpha 0.01",  # ten times the default, and so on
    "selm-alpha0.1": f"selm {LONGER} --alpha 0.1",
    "selm-alpha1": f"selm {LONGER} --alpha 1",
    "bai-gamma0.4": "sea --explore bai --gamma 0.4",
    "bai-anchor0": "sea --explore bai --anchor 0",
}
EVERY = ARMS | BACKBONES | OPEN


def jobs_of(stage: str, arms: list[str] | None, seeds: list[int] | None) -> list[tuple]:
    """(arm, rule, rate, seed) of a stage; the chosen rate where the stage does not search."""
    known = {"rates": EVERY, "backbones": BACKBONES, "open": OPEN}.get(stage, ARMS)
    arms = [arm for arm in known if arm in (arms or known)]
    if stage == "rates":
        found = [(a, RULES[0], r, s) for s in (100, 101, 102) for r in RATES for a in arms]
    elif stage == "claims":
        found = [(a, rule, rate_of(a), s) for rule in RULES for s in range(8) for a in arms]
    else:
        both = ["selm-alpha0.1"]  # of which the second rule was asked, too
        pairs = [(a, rule) for a in arms for rule in (RULES if a in both else RULES[:1])]
        found = [(a, rule, rate_of(a), s) for s in range(5) for a, rule in pairs]
    return [job for job in found if job[3] in (seeds or [job[3]])]


def rate_of(arm: str) -> float:
    """The rate of the largest mean `objective` at the end, over the seeds of the search; none at
    which a run collapsed, and so has no end."""
    ends = defaultdict(dict)  # rate -> seed -> objective of the last row
    for line in (RESULTS / "rates.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["arm"] == arm:
            ends[row["rate"]][row["seed"]] = row["objective"]
    num_seeds = max(map(len, ends.values()))
    means = {r: statistics.mean(e.values()) for r, e in ends.items() if len(e) == num_seeds}
    return max(means, key=means.get)


def command(arm: str, rule: str, rate: float, seed: int, start: Path) -> str:
    script, *own = EVERY[arm].format(start=start).split(" ", 1)
    own += [SEARCH] if seed >= 100 else []
    how = f"--labels {rule} --learning_rate {rate} --seed {seed}"
    return " ".join([script, SHARED, *own, how])


def train(words: str, folder: Path, device: str) -> float:
    """One run to its end, in silence; how many seconds it took."""
    for place in (ROOT, ROOT / "notebooks"):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    os.chdir(ROOT)
    import harness

    import torch

    torch.set_num_threads(1)
    name, *flags = shlex.split(f"{words} --device {device} --output_dir {folder} --overwrite")
    script, began = importlib.import_module(name), time.monotonic()
    parser = harness.Parser(script.Config, allow_abbrev=False)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script.train(script.Config(**vars(parser.parse_args(flags))))
    return round(time.monotonic() - began, 1)


def start_of(runs: Path, rule: str, seed: int) -> Path:
    return runs / f"start-{rule}-{seed}"


def make_start(runs: Path, rule: str, seed: int, device: str) -> None:
    """A policy that has moved; its prompts are others than those of the runs that go on from it."""
    folder = start_of(runs, rule, seed)
    if not (folder / "model").exists():
        train(f"{START} {SHARED} --labels {rule} --seed {seed + 1000}", folder, device)


def run(runs: Path, stage: str, job: tuple, device: str) -> None:
    """One run, unless it is finished: then its folder has a file rows.json."""
    arm, rule, rate, seed = job
    folder = runs / stage / "-".join(map(str, job))
    if (folder / "rows.json").exists():
        return
    seconds = train(command(*job, start_of(runs, rule, seed)), folder, device)
    about = json.loads((folder / "config.json").read_text())
    known = dict(arm=arm, labels=rule, rate=rate, seed=seed, seconds=seconds)
    known |= dict(commit=about["git_commit"], machine=machine(device))
    (folder / "checkpoint.pt").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "rows.json").write_text(json.dumps([known | json.loads(line) for line in lines]))


def machine(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def collect(runs: Path, stage: str) -> None:
    """Write results/STAGE.jsonl: its rows, and in the place of older runs the newest finished ones,
    also where the search has changed an arm's rate since."""

    def run_of(row: dict) -> tuple:
        return tuple(row[key] for key in KEYS[:-1] if key != "rate" or stage == "rates")

    path, known = RESULTS / f"{stage}.jsonl", defaultdict(list)  # run -> its rows
    for line in path.read_text().splitlines() if path.exists() else ():
        known[run_of(json.loads(line))].append(json.loads(line))
    for found in sorted((runs / stage).glob("*/rows.json"), key=lambda p: p.stat().st_mtime):
        rows = json.loads(found.read_text())
        known[run_of(rows[0])] = rows
    rows = sorted(sum(known.values(), []), key=lambda row: [row[key] for key in KEYS])
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def simulate(device: str) -> None:
    """Write results/simulator.jsonl, at the end: three rules for duels on the three backbones, no
    policy in the loop (simulator.py); a row has `accuracy` and `share` after so many labels."""
    os.chdir(ROOT)
    import sea
    from notebooks import simulator

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    rows, where = [], dict(commit=commit.strip(), machine=machine(device))
    places = {"reader": "./tiny/erm_backbone", "oracle": "./tiny/reward_model"}
    for backbone, place in ({"reference": "reference"} | places).items():
        config = sea.Config(erm_backbone=place, device=device)
        posts = simulator.prepare(False, 1024, config), simulator.prepare(True, 256, config)
        for rule, seed in tqdm([*itertools.product(("random", "bai", "best_two"), range(20))]):
            about = dict(backbone=backbone, rule=rule, seed=seed) | where
            found = simulator.simulate(simulator.RULES[rule], seed, *posts)
            for queries, (accuracy, share) in zip(simulator.POINTS, found):
                rows.append(about | dict(queries=queries, accuracy=accuracy, share=share))
    lines = [json.dumps(row) + "\n" for row in rows]
    (RESULTS / "simulator.jsonl").write_text("".join(lines))


def run_all(task: Callable, items: list[tuple], args: argparse.Namespace) -> int:
    """The task for each item, --jobs at once; how many failed, which does not stop the others."""
    num_failed = 0
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        jobs = [pool.submit(task, args.runs, *item, args.device) for item in items]
        for done, item in zip(tqdm(jobs, unit="run"), items):
            if problem := done.exception():
                num_failed += 1
                tqdm.write(f"{item}: {type(problem).__name__}: {problem}")
    return num_failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = ("rates", "claims", "backbones", "open", "simulator")
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--arms", nargs="+", choices=EVERY, metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the protocol")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    parser.add_argument("--collect", action="store_true", help="only write results/ from --runs")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the error of a run that failed is one of common.py's
    if args.stage == "simulator":
        if args.list or args.collect or args.arms or args.seeds:
            parser.error("--stage simulator takes no flag but --device")
        return simulate(args.device)
    if args.collect:
        return collect(args.runs, args.stage)
    todo = jobs_of(args.stage, args.arms, args.seeds)
    if args.list:
        print("\n".join(f"python {command(*job, Path('START'))}" for job in todo))
        return
    moved = [job for job in todo if "{start}" in EVERY[job[0]]]
    starts = sorted({(rule, seed) for _, rule, _, seed in moved})
    num_failed = run_all(make_start, starts, args)
    num_failed += run_all(run, [(args.stage, job) for job in todo], args)
    collect(args.runs, args.stage)
    sys.exit(f"{num_failed} runs failed" if num_failed else 0)


if __name__ == "__main__":
    main()
