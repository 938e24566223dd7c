"""Are the numbers of notebooks/compare.ipynb computed rightly? Brute force and known truths."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import analysis  # noqa: E402

LABELS = analysis.GRID_OF_LABELS


def rows_of(values, **more) -> list[dict]:
    """Rows of metrics, evenly spaced over 2,048 labels."""
    queries = range(0, 2049, 2048 // (len(values) - 1))
    return [dict(queries=q, win_rate=v, gold=2 * v) | more for q, v in zip(queries, values)]


def learner(speed: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, int(speed * 100)])
    curve = 0.44 + 0.3 * (1 - np.exp(-speed * LABELS / 700))
    return curve + 0.012 * rng.normal(size=len(LABELS))


def test_isotonic_is_the_nearest_non_decreasing_sequence():
    """Against all ways to cut five values into blocks of equal fitted value."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, best, nearest = rng.normal(size=5), math.inf, None
        for cuts in itertools.product([False, True], repeat=4):
            ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 5]
            blocks = [values[a:b] for a, b in itertools.pairwise(ends)]
            fit = np.concatenate([np.full(len(block), block.mean()) for block in blocks])
            error = ((fit - values) ** 2).sum()
            if (np.diff(fit) >= 0).all() and error < best:
                best, nearest = error, fit
        assert analysis.isotonic(values) == pytest.approx(nearest)


@pytest.mark.parametrize(
    "curve, fit",
    [([0, 1, 2, 6, 6, 0, 0], [0, 1, 2, 6, 6, 6, 6]),  # means of three are largest at point 3
     ([0, 3, 1, 5, 4, 2, 1], [0, 2, 2, 4.5, 4.5, 4.5, 4.5]),
     ([0, 1, 2, 4], [0, 1, 2, 4])],  # the last two make the largest mean
)  # fmt: skip
def test_a_fit_is_flat_after_the_maximum_of_the_running_mean(curve, fit):
    assert analysis.fitted(np.array(curve, dtype=float)).tolist() == fit


@pytest.mark.parametrize("target, labels", [(0, 0), (0.5, 50), (1, 100), (2, 250), (9, math.inf)])
def test_a_crossing_lies_between_two_points(target, labels):
    fit, grid = np.array([0.0, 1, 1, 3]), np.array([0, 100, 200, 300])
    assert analysis.labels_to(target, fit, grid) == labels


def test_an_arm_that_learns_twice_as_fast_has_ratio_two_and_an_equal_one_ratio_one():
    passive = np.array([learner(1, seed) for seed in range(5)])
    for speed, low, high in ((1.001, 0, 1), (2, 1, 2)):
        arm = np.array([learner(speed, seed + 100) for seed in range(5)])
        found = analysis.sample_efficiency(passive, arm)
        assert found["ratio"] == pytest.approx(round(speed), rel=0.25)
        assert low < found["low"] < high < found["high"] and not found["is_bound"]


def test_an_arm_that_never_reaches_the_target_is_a_bound_without_an_interval():
    arms = {name: {s: rows_of(learner(speed, s)) for s in range(5)}
            for name, speed in (("passive", 1), ("flat", 0))}  # fmt: skip
    curves = [analysis.curves(arms[name], "win_rate") for name in arms]
    found = analysis.sample_efficiency(*curves)
    assert found["is_bound"] and found["uncrossed"] == 1
    assert found["ratio"] == pytest.approx(found["passive_labels"] / 2048)
    cells = analysis.efficiency_table(arms, ["flat"]).splitlines()[2].split(" | ")
    assert cells[1] == "never" and cells[2].startswith("below 0.") and cells[3] == ""


def test_pairs_of_seeds_and_the_seeds_that_would_be_needed():
    values, baseline = np.array([1.0, 2, 3]), np.array([0.0, 2, 1])  # gaps 1, 0, 2
    mean, half = analysis.paired(values, baseline)
    assert mean == 1 and half == pytest.approx(4.303 / math.sqrt(3))
    assert analysis.seeds_needed(values, baseline) == pytest.approx(2.8**2)
    assert analysis.seeds_needed(values, values) == math.inf


def test_the_quantiles_hold_95_percent_of_students_density():
    for freedom, quantile in enumerate(analysis.T_QUANTILES[1:], 1):
        x = np.linspace(-quantile, quantile, 20_001)
        log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        density *= math.exp(log_norm) / math.sqrt(freedom * math.pi)
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-4)


def test_curves_are_read_off_between_evaluations_and_online_metrics_weighted_by_labels(tmp_path):
    rows = [
        dict(seed=1, queries=0, win_rate=0.4),
        dict(seed=1, queries=96, win_rate=0.5, online=0.2),
        dict(seed=1, queries=160, win_rate=0.7, online=0.6),
        dict(seed=0, queries=0, win_rate=0.0),
        dict(seed=0, queries=160, win_rate=0.8, online=1.0),
    ]
    (tmp_path / "arm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = analysis.load(tmp_path)["arm"]
    found = analysis.curves(runs, "win_rate", np.array([0, 128, 256]))
    assert found == pytest.approx(np.array([[0, 0.64, 0.8], [0.4, 0.6, 0.7]]))
    for labels, mean in ((math.inf, (96 * 0.2 + 64 * 0.6) / 160), (128, (96 * 0.2 + 19.2) / 128)):
        assert analysis.so_far(runs, "online", labels) == pytest.approx([1.0, mean])


def test_the_tables_hold_means_standard_errors_and_paired_differences():
    arms = {
        "passive": {s: rows_of(0.4 + 0.02 * s + 0.2 * (LABELS / 2048)) for s in range(3)},
        "arm": {s: rows_of(0.4 + 0.04 * s + 0.6 * (LABELS / 2048)) for s in range(3)},
    }
    arms["other seeds"] = {s + 1: rows for s, rows in arms["arm"].items()}
    lines = analysis.end_table(arms, [*arms, "absent"], ["win_rate", "gold"], "passive")
    passive, arm, other = lines.splitlines()[2:]
    assert passive == "| passive | 3 | 0.620 ± 0.012 | 1.240 ± 0.023 |"
    # gaps .4, .42, .44: mean .42, standard error .02 / sqrt 3, times 4.303
    assert arm == "| arm | 3 | 1.040 ± 0.023 | 2.080 ± 0.046 | +0.420 ± 0.050 | 2 |"
    assert other == "| other seeds | 3 | 1.040 ± 0.023 | 2.080 ± 0.046 |"
    pairs = [("arm", "passive"), ("other seeds", "passive"), ("absent", "arm")]
    lines = analysis.difference_table(arms, pairs, "gold", 1024).splitlines()
    # at half: gold 1.44 + .08 s against 1.04 + .04 s (s = 1 in the middle)
    assert lines[2:] == ["| arm | 1.480 ± 0.046 | passive | 1.040 ± 0.023 | +0.440 ± 0.099 | 2 |"]
    lines = analysis.efficiency_table(arms, ["passive", "arm", "other seeds"]).splitlines()
    # passive's mean goes from .42 to .62: .58 is at 1638.4 labels; the arm's from .44 to 1.04
    assert lines[2] == "| passive | 1638 | 1.00 | 1.00 to 1.00 | 13 |" and len(lines) == 4
    assert lines[3].startswith(f"| arm | 478 | {1638.4 / (0.14 / 0.6 * 2048):.2f}")
