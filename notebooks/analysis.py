"""Read notebooks/results/ and judge the claims of notebooks/protocol.md.

    python notebooks/analysis.py        # the tables of compare.ipynb, as text

S seeds, L points of labels at which curves are read off, linearly between two evaluations, since
rounds end at different numbers of labels.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results"
PRIMARY = ("gold", "objective")  # at the end of the budget
CLAIMS = {  # number -> (arm, baseline, metrics in which it must be better)
    1: ("bai", "passive", PRIMARY),
    2: ("bai", "random", PRIMARY),
    3: ("bai", "best_two", PRIMARY),
    4: ("bai", "repeated", PRIMARY),
    5: ("ee", "passive", PRIMARY),
    6: ("bai-only", "passive", PRIMARY),
    7: ("bai-only", "random-only", PRIMARY),
    8: ("bai-only", "best_two-only", PRIMARY),
    9: ("selm", "iterative", PRIMARY),
    10: ("selm-sample", "iterative-sample", PRIMARY),
    11: ("pilaf", "vanilla", PRIMARY),
    12: ("ee", "bai", ("online_win_rate",)),
}
NUM_SEEDS = 8
Runs = dict[int, list[dict]]  # seed -> rows of metrics.jsonl


def load(stage: str, rule: str, results: Path = RESULTS) -> dict[str, Runs]:
    """Arm -> seed -> rows, under one rule of labels."""
    arms, path = defaultdict(lambda: defaultdict(list)), results / f"{stage}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if row["labels"] == rule:
            arms[row["arm"]][row["seed"]].append(row)
    return {arm: dict(runs) for arm, runs in arms.items()}


def values(runs: Runs, metric: str) -> np.ndarray:
    """A metric of each seed, (S,): at the end, or, if rows hold means since the row before as those
    that begin with `online_`, its mean over the whole budget."""
    found = []
    for seed in sorted(runs):
        rows = runs[seed]
        if metric.startswith("online_"):
            weights = np.diff([row["queries"] for row in rows])
            found.append(np.average([row[metric] for row in rows[1:]], weights=weights))
        else:
            found.append(rows[-1][metric])
    return np.array(found)


def curves(runs: Runs, metric: str, labels: np.ndarray) -> np.ndarray:
    """A metric of each seed at the given numbers of labels, (S, L)."""
    own = [[row for row in runs[seed] if metric in row] for seed in sorted(runs)]
    return np.array(
        [np.interp(labels, [r["queries"] for r in rows], [r[metric] for r in rows]) for rows in own]
    )


# ------------------------------------------------------------------ verdicts


def pooled(arms: dict[str, Runs], metric: str) -> tuple[float, int]:
    """Standard deviation over seeds, its square averaged over all arms that have every seed and the
    metric (SELM's have no online win rate), and its degrees of freedom."""
    whole = [runs for runs in arms.values() if len(runs) == NUM_SEEDS]
    whole = [runs for runs in whole if all(metric in rows[-1] for rows in runs.values())]
    groups = [values(runs, metric) for runs in whole]
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom), freedom


def p_value(gap: float, deviation: float, freedom: int) -> float:
    """Two-sided, of a difference of two means of `NUM_SEEDS` values of this standard deviation."""
    return 2 * stats.t.sf(abs(gap) / (deviation * math.sqrt(2 / NUM_SEEDS)), freedom)


def holm(p_values: list[float], num_tests: int) -> list[float]:
    """Holm's adjusted p values of a family of `num_tests`, the others of which are not known yet
    and taken for the largest: then every factor is as large as it can be."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (num_tests - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdicts(arms: dict[str, Runs]) -> list[dict[str, Any]]:
    """A row a claim whose two arms have run whole: the differences, Holm's p, one of three words.
    `detectable`, in the first metric, is what four of five experiments of this size find at the
    strictest of Holm's levels; `welch` is Holm's p by the two arms' own variances (exploratory)."""
    rows = []
    for number, (arm, baseline, metrics) in CLAIMS.items():
        if any(len(arms.get(name, {})) < NUM_SEEDS for name in (arm, baseline)):
            continue
        gaps, p_values, welch = {}, [], []
        for metric in metrics:
            own, other = (values(arms[name], metric) for name in (arm, baseline))
            gaps[metric] = own.mean() - other.mean()
            p_values.append(p_value(gaps[metric], *pooled(arms, metric)))
            welch.append(stats.ttest_ind(own, other, equal_var=False).pvalue)
        deviation, freedom = pooled(arms, metrics[0])
        level = stats.t.isf(0.05 / len(CLAIMS) / 2, freedom) + stats.t.isf(0.2, freedom)
        detectable = level * deviation * math.sqrt(2 / NUM_SEEDS)
        rows.append({"claim": number, "arm": arm, "baseline": baseline, "gaps": gaps})
        rows[-1] |= {"p": max(p_values), "welch": max(welch), "detectable": detectable}
    for row, p in zip(rows, holm([row["welch"] for row in rows], len(CLAIMS))):
        row["welch"] = p
    for row, p in zip(rows, holm([row["p"] for row in rows], len(CLAIMS))):
        signs = {np.sign(gap) for gap in row["gaps"].values()}
        row["holm"], row["verdict"] = p, f"not resolved (detectable: {row['detectable']:.2f})"
        if p < 0.05 and len(signs) == 1:
            row["verdict"] = "supported" if signs == {1} else "contradicted"
    return rows


# ------------------------------------------------------------------ sample efficiency


def isotonic(values: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest to `values` in squares, by pooling neighbours, (L,)."""
    blocks = []  # mean, size
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, n), (right, m) = blocks[-2:]
            blocks[-2:] = [((n * left + m * right) / (n + m), n + m)]
    return np.concatenate([np.full(size, mean) for mean, size in blocks])


def fitted(curve: np.ndarray) -> np.ndarray:
    """A seed-mean curve (L,): isotonic to the maximum of its 3-point running mean, flat after. At
    either end the mean is of two points, so that a curve which still rises is fitted to its end."""
    window = np.ones(3)
    means = np.convolve(curve, window, "same") / np.convolve(np.ones(len(curve)), window, "same")
    fit = isotonic(curve[: means.argmax() + 1])
    return np.concatenate([fit, np.full(len(curve) - len(fit), fit[-1])])


def labels_to(target: float, fit: np.ndarray, labels: np.ndarray) -> float:
    """Labels at which a fitted curve reaches the target, linearly between points; else infinity."""
    if fit[-1] < target:
        return math.inf
    after = int((fit >= target).argmax())
    if after == 0:
        return float(labels[0])
    low, high = fit[after - 1], fit[after]
    return float(labels[after - 1] + (target - low) / (high - low) * np.diff(labels)[after - 1])


def crossings(
    passive: np.ndarray, arm: np.ndarray, labels: np.ndarray, share: float = 0.8
) -> tuple[float, float]:
    """Labels that passive and the arm need, (S, L) each, to reach passive's start plus `share` of
    its fitted gain."""
    fits = fitted(passive.mean(0)), fitted(arm.mean(0))
    target = passive.mean(0)[0] + share * (fits[0][-1] - passive.mean(0)[0])
    return labels_to(target, fits[0], labels), labels_to(target, fits[1], labels)


def sample_efficiency(
    passive: np.ndarray, arm: np.ndarray, labels: np.ndarray, draws: int = 2000
) -> dict[str, float]:
    """Passive's labels to the target over the arm's, with a 95 % interval.

    Win rates (S, L) of both, seed by seed. The interval: a bootstrap over seeds, the same in both
    arms, the target anew in each draw; the standard deviation of the log ratio (times the root of
    S / (S - 1), since a bootstrap's is that much too small) times Student's t.
    An arm that does not reach the target is taken at the last label, so `ratio` is an upper bound
    there (`is_bound`), without an interval; `uncrossed` is the share of draws in which that
    happened: where it is not 0, the interval is too narrow.
    """
    of_passive, of_arm = crossings(passive, arm, labels)
    rng, logs, num_uncrossed = np.random.default_rng(0), [], 0
    for _ in range(draws):
        seeds = rng.integers(len(passive), size=len(passive))
        a, b = crossings(passive[seeds], arm[seeds], labels)
        num_uncrossed += math.isinf(b)
        logs.append(math.log(max(a, 1) / max(1, min(b, labels[-1]))))
    log_ratio = math.log(of_passive / max(1, min(of_arm, labels[-1])))
    half = stats.t.isf(0.025, len(passive) - 1) * float(np.std(logs))
    half *= math.sqrt(len(passive) / (len(passive) - 1))
    return {
        "ratio": math.exp(log_ratio),
        "low": math.exp(log_ratio - half),
        "high": math.exp(log_ratio + half),
        "is_bound": math.isinf(of_arm),
        "uncrossed": num_uncrossed / draws,
        "passive_labels": of_passive,
        "arm_labels": of_arm,
    }


def label_ratio(
    other: np.ndarray, own: np.ndarray, labels: tuple[int, ...], draws: int = 1000
) -> tuple[float, float, float]:
    """How many times as many labels another rule needs as one's own for 90 % of its gain, curves
    (S, L) of both; and the 5 and 95 % quantiles of a bootstrap over seeds. Infinitely many: 0."""

    def ratio(seeds: np.ndarray) -> float:
        curves = [np.maximum.accumulate(arm[seeds].mean(0)) for arm in (other, own)]
        target = curves[0][0] + 0.9 * (curves[0][-1] - curves[0][0])
        needed = [labels_to(target, curve, np.array(labels)) for curve in curves]
        return needed[0] / max(needed[1], 1)

    rng, num = np.random.default_rng(0), len(other)
    found = [ratio(rng.integers(num, size=num)) for _ in range(draws)]
    return ratio(np.arange(num)), *np.quantile(found, (0.05, 0.95))


# ------------------------------------------------------------------ tables


def with_stderr(numbers: np.ndarray) -> str:
    """Mean and standard error over seeds."""
    return f"{numbers.mean():.3f} ± {numbers.std(ddof=1) / math.sqrt(len(numbers)):.3f}"


def verdict_table(arms: dict[str, Runs]) -> str:
    """Markdown: a row a claim."""
    lines = ["| claim | gold | objective | Holm's p | by own variances | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for row in verdicts(arms):
        cells = [f"{gap:+.3f}" for gap in row["gaps"].values()]
        cells = cells if len(cells) == 2 else [f"online win rate {cells[0]}", ""]
        name = f"{row['claim']}. {row['arm']} - {row['baseline']}"
        cells += [f"{row['holm']:.3g}", f"{row['welch']:.3g}", row["verdict"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arm_table(arms: dict[str, Runs]) -> str:
    """Markdown: the end of every arm, means and standard errors over its seeds."""
    metrics = ("gold", "objective", "win_rate", "kl", "length")
    lines = [f"| arm | seeds | rate | {' | '.join(metrics)} | seconds |", "|---" * 9 + "|"]
    for arm, runs in arms.items():
        rows = [rows[-1] for rows in runs.values()]
        cells = [with_stderr(values(runs, metric)) for metric in metrics]
        seconds = np.mean([row["seconds"] for row in rows])
        cells = [arm, str(len(runs)), f"{rows[0]['rate']:g}", *cells, f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def efficiency_table(arms: dict[str, Runs], baseline: str = "passive") -> str:
    """Markdown: how many times as many labels the baseline needs as each arm, and 95 % intervals;
    with evaluations 512 labels apart all crossings are read off between two points. PILAF's arms
    start elsewhere and are left out."""
    lines = ["| arm | in gold | in win rate |", "|---|---|---|"]
    last = max(row["queries"] for rows in arms[baseline].values() for row in rows)
    labels = np.linspace(0, last, 17)
    for arm in [arm for arm in arms if arm not in (baseline, "vanilla", "pilaf")]:
        cells = []
        for metric in ("gold", "win_rate"):
            both = (curves(arms[name], metric, labels) for name in (baseline, arm))
            found = sample_efficiency(*both, labels)
            interval = f" ({found['low']:.2f} to {found['high']:.2f})"
            cells.append(f"{found['ratio']:.2f}" + interval * (not found["is_bound"]))
            cells[-1] = "below " * found["is_bound"] + cells[-1]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table(arms: dict[str, Runs]) -> str:
    """Markdown: mean objective at the end of the search, an arm a row, a rate a column. A rate at
    which a run collapsed, and so has no end, is in brackets: it is not taken."""
    rates = sorted(
        {row["rate"] for runs in arms.values() for rows in runs.values() for row in rows}
    )
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for arm, runs in arms.items():
        ends = defaultdict(dict)  # rate -> seed -> objective of its last row
        for seed, rows in runs.items():
            for row in rows:
                ends[row["rate"]][seed] = row["objective"]
        known = [list(ends[rate].values()) for rate in rates]
        means = [f"{np.mean(objectives):.3f}" for objectives in known]
        num_seeds = max(map(len, known))
        cells = [m if len(own) == num_seeds else f"({m})" for m, own in zip(means, known)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def simulator_table(path: Path = RESULTS / "simulator.jsonl") -> str:
    """Markdown: rules for duels without a policy, by backbone: accuracy and share at the end of the
    budget, and how many times as many labels random duels need, with 90 % intervals."""
    runs = defaultdict(lambda: defaultdict(list))  # (backbone, rule) -> seed -> rows
    for row in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        runs[row["backbone"], row["rule"]][row["seed"]].append(row)
    lines = ["| backbone | rule | accuracy | share | random's labels / own |", "|---" * 5 + "|"]
    for (backbone, rule), seeds in runs.items():
        own, random = (
            np.array([[row["share"] for row in rows] for rows in runs[backbone, name].values()])
            for name in (rule, "random")
        )
        labels = tuple(row["queries"] for row in seeds[0])
        ratio, low, high = label_ratio(random, own, labels)
        cells = [backbone, rule, with_stderr(values(seeds, "accuracy"))]
        cells += [with_stderr(own[:, -1]), f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    print("The search for learning rates\n\n" + rate_table(load("rates", "bernoulli")))
    for rule in ("bernoulli", "argmax"):
        arms = load("claims", rule)
        print(f"\n{rule}\n\n{arm_table(arms)}\n\n{verdict_table(arms)}")
        print("\n" + efficiency_table(arms) if "passive" in arms else "")
    print("\nBackbones\n\n" + arm_table(load("backbones", "bernoulli")))
    print("\n... without a policy\n\n" + simulator_table())


if __name__ == "__main__":
    main()
