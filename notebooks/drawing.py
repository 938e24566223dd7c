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
from matplotlib.colors import ListedColormap

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
    "bai-only": ("vermilion", "^"),  # without synthetic pairs
    "ee-only": ("orange", "o"),
    "best_two-only": ("purple", "P"),
    "random-only": ("sky", "v"),
    "repeated": ("black", "D"),
    "sea-random": ("sky", "X"),
    "selm-none": ("black", "v"),
    "selm-selm": ("blue", "s"),
    "selm-xpo": ("sky", "D"),
    "iterative-sample": ("black", "P"),
    "selm-sample": ("blue", "v"),
    "pilaf-vanilla": ("black", "^"),
    "pilaf-pilaf": ("green", "s"),
    "pilaf-best_of_n": ("orange", "v"),
    "pilaf-best_of_n_oracle": ("vermilion", "X"),
    "pilaf-hybrid": ("purple", "D"),
}
ALIASES = {  # names of the experiments' arms
    **{name: f"sea-{name}" for name in ("passive", "bai", "ee", "random", "uncertainty", "apl")},
    **{name: f"pilaf-{name}" for name in ("vanilla", "pilaf", "best_of_n", "hybrid")},
    **{"best_two": "sea-best_two", "iterative": "selm-none", "selm": "selm-selm", "sea": "sea-bai"},
}
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


def arms(found: dict[str, dict], names: tuple[str, ...], metrics: tuple[str, ...]) -> None:
    """Metrics against labels, a panel each, of arms that have run: arm -> seed -> rows."""
    panels = plt.subplots(1, len(metrics), figsize=(11, 3.4))[1]
    for axis, metric in zip(panels, metrics):
        for name in [name for name in names if name in found]:
            curve(axis, list(found[name].values()), metric, label=name, **look(name))
        axis.set(xlabel="labels", ylabel=metric)
    panels[0].legend()


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


def simulated(labels: tuple[int, ...], found: dict[str, np.ndarray], path: Path) -> None:
    """Accuracy and share of each rule of the simulator, (S, points, 2), with standard errors."""
    panels = plt.subplots(1, 2, figsize=(10, 4))[1]
    for name, values in found.items():  # (S, points, 2) -> (2, points)
        errors = values.std(0, ddof=1).T / math.sqrt(len(values))
        for axis, mean, error in zip(panels, values.mean(0).T, errors):
            axis.errorbar(labels, mean, error, label=name, capsize=3, **look(name))
    for axis, title in zip(panels, ("accuracy", "share")):
        axis.set(xlabel="labels", title=title)
    panels[0].legend()
    plt.savefig(path, dpi=150)
    print(f"drawn in {path}")


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


# ---------------------------------------------------------------- figures of pilaf.ipynb


def next_token(tokens: list[str], panels: dict[str, dict[str, Any]]) -> None:
    """Probabilities of the next token: {title: {law: probabilities of the tokens}}."""
    _, axes = plt.subplots(1, len(panels), sharey=True, figsize=(9, 3))
    for axis, (title, laws) in zip(axes, panels.items()):
        grouped_bars(axis, tokens, laws, title=title, xlabel="next token")
        axis.tick_params(axis="x", rotation=20)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("probability")
    plt.show()


def histograms(titles: list[str], drawn: dict[str, tuple]) -> None:
    """A panel a title; {law: values (n,) for each panel}. The outermost bars hold the tails."""
    _, axes = plt.subplots(1, len(titles), sharey=True, figsize=(9, 3))
    colours = [COLOURS[name] for name in ("vermilion", "black", "blue")]
    for k, (axis, title) in enumerate(zip(axes, titles)):
        every = np.concatenate([values[k] for values in drawn.values()])
        low, high = np.quantile(every, [0.01, 0.99])
        for style, colour, (name, values) in zip(("-", "--", ":"), colours, drawn.items()):
            look = {"histtype": "step", "linestyle": style, "linewidth": 1.6, "color": colour}
            axis.hist(np.clip(values[k], low, high), np.linspace(low, high, 16), label=name, **look)
        axis.set_xlabel(title)
    axes[0].set_ylabel(f"responses (of {len(every) // len(drawn)})")
    axes[-1].legend()
    plt.show()


def two_laws(scatters: dict[str, tuple], betas: list[float], distances: dict[str, list]) -> None:
    """Left token-wise against exact probabilities, {name: (exact, token-wise)}; right the total
    variation of the two laws against beta."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for (name, (exact, token_wise)), marker in zip(scatters.items(), "ox"):
        left.scatter(exact, token_wise, s=18, label=name, marker=marker)
    left.axline((0.01, 0.01), slope=1, color="0.5", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="exact pi+ and pi-", ylabel="token-wise q+ and q-")
    for name, values in distances.items():
        right.plot(betas, values, label=name)
    right.set(xlabel="beta", ylabel="total variation", ylim=0)
    left.legend()
    right.legend()
    plt.show()


def angles(sizes: list[float], of_laws: dict[str, list[float]]) -> None:
    """Angles to the gradient of J against the residual's size, a line a law of pairs."""
    axis = plt.subplots(figsize=(8, 3.4))[1]
    known = {"PILAF": "pilaf-pilaf", "vanilla": "pilaf-vanilla", "hybrid": "pilaf-hybrid"}
    styles = looks([known.get(name, name) for name in of_laws])
    for (name, values), style in zip(of_laws.items(), styles):
        axis.loglog(sizes, values, label=name, **style)
    axis.set(xlabel="eps, size of the residual", ylabel="angle to the gradient of J (degrees)")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


def weight_histograms(weights: dict[str, Any]) -> None:
    """The base-10 logarithms of pairs' weights (n,), a panel a title."""
    _, axes = plt.subplots(1, len(weights), sharey=True, figsize=(9, 2.8))
    for axis, (title, values) in zip(axes, weights.items()):
        axis.hist(np.clip(np.log10(values), -1, 4), np.linspace(-1, 4, 41), color="0.4")
        axis.set(title=title, xlabel="log10 of the weight", yscale="log")
        axis.set_ylim(bottom=0.5)
    axes[0].set_ylabel(f"pairs (of {len(values)})")
    plt.show()


def reward_against_kl(arms: dict[str, list[dict]]) -> None:
    """Left each arm's way in the plane of KL and reward, with arrows; right its win rate."""
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for (name, rows), style in zip(arms.items(), looks(list(arms))):
        x, y, _ = points([rows], "reward", "kl")
        path(left, x, y, label=name, **style)
        curve(right, [rows], "win_rate", label=name, **style)
    left.set(xlabel="kl to the reference (nats a response)", ylabel="oracle reward")
    right.set(xlabel="labels", ylabel="win rate (band: 1 standard error)", ylim=(0, 1))
    right.legend()
    plt.show()


# ---------------------------------------------------------------- figures of primer.ipynb

INKS = ["white", "#BFDFF2", COLOURS["orange"], COLOURS["blue"], COLOURS["purple"]]


def token_grid(panels: dict[str, tuple], names: list[str], eos: int) -> None:
    """Tokens and masks, (rows, columns) each, a panel a title: padding white, real ones coloured,
    an EOS that was written dark."""
    _, axes = plt.subplots(2, 1, figsize=(9, 6.8), height_ratios=[2.6, 4])
    for kind, (axis, (title, (ids, mask))) in enumerate(zip(axes, panels.items()), 1):
        kinds = np.where((mask == 1) & (ids == eos), 3, kind * mask)  # 0 padding, 3 a real EOS
        options = {"cmap": ListedColormap(INKS[:4]), "vmin": 0, "vmax": 3, "aspect": "auto"}
        axis.imshow(kinds, **options)
        for (row, column), token in np.ndenumerate(np.asarray(ids)):
            ink = ("0.5", "black", "black", "white")[kinds[row, column]]
            style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8}
            axis.text(column, row, names[token], color=ink, **style)
        axis.set(title=f"{title}: padding white, real tokens coloured", ylabel="row")
        axis.set(yticks=range(len(ids)), xticks=range(0, ids.shape[1], 5), xlabel="column")
        axis.grid(False)
    plt.show()


def token_bars(parts: dict[str, tuple[list[str], Any]]) -> None:
    """Log-probabilities of tokens, a panel a part of the row: {title: (tokens, nats)}."""
    widths = [len(tokens) for tokens, _ in parts.values()]
    _, axes = plt.subplots(1, len(parts), figsize=(9, 3.4), width_ratios=widths)
    for axis, (title, (tokens, heights)), ink in zip(axes, parts.items(), INKS[1:]):
        axis.bar(range(len(tokens)), heights, color=ink, edgecolor="0.5")
        axis.set_xticks(range(len(tokens)), tokens, rotation=90)
        axis.set(title=f"{title}: {heights.sum():.1f} nats", xlabel="token")
    axes[0].set(ylabel="log-probability, nats")
    plt.show()


def who_sees_whom(is_visible: Any, block: Any, positions: list[int], tokens: list[str]) -> None:
    """The mask (S, S) of a packed row, coloured by the `block` (S,) of what is seen: the prompt 1,
    the responses 2 and on."""
    axis = plt.subplots(figsize=(8, 8.6))[1]
    seen = np.where(is_visible, block, 0)
    axis.imshow(seen, cmap=ListedColormap(INKS), vmin=0, vmax=len(INKS) - 1)
    places = [f"{position:2d}  {token}" for position, token in zip(positions, tokens)]
    axis.set_xticks(range(len(tokens)), places, rotation=90, fontsize=7)
    axis.set_yticks(range(len(tokens)), tokens, fontsize=7)
    axis.set(xlabel="what may be seen: position id and token", ylabel="who looks")
    edges = np.flatnonzero(np.diff(block)) + 0.5
    for lines in (axis.vlines, axis.hlines):
        lines(edges, -0.5, len(tokens) - 0.5, color="0.5", lw=0.8)
    for n, left in enumerate([-0.5, *edges]):
        axis.text(left, -1, f"y_{n}" if n else "prompt x")
    axis.grid(False)
    plt.show()


def computed_tokens(num: Any, counts: dict[str, Any]) -> None:
    """Tokens computed against the number of responses (N,), a line a layout of the rows."""
    axis = plt.subplots(figsize=(6.5, 3))[1]
    for (words, values), arm, shift in zip(counts.items(), ("pilaf-pilaf", "passive"), (-12, 5)):
        axis.plot(num, values, label=words, markevery=[1, len(num) - 1], **look(arm))
        for n in (1, len(num) - 1):
            place = {"xytext": (-4, shift), "textcoords": "offset points"}
            axis.annotate(int(values[n]), (num[n], values[n]), **place)
    axis.set(xlabel="N, responses to the post", ylabel="tokens computed", ylim=(-120, None))
    axis.set_xticks([2, 5, 10, 15, 20])
    axis.legend()
    plt.show()


def inverted(cumulative: Any, u: float, drawn: int, heights: dict[str, tuple[int, float]]) -> None:
    """A uniform number u picks the token where the cumulative distribution (V,) passes it; {text:
    (token, height)} are written beside the curve."""
    axis = plt.subplots(figsize=(8, 3.6))[1]
    axis.step(range(len(cumulative)), cumulative, where="post", marker="", color="black")
    axis.annotate("", (drawn, 0), (drawn, u), arrowprops={"arrowstyle": "->"})
    axis.plot([0, drawn], [u, u], "--", marker="", label=f"u = {u}")
    for text, (token, height) in heights.items():
        axis.text(token + 10, height, text, va="center")
    axis.set(xlabel="token id, of V", ylabel="cumulative probability", ylim=(0, 1.02))
    axis.legend(loc="lower right")
    plt.show()


def temperatures(tokens: list[str], drawn: dict[float, Any], wanted: dict[float, Any]) -> None:
    """Shares of drawn tokens as bars, the probabilities as dashes, a series a temperature."""
    axis = plt.subplots(figsize=(8, 3))[1]
    grouped_bars(axis, tokens, drawn, ylabel="share of 20,000 draws")
    width = 0.8 / len(drawn)
    for n, values in enumerate(wanted.values()):
        places = np.arange(len(tokens)) + width * (n - (len(drawn) - 1) / 2)
        axis.plot(places, values, "_", color=COLOURS["vermilion"], markersize=9)
    axis.set(xlabel="first token of the summary")
    axis.legend(title="temperature")
    plt.show()


def labels_of_gaps(gaps: Any, marked: dict[int, float]) -> None:
    """Bradley-Terry's curve and the labelled pairs on it; {number: gap} are marked."""
    axis = plt.subplots(figsize=(8, 3.4))[1]
    line = np.linspace(-6, 6, 200)
    label = "sigmoid(r of chosen - r of rejected)"
    axis.plot(line, 1 / (1 + np.exp(-line)), "-", marker="", color="black", label=label)
    options = {"markersize": 9, "color": COLOURS["blue"], "label": "the labelled pairs"}
    axis.plot(gaps, gaps.sigmoid(), "|", **options)
    for number, gap in marked.items():
        height = 1 / (1 + math.exp(-gap))
        axis.plot(gap, height, "o", color="black")
        axis.text(gap - 0.3, height + 0.03, number)
    axis.set(xlabel="oracle reward, chosen minus rejected", ylabel="probability of this label")
    axis.legend(loc="upper left")
    plt.show()


def over_margins(x: dict[str, Any], panels: dict[str, dict[str, Any]], **labels: Any) -> None:
    """Lines over margins or steps, a panel a y-label: {y-label: {line: values}}; x has each line's
    places."""
    _, axes = plt.subplots(1, len(panels), figsize=(8, 3))
    for axis, (title, lines) in zip(axes, panels.items()):
        for (name, values), style in zip(lines.items(), looks(list(lines))):
            step = max(1, len(values) // 6)
            axis.plot(x[name], values, markevery=step, label=name, **style)
        axis.set(ylabel=title, **labels)
    axes[0].legend()
    plt.show()


def two_trainings(panels: dict[str, tuple[list[dict], str]]) -> None:
    """Loss above and implicit rewards below, a column a title: {title: (steps, prefix of keys)}."""
    _, axes = plt.subplots(2, len(panels), figsize=(9, 4.8), sharex=True, sharey="row")
    for (top, low), (title, (steps, prefix)) in zip(axes.T, panels.items()):
        at = [i for i, step in enumerate(steps) if f"{prefix}loss" in step]
        top.plot(at, [steps[i][f"{prefix}loss"] for i in at], color="black")
        for word, arm in (("chosen", "pilaf-pilaf"), ("rejected", "sea-bai")):
            values = [steps[i][f"{prefix}{word}_reward"] for i in at]
            low.plot(at, values, label=word, **look(arm))
        top.axhline(math.log(2), color="0.5", lw=0.8, ls=":", marker="")
        low.axhline(0, color="0.5", lw=0.8, ls=":", marker="")
        top.set(title=title, ylabel="loss")
        low.set(xlabel="gradient step", ylabel="implicit reward")
    axes[1, 0].legend()
    plt.show()
