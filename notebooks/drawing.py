"""What the figures of this repository look like: an arm's colour and marker, bands, maps, arrows.

An arm is a way to choose pairs, such as `sea-bai`: a script and its --explore, --bonus or
--sampler. It has one colour and one marker, in whichever figure it stands.
"""

import itertools
import math
import zlib
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {  # of Okabe and Ito, told apart by the colour-blind too
    "black": "#000000", "vermilion": "#D55E00", "blue": "#0072B2", "green": "#009E73",
    "purple": "#CC79A7", "orange": "#E69F00", "sky": "#56B4E9",
}  # fmt: skip
DASHES = {"o": "-", "s": "--", "^": "-.", "D": ":", "v": "-", "P": "--", "X": "-."}  # by marker
ARMS = {
    "sea-passive": ("black", "o"),
    "sea-bai": ("vermilion", "s"),
    "sea-ee": ("orange", "P"),
    "sea-uncertainty": ("green", "D"),
    "sea-best_two": ("purple", "v"),
    "sea-apl": ("blue", "^"),
    "random_duels-bai": ("sky", "X"),
    "selm-none": ("black", "v"),
    "selm-selm": ("blue", "s"),
    "selm-xpo": ("sky", "D"),
    "pilaf-vanilla": ("black", "^"),
    "pilaf-pilaf": ("green", "s"),
    "pilaf-best_of_n": ("orange", "v"),
    "pilaf-best_of_n_oracle": ("vermilion", "X"),
    "pilaf-hybrid": ("purple", "D"),
}
ALIASES = {  # names of the experiments, where they are not a script and its flag
    "passive": "sea-passive", "sea": "sea-bai", "apl": "sea-apl", "xpo": "selm-xpo",
    "sea-random-duels": "random_duels-bai", "sea-best-two": "sea-best_two",
    "iterative-dpo": "selm-none", "selm-greedy": "selm-selm", "vanilla": "pilaf-vanilla",
    "pilaf": "pilaf-pilaf", "best_of_n": "pilaf-best_of_n", "hybrid": "pilaf-hybrid",
    "best_of_n_oracle": "pilaf-best_of_n_oracle", "random": "random_duels-bai",
    "bai": "sea-bai", "ee": "sea-ee", "uncertainty": "sea-uncertainty",
    "best_two": "sea-best_two",
}  # fmt: skip
OTHERS = [pair for pair in itertools.product(COLOURS, DASHES) if pair not in ARMS.values()]
SIGNED = "RdBu_r"  # a diverging map: white is 0, blue below, red above


def use_style() -> None:
    plt.style.use(Path(__file__).with_name("print.mplstyle"))


def looks(arms: list[str]) -> list[dict[str, Any]]:
    """Colour, marker and dash of each arm: its own if it has one, else one that its name decides
    and that no arm before it has."""
    taken, found = [], []
    for arm in arms:
        start = zlib.crc32(arm.encode()) % len(OTHERS)
        wanted = [ARMS.get(ALIASES.get(arm, arm)), *OTHERS[start:], *OTHERS[:start]]
        taken.append(next(pair for pair in wanted if pair and pair not in taken))
        colour, marker = taken[-1]
        found.append({"color": COLOURS[colour], "marker": marker, "linestyle": DASHES[marker]})
    return found


def look(arm: str) -> dict[str, Any]:
    return looks([arm])[0]


def points(
    runs: list[list[dict]], metric: str, against: str = "queries"
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x, y and one standard error of y at each evaluation, (L,) each, of runs that differ in their
    seed: means over seeds, and the error of that mean; of one run the error that its rows have
    beside the metric (`win_rate_stderr`), or None."""
    runs = [[row for row in rows if metric in row and against in row] for rows in runs]
    num = min(map(len, runs))
    x = np.array([[row[against] for row in rows[:num]] for rows in runs], float)  # (S, L)
    y = np.array([[row[metric] for row in rows[:num]] for rows in runs], float)
    if len(runs) > 1:
        return x.mean(0), y.mean(0), y.std(0, ddof=1) / math.sqrt(len(runs))
    name = f"{metric}_stderr"
    has_error = all(name in row for row in runs[0])
    return x[0], y[0], np.array([row[name] for row in runs[0]]) if has_error else None


def curve(
    axis: Any, runs: list[list[dict]], metric: str, against: str = "queries", **style: Any
) -> None:
    """A metric against labels, or what else the rows have: a point an evaluation, and a band of one
    standard error; where x goes back and forth, a path with arrows instead."""
    x, y, error = points(runs, metric, against)
    if (np.diff(x) < 0).any():
        path(axis, x, y, error, **style)
        return
    axis.plot(x, y, **style)
    if error is not None:
        axis.fill_between(x, y - error, y + error, color=style.get("color"), alpha=0.15, lw=0)


def path(
    axis: Any, x: np.ndarray, y: np.ndarray, error: np.ndarray | None = None, **style: Any
) -> None:
    """Points in the order in which they came, an arrow from each to the next."""
    axis.plot(x, y, **style)
    color = style.get("color", "black")
    for n in range(len(x) - 1):
        arrow = {"arrowstyle": "->", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 2}
        axis.annotate("", (x[n + 1], y[n + 1]), (x[n], y[n]), arrowprops=arrow)
    if error is not None:
        axis.errorbar(x, y, error, color=color, linestyle="", elinewidth=0.8)


def signed_map(axis: Any, values: Any, limit: float, label: str) -> None:
    """Numbers below and above zero as colours, (rows, columns); white is zero."""
    options = {"aspect": "auto", "cmap": SIGNED, "vmin": -limit, "vmax": limit}
    plt.colorbar(axis.imshow(values, **options), ax=axis, label=label)
    axis.grid(False)


# ---------------------------------------------------------------- figures of sea.ipynb


def heads(rewards: Any, first: int, variance: Any, ticks: list[str], head: int, title: str) -> None:
    """Left the heads' rewards (E, N) for one prompt, a row a head, a dot on its favourite; right
    the variance (N,) over heads of P(first wins)."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=[5, 4])
    rows = rewards - rewards.mean(-1, keepdim=True)  # only gaps within a row mean anything
    signed_map(left, rows, 2.5, "reward, mean of the row taken off (logits)")
    left.plot(rows.argmax(-1), range(len(rows)), "o", color="black", markerfacecolor="white")
    left.set(title=title, xlabel="candidate", xticks=range(rows.shape[1]), ylabel="head")
    left.set_yticks([head], [f"{head}, drawn"])
    colours = [COLOURS["sky"] if n == first else "0.75" for n in range(rows.shape[1])]
    right.bar(ticks, variance, color=colours, edgecolor="black")
    right.set(xlabel="candidate", ylabel="Var over heads of P(first wins)", ylim=(0, 0.13))
    plt.show()


def heads_against_oracle(seen: dict[int, Any], oracle: Any) -> None:
    """Mean and standard deviation of the heads' rewards (E, N) against the oracle's (N,), a panel a
    number of labels."""
    _, axes = plt.subplots(1, len(seen), figsize=(9, 3), sharey=True)
    for axis, (num_labels, rewards) in zip(axes, seen.items()):
        rows = rewards - rewards.mean(-1, keepdim=True)
        axis.errorbar(oracle, rows.mean(0), rows.std(0), fmt="o", linestyle="", capsize=2)
        axis.set(title=f"{num_labels} labels", xlabel="the oracle's reward (logits)")
    axes[0].set_ylabel("mean of the heads, and\ntheir standard deviation (logits)")
    plt.show()


def fans(panels: dict[str, Any], grid: Any) -> None:
    """The heads' rewards (E, points) over a line, a panel a title; the truth is 2 x in [-1, 1]."""
    _, axes = plt.subplots(1, len(panels), figsize=(9, 3), sharey=True)
    for axis, (title, rewards) in zip(axes, panels.items()):
        rows = rewards - rewards[:, [len(grid) // 2]]  # against the reward at x = 0
        axis.plot(grid, rows.T, color="0.6", linewidth=0.7, linestyle="-", marker="")
        axis.plot([-1, 1], [-2, 2], color="black", marker="", linewidth=3, label="true reward")
        axis.set(title=title, xlabel="x", ylim=(-9, 9))
    axes[0].set_ylabel("r(x) - r(0) (logits)")
    axes[0].legend()
    plt.show()


def before_and_after(before: Any, after: Any, score: list[int]) -> None:
    """Mean and standard deviation of the heads' rewards (E, N) before and after labels; below a
    candidate stand the duels that it won, minus those lost."""
    places = np.arange(len(score))
    axis = plt.subplots(figsize=(7, 3))[1]
    for shift, label, rewards in ((-0.15, "before", before), (0.15, "after your labels", after)):
        rows = rewards - rewards.mean(-1, keepdim=True)
        options = {"capsize": 2, "linestyle": "", "label": label}
        axis.errorbar(places + shift, rows.mean(0), rows.std(0), **options)
    axis.set_xticks(places, [f"{n}\n{s:+d}" if s else str(n) for n, s in zip(places, score)])
    axis.set_xlabel("candidate, and below it its duels won minus lost")
    axis.set_ylabel("mean of the heads, and their\nstandard deviation (logits)")
    axis.legend()
    plt.show()


def bands(axis: Any, x: Any, arms: dict[str, Any], **labels: str) -> None:
    """Of each arm its mean over seeds, (S, points), with a band of one standard error."""
    for (name, values), style in zip(arms.items(), looks(list(arms))):
        values = np.asarray(values)
        mean, error = values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))
        step = max(1, len(x) // 8)
        axis.plot(x, mean, label=name, markevery=step, **style)
        axis.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.15, lw=0)
    axis.set(**labels)


# ---------------------------------------------------------------- figures of several notebooks


def grouped_bars(
    axis: Any, names: list[str], series: dict[str, Any], digits: str = "", **labels: Any
) -> None:
    """A group of bars a name, one bar a series; the looks are told apart without colour too."""
    fills = [("0.3", ""), ("white", "//"), (COLOURS["sky"], ""), (COLOURS["orange"], "xx")]
    width = 0.8 / len(series)
    for n, ((label, values), (colour, hatch)) in enumerate(zip(series.items(), fills)):
        places = np.arange(len(names)) + width * (n - (len(series) - 1) / 2)
        options = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        bars = axis.bar(places, values, width, label=label, **options)
        if digits:
            axis.bar_label(bars, fmt=digits, fontsize=8)
    axis.set_xticks(range(len(names)), names)
    axis.set(**labels)


def metric_panels(arms: dict[str, list[dict]], metrics: list[str], borders: tuple = ()) -> None:
    """A panel a metric, in it a curve for the run of each arm, against labels; dotted lines at
    `borders`."""
    width = max(6, 3.2 * len(metrics))
    _, axes = plt.subplots(1, len(metrics), figsize=(width, 3), squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for (name, rows), style in zip(arms.items(), looks(list(arms))):
            curve(axis, [rows], metric, label=name, **style)
        for border in borders:
            axis.axvline(border, color="0.5", ls=":", lw=1)
        axis.set(xlabel="labels", ylabel=metric)
    axes[0, 0].legend(fontsize=8)
    plt.show()


# ---------------------------------------------------------------- figures of selm.ipynb


def ranking(names: list[str], scores: Any, picks: Any) -> None:
    """Left the oracle's scores (N,), right how often each text is chosen and rejected by rankings
    whose best and worst are `picks` (n, 2); dots are softmax(scores)."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    left.bar(names, scores, color="0.6", edgecolor="black")
    left.axhline(0, color="0.5", lw=0.8)
    left.set(ylabel="oracle's score", title="scores, without noise")
    shares = {}
    for label, column in zip(("chosen", "rejected"), picks.T):
        shares[label] = [(column == n).double().mean() for n in range(len(names))]
    title = f"{len(picks)} noisy rankings"
    grouped_bars(right, names, shares, ylabel="share of the rankings", title=title, ylim=(0, 0.9))
    places, colour = np.arange(len(names)) - 0.2, COLOURS["vermilion"]
    right.plot(places, scores.softmax(0), "o", color=colour, label="softmax(scores)")
    right.legend(fontsize=8)
    plt.show()


def weights(scaled_margins: Any, dpo: Any, bonuses: dict[float, tuple[float, float]]) -> None:
    """DPO's weight against beta * margin, and of each alpha the bonus's weight and the margin at
    which both are even."""
    axis = plt.subplots(figsize=(6.5, 3))[1]
    axis.plot(scaled_margins, dpo, marker="", color="black", label="DPO: beta sigmoid(-beta m)")
    colours = (COLOURS[name] for name in ("vermilion", "blue", "green"))
    for (alpha, (weight, even)), colour in zip(bonuses.items(), colours):
        axis.axhline(weight, color=colour, ls="--")
        axis.plot(even, weight, "o", color=colour, label=f"alpha = {alpha:g}: even at {even:.2f}")
    axis.set(yscale="log", xlabel="beta * margin", ylabel="weight on a log-probability")
    axis.legend(loc="upper right", fontsize=8)
    plt.show()


def shrinking_noise(sizes: tuple, curves: dict[str, list[float]]) -> None:
    """The bonus's gradient against the number of prompts, of y greedy and sampled."""
    axis = plt.subplots(figsize=(6.5, 3))[1]
    for (kind, values), arm in zip(curves.items(), ("selm-selm", "selm-xpo")):
        axis.plot(sizes, values, label=f"bonus, y: {kind}", **look(arm))
    falling = [curves["sample"][0] * (sizes[0] / size) ** 0.5 for size in sizes]
    axis.plot(sizes, falling, color="0.6", marker="", label="falling as 1 / sqrt(prompts)")
    axis.set(xlabel="prompts in the batch", ylabel="gradient / (alpha beta)", ylim=(0, None))
    axis.legend(fontsize=8)
    plt.show()


def overfitting(history: list[dict], even: float) -> None:
    """Norms of both gradients, and beta times the margin, over steps on the same pairs."""
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8))
    steps = [row["step"] for row in history]
    left.plot(steps, [row["dpo"] for row in history], label="DPO", **look("selm-none"))
    bonus = [row["bonus"] for row in history]
    left.plot(steps, bonus, label="bonus, alpha 0.001, greedy y", **look("selm-selm"))
    left.set(yscale="log", xlabel="steps on the same pairs", ylabel="norm of the gradient")
    gaps = [row["gap"] for row in history]
    right.plot(steps, gaps, color="black", label="beta * margin, mean of the pairs")
    right.axhline(even, color=COLOURS["vermilion"], ls="--", label="even at alpha 0.001")
    right.set(xlabel="steps on the same pairs", ylabel="beta * margin", ylim=(0, 10))
    for axis in (left, right):
        axis.legend(fontsize=8, loc="lower left" if axis is left else "upper left")
    plt.show()


def pushes(panels: dict[str, tuple[Any, dict[str, Any]]], reference: Any) -> None:
    """How a step on the bonus changes log pi of each response: {title: (policy (N,), {kind: change
    (N,)})}; below stand the probabilities of reference and policy."""
    _, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 2.8), sharey=True)
    for axis, (title, (policy, changes)) in zip(np.atleast_1d(axes), panels.items()):
        names = [f"{ref:.2f}\n{now:.2f}" for ref, now in zip(reference, policy)]
        grouped_bars(axis, names, changes, title=title)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xlabel("probability: reference above, policy below")
        axis.tick_params(axis="x", labelsize=8)
    np.atleast_1d(axes)[0].set_ylabel("change of log pi, a unit step")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    plt.show()
