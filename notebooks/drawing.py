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
