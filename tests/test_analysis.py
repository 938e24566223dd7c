"""Are the numbers of notebooks/compare.ipynb computed rightly? Brute force and known truths."""

import itertools
import json
import math

import analysis
import numpy as np
import pytest
from scipy import stats

LABELS = np.arange(0, 2049, 128)


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


def test_an_equal_arm_has_ratio_one_a_twice_as_fast_one_two_and_one_without_crossing_a_bound():
    passive = np.array([learner(1, seed) for seed in range(5)])
    for speed, low, high in ((1.001, 0, 1), (2, 1, 2)):
        arm = np.array([learner(speed, seed + 100) for seed in range(5)])
        found = analysis.sample_efficiency(passive, arm, LABELS)
        assert found["ratio"] == pytest.approx(round(speed), rel=0.25)
        assert low < found["low"] < high < found["high"] and not found["is_bound"]
    flat = np.array([learner(0, seed) for seed in range(5)])
    found = analysis.sample_efficiency(passive, flat, LABELS)
    assert found["is_bound"] and found["uncrossed"] == 1
    assert found["ratio"] == pytest.approx(found["passive_labels"] / 2048)


def test_labels_that_random_duels_need_over_a_rules_are_read_off_the_mean_curves():
    """Random duels gain 0, 8, 10, 10 at 0, 100, 200, 400 labels: 9 of them at 150."""
    random = np.tile([0.0, 8, 10, 10], (3, 1))
    twice_as_fast = np.tile([0.0, 12, 12, 12], (3, 1))  # 9 at 75 labels
    never = np.zeros((3, 4))
    for own, ratio in ((random, 1), (twice_as_fast, 2), (never, 0)):
        found = analysis.label_ratio(random, own, (0, 100, 200, 400), draws=9)
        assert found == pytest.approx((ratio,) * 3)


def test_the_simulators_table_sets_a_rule_beside_random_duels_on_the_same_backbone(tmp_path):
    shares = {"a": ((0, 8, 10), (0, 10, 10)), "b": ((0, 16, 20), (0, 16, 20))}
    rows = [dict(backbone=b, rule=rule, seed=seed, queries=100 * n, accuracy=0.5, share=share)
            for b, both in shares.items() for rule, curve in zip(("random", "bai"), both)
            for seed in range(2) for n, share in enumerate(curve)]  # fmt: skip
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    table = analysis.simulator_table(tmp_path / "rows").splitlines()[2:]
    assert [line.split("|")[5].split()[0] for line in table] == ["1.00", "1.67", "1.00", "1.00"]


# ---------------------------------------------------------------- verdicts


def runs_of(ends, objectives=None) -> analysis.Runs:
    """Eight seeds, whose gold and objective end with these values."""
    objectives = ends if objectives is None else objectives
    rows = [[{"queries": 0}, {"queries": 9, "gold": gold, "objective": objective}]
            for gold, objective in zip(ends, objectives)]  # fmt: skip
    return dict(enumerate(rows))


def test_the_p_value_of_two_arms_is_that_of_students_t_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 8))
    arms = {"bai": runs_of(one), "passive": runs_of(other)}
    arms["selm"] = {seed: [{"queries": 9, "objective": 0.0}] for seed in range(8)}  # no such metric
    p = analysis.p_value(one.mean() - other.mean(), *analysis.pooled(arms, "gold"))
    assert p == pytest.approx(stats.ttest_ind(one, other).pvalue)
    arms = {"bai": runs_of(one, 9 + other), "passive": runs_of(other, 5 * one)}
    pairs = (one, other), (other + 9, 5 * one)
    own = [stats.ttest_ind(*pair, equal_var=False).pvalue for pair in pairs]
    assert analysis.verdicts(arms)[0]["welch"] == pytest.approx(min(1, 12 * max(own)))


def test_holm_rejects_step_by_step_as_many_as_the_definition_does():
    """The k-th smallest of m is rejected if it and all smaller ones are below level / (m - k)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values, level = list(rng.uniform(size=6) ** 4), rng.uniform(0.01, 0.5)
        rejected = set()
        for k, index in enumerate(np.argsort(p_values)):
            if p_values[index] > level / (8 - k):
                break
            rejected.add(int(index))
        adjusted = analysis.holm(p_values, 8)
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


def test_three_words_for_a_gain_a_loss_and_neither_and_only_for_claims_that_ran_whole():
    noise = np.random.default_rng(0).normal(size=8) * 0.1
    arms = {"bai": runs_of(1 + noise), "passive": runs_of(noise), "random": runs_of(2 - noise)}
    arms |= {"best_two": runs_of(1.01 - noise), "repeated": {0: runs_of([0])[0]}}
    found = {row["claim"]: row["verdict"] for row in analysis.verdicts(arms)}
    assert found.pop(3).startswith("not resolved (detectable: 0.")
    assert found == {1: "supported", 2: "contradicted"}
    for gain in (0.001, -1):  # a gain in gold alone, or at the cost of the objective
        arms = {"bai": runs_of(1 + noise, gain + noise), "passive": runs_of(noise)}
        assert analysis.verdicts(arms)[0]["verdict"].startswith("not resolved")


def test_four_of_five_experiments_find_the_detectable_difference():
    """At the strictest level; a thousand experiments of two arms of a known spread."""
    rng = np.random.default_rng(0)
    arms = {name: runs_of(rng.normal(size=8)) for name in ("bai", "passive")}
    detectable = analysis.verdicts(arms)[0]["detectable"] / analysis.pooled(arms, "gold")[0]
    gaps = rng.normal(size=(2000, 2, 8)) + np.array([detectable, 0])[:, None]
    p_values = stats.ttest_ind(gaps[:, 0], gaps[:, 1], axis=1).pvalue
    assert (p_values < 0.05 / 12).mean() == pytest.approx(0.8, abs=0.05)


def test_a_metric_since_the_last_row_is_averaged_over_labels():
    rows = [{"queries": 0}, {"queries": 10, "online_win_rate": 1.0},
            {"queries": 40, "online_win_rate": 0.0}]  # fmt: skip
    assert analysis.values({0: rows}, "online_win_rate") == pytest.approx([0.25])
