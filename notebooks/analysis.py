"""Read notebooks/results/ and compare arms: means over seeds, differences, sample efficiency.

S seeds, L points of `GRID_OF_LABELS` at which the curves of all arms are read off (linearly between
two evaluations, since rounds end at different numbers of labels).
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
GRID_OF_LABELS = np.arange(0, 2049, 128)

# Two-sided 95 % quantiles of Student's t by degrees of freedom, 1 to 16: seeds are few.
T_QUANTILES = (
    math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
    2.160, 2.145, 2.131, 2.120,
)  # fmt: skip

Runs = dict[int, list[dict]]  # seed -> rows of metrics.jsonl


def load(results: Path = RESULTS) -> dict[str, Runs]:
    """Arm -> seed -> rows, of every file in the folder."""
    arms = {}
    for path in sorted(results.glob("*.jsonl")):
        runs = defaultdict(list)
        for line in path.read_text().splitlines():
            row = json.loads(line)
            runs[row["seed"]].append(row)
        arms[path.stem] = dict(runs)
    return arms


def curves(
    runs: Runs, metric: str, labels: np.ndarray = GRID_OF_LABELS, against: str = "queries"
) -> np.ndarray:
    """A metric of each seed at the given numbers of labels, or of what `against` counts, (S, L)."""
    rows = [[row for row in runs[seed] if metric in row] for seed in sorted(runs)]
    return np.array(
        [np.interp(labels, [r[against] for r in own], [r[metric] for r in own]) for own in rows]
    )


def at(runs: Runs, metric: str, labels: float = math.inf, against: str = "queries") -> np.ndarray:
    """A metric of each seed at one number of labels, by default at the end, (S,)."""
    return curves(runs, metric, np.array([labels]), against)[:, 0]


def so_far(runs: Runs, metric: str, labels: float = math.inf) -> np.ndarray:
    """Mean over the first labels, or all, of a metric that rows hold since the row before, (S,)."""
    means = []
    for seed in sorted(runs):
        queries = [row["queries"] for row in runs[seed]]
        sums = np.cumsum([row[metric] for row in runs[seed][1:]] * np.diff(queries))
        last = min(labels, queries[-1])
        means.append(np.interp(last, queries, [0, *sums]) / last)
    return np.array(means)


def iteration_ends(runs: Runs, num: int) -> list[list[dict]]:
    """Each seed's last row before the first iteration and of each of `num` iterations."""
    own = [runs[seed] for seed in sorted(runs)]
    return [
        [[row for row in rows if row.get("iteration", 0) <= i][-1] for rows in own]
        for i in range(num + 1)
    ]


def mean_and_stderr(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds: (S, ...) -> (...), (...)."""
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


def paired(values: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """Mean difference of two arms, (S,) each, seed by seed, and half the width of its 95 % interval
    by Student's t. With the same seed the random numbers of held-out samples are the same."""
    mean, stderr = mean_and_stderr(values - baseline)
    return float(mean), float(T_QUANTILES[len(values) - 1] * stderr)


def seeds_needed(values: np.ndarray, baseline: np.ndarray) -> float:
    """Seeds with which four of five experiments would tell the observed mean difference, were it
    the true one, from 0 at 95 %: 1.96 + 0.84 standard errors. Infinite if it is 0."""
    gaps = values - baseline
    return math.inf if gaps.mean() == 0 else (2.8 * gaps.std(ddof=1) / gaps.mean()) ** 2


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
    passive: np.ndarray, arm: np.ndarray, labels: np.ndarray = GRID_OF_LABELS, draws: int = 2000
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
    half = T_QUANTILES[len(passive) - 1] * float(np.std(logs))
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


def recovery(
    shifted: np.ndarray, target: np.ndarray, labels: np.ndarray, draws: int = 2000
) -> tuple[float, float, float]:
    """Labels after a shift until an arm's fitted curve, (S, L) from the shift on, reaches the mean
    target, (S,); and the ends of 95 % of bootstrap draws over seeds (of few, so rather too narrow).
    Infinite: not within these labels."""

    def needed(seeds: np.ndarray) -> float:
        fit = fitted(shifted[seeds].mean(0))
        return labels_to(float(target[seeds].mean()), fit, labels) - labels[0]

    num, rng = len(target), np.random.default_rng(0)
    drawn = sorted(needed(rng.integers(num, size=num)) for _ in range(draws))
    low, high = drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]
    return needed(np.arange(num)), low, high


# ------------------------------------------------------------------ tables and curves


def with_stderr(values: np.ndarray, digits: int = 3) -> str:
    """Mean and standard error over seeds, as text; from 100 on without digits after the point."""
    mean, stderr = mean_and_stderr(values)
    digits = 0 if mean >= 100 else digits
    return f"{mean:,.{digits}f} ± {stderr:,.{digits}f}"


def difference_cells(values: np.ndarray, baseline: np.ndarray) -> list[str]:
    """A paired difference with its 95 % interval, and the seeds to tell such a one from 0."""
    gap, half = paired(values, baseline)
    needed = seeds_needed(values, baseline)
    seeds = str(max(2, math.ceil(needed))) if needed < 1000 else "> 1000"
    return [f"{gap:+.3f} ± {half:.3f}", seeds]


def end_table(
    arms: dict[str, Runs],
    names: list[str],
    metrics: list[str],
    baseline: str,
    labels: float = math.inf,
    against: str = "queries",
) -> str:
    """Markdown: metrics at the end, or at a number of labels (or of what `against` counts), mean ±
    standard error over seeds; the first metric also as a paired difference from the baseline with
    its 95 % interval and the seeds it would take to tell such a difference from 0."""
    first = metrics[0]
    head = ["arm", "seeds", *metrics, f"{first}: minus {baseline}", "seeds to tell"]
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|---" * (len(metrics) + 4) + "|")
    for name in (name for name in names if name in arms):
        runs = arms[name]
        values = {metric: at(runs, metric, labels, against) for metric in metrics}
        cells = [name, str(len(runs)), *(with_stderr(values[metric]) for metric in metrics)]
        if name != baseline and sorted(runs) == sorted(arms[baseline]):
            cells += difference_cells(values[first], at(arms[baseline], first, labels, against))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_pair(arms: dict[str, Runs], pair: tuple[str, str]) -> bool:
    """Are there both arms, with the same seeds?"""
    return all(name in arms for name in pair) and sorted(arms[pair[0]]) == sorted(arms[pair[1]])


def difference_table(
    arms: dict[str, Runs], pairs: Iterable[tuple[str, str]], metric: str,
    labels: float = math.inf, read: Callable[..., np.ndarray] = at,
) -> str:  # fmt: skip
    """Markdown: of each (arm, baseline) the metric at a number of labels, or with `so_far` its mean
    over the labels until then, and their difference."""
    head = f"| arm | {metric} | baseline | {metric} | difference, 95 % | seeds to tell |"
    lines = [head, "|---|---|---|---|---|---|"]
    for pair in (pair for pair in pairs if is_pair(arms, pair)):
        values, other = (read(arms[name], metric, labels) for name in pair)
        cells = [pair[0], with_stderr(values), pair[1], with_stderr(other)]
        lines.append("| " + " | ".join(cells + difference_cells(values, other)) + " |")
    return "\n".join(lines)


def efficiency_table(arms: dict[str, Runs], names: list[str], passive: str = "passive") -> str:
    """Markdown: labels to passive's start + 80 % of its gain, passive's over the arm's, and the
    evaluations before the first of the two crossings: below 4 the ratio means nothing."""
    lines = ["| arm | labels to target | passive's / arm's | 95 % interval | evaluations before |"]
    lines.append("|---|---|---|---|---|")
    baseline, seeds = curves(arms[passive], "win_rate"), sorted(arms[passive])
    for name in (name for name in names if sorted(arms.get(name, {})) == seeds):
        found = sample_efficiency(baseline, curves(arms[name], "win_rate"))
        first = min(found["passive_labels"], found["arm_labels"])
        both = (arms[passive][seeds[0]], arms[name][seeds[0]])
        num_before = min(sum(row["queries"] < first for row in rows) for rows in both)
        labels = "never" if found["is_bound"] else f"{found['arm_labels']:.0f}"
        ratio = f"{'below ' * found['is_bound']}{found['ratio']:.2f}"
        interval = "" if found["is_bound"] else f"{found['low']:.2f} to {found['high']:.2f}"
        if interval and found["uncrossed"]:
            interval += f" (too narrow: not reached in {found['uncrossed']:.0%} of draws)"
        lines.append(f"| {name} | {labels} | {ratio} | {interval} | {num_before} |")
    return "\n".join(lines)


def draw(axis: Any, runs: Runs, metric: str, against: str = "queries", **style: Any) -> None:
    """A seed-mean curve with a band of one standard error, against another key of the rows."""
    last = min(max(row["queries"] for row in rows) for rows in runs.values())
    labels = np.linspace(0, last, 17)
    x = curves(runs, against, labels).mean(0)
    mean, stderr = mean_and_stderr(curves(runs, metric, labels))
    (line,) = axis.plot(x, mean, markevery=2, **style)
    axis.fill_between(x, mean - stderr, mean + stderr, color=line.get_color(), alpha=0.15, lw=0)


def draw_differences(
    axis: Any, arms: dict[str, Runs], pairs: dict[str, tuple[str, str]], metric: str,
    labels: float = math.inf, **style: Any,
) -> None:  # fmt: skip
    """A row each {name: (arm, baseline)}: the paired difference and its 95 % interval."""
    found = {
        name: paired(*(at(arms[arm], metric, labels) for arm in pair))
        for name, pair in pairs.items()
        if is_pair(arms, pair)
    }
    gaps, halves = ([values[i] for values in found.values()] for i in (0, 1))
    axis.axvline(0, color="0.6", lw=1)
    axis.errorbar(gaps, list(found), xerr=halves, fmt="o", capsize=3, **style)
    axis.set_ylim(len(found) - 0.5, -0.5)  # the first on top


def figure(
    arms: dict[str, Runs], names: list[str], panels: list[str], against: str = "queries"
) -> None:
    """One panel a metric, in it a curve for each arm that there is."""
    import matplotlib.pyplot as plt

    width = 4.2 * len(panels)
    _, axes = plt.subplots(1, len(panels), figsize=(width, 3.2), squeeze=False)
    for axis, metric in zip(axes[0], panels, strict=True):
        for name in (name for name in names if name in arms):
            draw(axis, arms[name], metric, against, label=name)
        axis.set(xlabel="labels" if against == "queries" else against, ylabel=metric)
    axes[0, 0].legend(fontsize=7)
    plt.show()
