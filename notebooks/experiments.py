"""Run the grid of experiments: every arm, every seed, one process a run, into notebooks/results/.

    python notebooks/experiments.py                          # every arm: many hours
    python notebooks/experiments.py --groups sea --jobs 2
    python notebooks/experiments.py --arms vanilla pilaf --seeds 0 1
    python notebooks/experiments.py --list

Stop it at any moment: what is done is skipped, what was begun is resumed. All arms share the task,
the oracle, the budget of 2,048 labels and the shared hyper-parameters, which are the scripts'
defaults; SELM's learning rate falls from iteration to iteration, as its paper has it. The groups
"anchor", "variants" and "noise" stop at 1,024 labels, where arms that run on can be read off too;
"long" has 8,000, and the larger reward always wins.
A file of results/ holds the rows of metrics.jsonl of all seeds of an arm, with "arm", "seed",
"seconds" (of the whole process, on one thread, with other runs beside it; null if it was resumed),
"commit" and "reward_histogram" of the held-out samples.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"

# Sample efficiency needs four evaluations before a curve crosses its target; here twice as many.
OFTEN = (
    "passive", "sea", "sea-no-synthetic", "apl", "xpo", "offline", "best_of_n_oracle",
    "sea-random-duels", "sea-plain-backbone",
)  # fmt: skip

# Group -> arm -> command. {start} is the folder of the run of the arm "start" with the same seed.
MOVED = "--model {start}/model --ref_model ./tiny/sft"
SHORT = "--num_queries 1024 --eval_every 512"
SELDOM = "--eval_every 512"
GRID = {
    # How the shared learning rate was chosen: on the baseline, on seeds that no result uses.
    "rates": {
        f"passive-rate-{rate}": f"sea.py --explore passive --learning_rate {rate}"
        for rate in ("1e-4", "2e-4", "3e-4", "5e-4", "8e-4")
    },
    "sea": {
        "offline": "sea.py --explore passive --offline",
        "passive": "sea.py --explore passive",
        "apl": "sea.py --explore apl",
        "xpo": "selm.py --bonus xpo --learning_rate_factors 1 1 1",
        "sea": "sea.py",
        "sea-ee": "sea.py --explore ee",
        "sea-uncertainty": "sea.py --explore uncertainty",
        "sea-no-synthetic": "sea.py --gamma 1",
        # beta 0.2 is SEA's for SLiC, and one of the four that it tried for IPO
        "passive-ipo": "sea.py --explore passive --loss ipo --beta 0.2",
        "sea-ipo": "sea.py --loss ipo --beta 0.2",
        "passive-slic": "sea.py --explore passive --loss slic --beta 0.2",
        "sea-slic": "sea.py --loss slic --beta 0.2",
    },
    "selm": {
        "iterative-dpo": "selm.py --bonus none",
        "selm-greedy": "selm.py",
        # Another y is ranked too, so the sampled arm has a baseline of its own.
        "iterative-dpo-sample": "selm.py --bonus none --bonus_response sample",
        "selm-sample": "selm.py --bonus_response sample",
    },
    "pilaf": {
        "pilaf-from-sft": "pilaf.py",
        "start": "pilaf.py --sampler vanilla --num_queries 1024 --num_iterations 1",
        **{
            f"{sampler}{name}": f"pilaf.py --sampler {sampler} {MOVED}{words}"
            for sampler in ("vanilla", "best_of_n", "hybrid", "pilaf")
            for name, words in (("", ""), ("-iterative", " --num_iterations 3"))
        },
    },
    "ceiling": {
        "best_of_n_oracle": "pilaf.py --sampler best_of_n_oracle",
        # As many pairs as the others have labels: as if a pair's 8 scores cost one label.
        "ceiling": "pilaf.py --sampler best_of_n_oracle --num_queries 16384 --eval_every 1024",
    },
    # Is it the choice of duels, or what the backbone knows and the synthetic pairs pass on?
    "why": {
        "sea-random-duels": "notebooks/random_duels.py",
        "sea-plain-backbone": "sea.py --erm_backbone reference",
    },
    # The papers' open questions.
    "gamma": {f"sea-gamma-{gamma}": f"sea.py --gamma {gamma}" for gamma in (0.5, 0.3)},
    "anchor": {
        f"sea-anchor-{anchor}": f"sea.py --anchor {anchor} {SHORT}" for anchor in (0, 0.1, 10)
    },
    "variants": {
        "sea-logit-variance": f"sea.py --bai_variance logit {SHORT}",
        "variant-4": f"sea.py --explore passive --best_of_n 10 {SHORT}",
        "variant-5": f"sea.py --gamma 1 --best_of_n 10 {SHORT}",
        "variant-6": f"sea.py --best_of_n 10 {SHORT}",
        "variant-7": "sea.py --explore ee --gamma 1 --offline --best_of_n 10 --learning_rate 0 "
        + SHORT,
    },
    "noise": {
        f"{arm}-{kind}-{value}": f"notebooks/oracles.py {kind} {value} sea.py{flags} {SHORT}"
        + " --labels argmax" * (kind == "flips")
        for arm, flags in (("sea", ""), ("passive", " --explore passive"))
        for kind, values in (("flips", (0, 0.1, 0.2, 0.3)), ("temperature", (0.5, 2)))
        for value in values
    }
    | {"apl-flips-0": f"sea.py --explore apl --labels argmax {SHORT}"},
    "alpha": {  # (selm.py evaluates at the end of each iteration all the same)
        f"selm-alpha-{alpha}": f"selm.py --alpha {alpha} --eval_every 2048"
        for alpha in (1e-4, 0.01, 0.1, 1)
    },
    "starts": {
        "start-512": "pilaf.py --sampler vanilla --num_queries 512 --num_iterations 1"
        " --eval_every 4096",
        "start-4096": "pilaf.py --sampler vanilla --num_queries 4096 --num_iterations 1"
        " --eval_every 4096",
        # Ten epochs move seeds 100 to 102 by 13 to 26 nats (the paper's policies: 23 to 35). With
        # 40, tried first, nine of ten runs from there stopped: every pair was one text twice.
        "start-overfitted": "pilaf.py --sampler vanilla --num_queries 256 --num_iterations 1"
        " --num_epochs 10 --eval_every 4096",
        "start-collapsed": "pilaf.py --sampler vanilla --num_queries 256 --num_iterations 1"
        " --num_epochs 40 --eval_every 4096",
        **{
            f"{sampler}-from-{start}": f"pilaf.py --sampler {sampler} {SELDOM} "
            + MOVED.replace("{start}", f"{{start-{start}}}")
            for start in ("512", "4096", "overfitted")
            for sampler in ("vanilla", "pilaf")
        },
    },
    "interpolation": {
        "pilaf-weighted": f"pilaf.py --importance_weights {MOVED} {SELDOM}",
        "pilaf-beta-0.3": f"pilaf.py --sampler_beta 0.3 {MOVED} {SELDOM}",
        "pilaf-beta-1": f"pilaf.py --sampler_beta 1 {MOVED} {SELDOM}",
    },
    "long": {
        f"{arm}-long": f"{words} --num_queries 8000 --labels argmax --eval_every 1000"
        for arm, words in (
            ("passive", "sea.py --explore passive"),
            ("sea", "sea.py"),
            ("selm", "selm.py"),
            ("iterative-dpo", "selm.py --bonus none"),  # is what SELM does the bonus's doing?
            ("pilaf", "pilaf.py"),
        )
    },
}
ARMS = {arm: words for group in GRID.values() for arm, words in group.items()}
STARTS = [arm for arm in ARMS if arm.startswith("start")]


def seeds_of(arm: str) -> list[int]:
    """Fixed before looking; of the overfitted start 12 more, after five had been seen."""
    if "overfitted" in arm:
        return list(range(17))
    return [100, 101, 102] if arm in GRID["rates"] else [0, 1, 2, 3, 4]


def folder(runs: Path, arm: str, seed: int) -> Path:
    return runs / f"{arm}-{seed}"


def run(runs: Path, arm: str, seed: int, more: list[str]) -> None:
    """One run to its end, in a process of one thread; RuntimeError with its last words."""
    here = folder(runs, arm, seed)
    if (here / "seconds.json").exists():
        return
    starts = {start: shlex.quote(str(folder(runs, start, seed))) for start in STARTS}
    words = shlex.split(ARMS[arm].format(**starts))
    words += ["--eval_every", "128"] if arm in OFTEN else []
    own_seed = seed + 1000 if arm in STARTS else seed  # what goes on from there sees other prompts
    words += [*more, "--seed", str(own_seed), "--output_dir", str(here)]
    is_begun = (here / "config.json").exists()
    words += ["--resume"] if is_begun else []
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        raise RuntimeError(f"{arm}, seed {seed}: {last[0]}")
    seconds = None if is_begun else round(time.monotonic() - started, 1)
    (here / "seconds.json").write_text(json.dumps(seconds))


def histogram(rewards: list[float]) -> list[int]:
    """Counts in bins half a unit wide, from -4 to 6; what lies beyond is in the first or last."""
    counts = [0] * 20
    for reward in rewards:
        counts[min(19, max(0, math.floor(2 * reward) + 8))] += 1
    return counts


def collect(runs: Path, results: Path, arm: str) -> None:
    """Write results/ARM.jsonl from the finished runs of all seeds."""
    lines = []
    for here in sorted(runs.glob(f"{arm}-[0-9]*"), key=lambda path: int(path.name.split("-")[-1])):
        is_done = (here / "seconds.json").exists()
        if not is_done or not here.name.removeprefix(f"{arm}-").isdigit():
            continue
        about = json.loads((here / "config.json").read_text())
        seconds = json.loads((here / "seconds.json").read_text())
        known = dict(arm=arm, seed=int(here.name.split("-")[-1]), seconds=seconds)
        known["commit"] = about["git_commit"]
        rewards = defaultdict(list)  # labels -> of the held-out samples
        for line in (here / "samples.jsonl").read_text().splitlines():
            sample = json.loads(line)
            rewards[sample["queries"]].append(sample["reward"])
        for line in (here / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            row["reward_histogram"] = histogram(rewards[row["queries"]])
            lines.append(json.dumps(known | row))
    if lines:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{arm}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--groups", nargs="+", choices=GRID, default=list(GRID), metavar="GROUP",
        help=f"of {', '.join(GRID)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, metavar="ARM",
        help="instead of whole groups; --list names them",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of results/")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--flags", default="", help="further flags of every run, in quotes")
    parser.add_argument(
        "--list", action="store_true", help="show the commands of the scripts and stop"
    )
    args = parser.parse_args()
    arms = args.arms or [arm for group in args.groups for arm in GRID[group]]
    if args.list:
        print("\n".join(f"{arm:20} python {ARMS[arm]}" for arm in arms))
        return
    wanted = [start for start in STARTS if any(f"{{{start}}}" in ARMS[arm] for arm in arms)]
    arms = [*(start for start in wanted if start not in arms), *arms]
    todo = [(arm, seed) for arm in arms for seed in args.seeds or seeds_of(arm)]
    stages = [
        [job for job in todo if job[0] in STARTS],
        [job for job in todo if job[0] not in STARTS],
    ]
    failed = []
    with tqdm(total=len(todo), unit="run") as bar, ThreadPoolExecutor(args.jobs) as pool:
        for stage in stages:  # the others begin where a start ends
            jobs = {
                pool.submit(run, args.runs, *job, shlex.split(args.flags)): job for job in stage
            }
            for job in as_completed(jobs):
                bar.update()
                if job.exception():
                    failed.append(str(job.exception()))
                    bar.write(failed[-1])
                else:
                    collect(args.runs, args.results, jobs[job][0])
    sys.exit(f"{len(failed)} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
