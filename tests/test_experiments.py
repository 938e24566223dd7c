"""Does the grid of experiments do each run once, and write down what the runs say?"""

import itertools
import math
import shlex
import subprocess
import sys
from pathlib import Path

import common
import harness
import sea

import analysis
import experiments
import my_rule
import own_rules
import pytest
import repeated_pairs
import torch
from conftest import ROOT, make_batch, rows


@pytest.mark.parametrize("arm", experiments.EVERY)
def test_every_arm_of_the_grid_is_taken_by_the_real_parser(monkeypatch, arm):
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(experiments.command(arm, "argmax", 3e-4, 1, Path("tiny")))
    config_class = __import__(name).Config
    parser = harness.Parser(config_class, allow_abbrev=False)
    config = config_class(**vars(parser.parse_args(words)))
    assert (config.labels, config.seed, config.eval_prompts) == ("argmax", 1, 1000)


def test_results_are_the_runs_of_the_protocol_at_the_rates_of_the_search():
    arms = [arm for arm in experiments.EVERY if arm != "ee-only"]  # in no claim, and not run
    collapsed = {("bai-reference", "bernoulli", 6e-4, 102)}
    for name in ("rates", "claims", "backbones", "open"):
        table = rows(experiments.RESULTS / f"{name}.jsonl")
        found = {(row["arm"], row["labels"], row["rate"], row["seed"]) for row in table}
        assert found == {*experiments.jobs_of(name, arms, None)} - collapsed, name


def test_a_rate_at_which_a_run_collapsed_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    ends = [(1, 100, 9), (2, 100, 1), (2, 101, 3), (3, 100, 1), (3, 101, 2)]
    known = dict(arm="bai", labels="argmax")
    table = [known | dict(rate=rate, seed=seed, objective=end) for rate, seed, end in ends]
    (tmp_path / "rates.jsonl").write_text(harness.to_lines(table))
    assert experiments.rate_of("bai") == 2
    found = analysis.rate_table(analysis.load("rates", "argmax", tmp_path))
    assert "| bai | (9.000) | 2.000 | 1.500 |" in found


@pytest.mark.slow
def test_a_run_is_done_once_from_its_start_and_its_rows_are_collected(monkeypatch, tmp_path):
    few = "--num_queries 6 --eval_prompts 4 --max_new_tokens 6 --warmup_steps 0"
    monkeypatch.setattr(experiments, "SHARED", few)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    stale = dict(arm="pilaf", labels="argmax", rate=6e-4, seed=0, queries=3)  # of another search
    (tmp_path / "claims.jsonl").write_text(harness.to_lines([stale]))
    experiments.make_start(tmp_path, "argmax", 0, "cpu")
    for _ in range(2):
        experiments.run(tmp_path, "claims", ("pilaf", "argmax", 3e-4, 0), "cpu")
        experiments.collect(tmp_path, "claims")
        found = rows(tmp_path / "claims.jsonl")
        assert [(row["arm"], row["queries"]) for row in found] == [("pilaf", 0), ("pilaf", 6)]
    own = rows(tmp_path / "claims" / "pilaf-argmax-0.0003-0" / "metrics.jsonl")
    assert own[-1].items() <= found[-1].items() and found[0]["seconds"] == found[1]["seconds"]
    assert found[0]["kl"] != 0  # the start has moved, and the reference is where it was


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path):
    for rate in experiments.RATES:  # folders that hold something else
        (folder := tmp_path / "rates" / f"passive-bernoulli-{rate}-100").mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    code = "import sys, experiments as e, pathlib; e.RESULTS = pathlib.Path(sys.argv[-1]); e.main()"
    words = "--stage rates --arms passive --seeds 100 --jobs 1 --runs".split()
    command = [sys.executable, "-c", code, *words, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT / "notebooks", capture_output=True, text=True)
    assert done.stdout.count("holds no run") == 3 and "3 runs failed" in done.stderr


def test_repeated_pairs_take_seas_number_of_steps_on_passives_labels(flags, monkeypatch):
    flags |= dict(num_queries=400, batch_size=2, burn_in=20, eval_every=1000)
    steps, real = [], common.train_step  # the pairs of each, by what they hold

    def spy(policy, optimizer, pairs, *how):
        steps.append({str(row) for row in zip(pairs.response_ids.tolist(), pairs.responses)})
        return real(policy, optimizer, pairs, *how)

    monkeypatch.setattr(common, "train_step", spy)
    run = repeated_pairs.train(repeated_pairs.Config(**flags))
    of_rounds, num_old = set(), 0
    for before, now in zip([set(), *steps], steps):
        is_old = now <= of_rounds  # all of an extra step's pairs were trained on in rounds before
        num_old += is_old and now != before
        of_rounds |= now
    assert num_old == run.counts.gradient_steps - run.round > 20
    assert run.oracle.queries == 400 and run.parts.get("ensemble") is None
    assert abs(run.counts.gradient_steps - (20 / 2 + 380 / 2 / 0.7)) < 14  # two deviations


def test_my_rule_takes_two_candidates_and_leaves_synthetic_pairs_alone():
    config, rng = sea.Config(), torch.Generator()
    rewards = torch.randn(3, 60, 9, generator=rng.manual_seed(0))
    batch = make_batch([3] * 60, [[2] * 9] * 60)
    is_synthetic = torch.tensor([True, False] * 30)
    found = my_rule.choose_duels(config, batch, rewards, is_synthetic, rng.manual_seed(1))
    own = sea.choose_duels(config, batch, rewards, is_synthetic, rng.manual_seed(1))
    assert torch.equal(torch.stack(found)[:, is_synthetic], torch.stack(own)[:, is_synthetic])
    assert (found[0] != found[1]).all()


def test_our_own_rules_equal_loops_over_every_pair_and_head():
    rewards = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(441))  # (E, 1, N)
    rewards, batch = 2 * rewards[..., [*range(8), 0]], make_batch([3], [[2] * 8])
    batch.responses[0] += batch.responses[0][:1]  # the best one twice
    heads, mean, bits, gains = rewards[:, 0].tolist(), rewards[:, 0, :8].mean(0), {}, {}
    for i, j in itertools.permutations(range(8), 2):
        wins = [1 / (1 + math.exp(r[j] - r[i])) for r in heads]
        p, *each = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (sum(wins) / 4, *wins)]
        bits[i, j], gains[i, j] = p - sum(each) / 4, 0
        for answer in (wins, [1 - p for p in wins]):
            gains[i, j] += max(sum(p * r[n] for p, r in zip(answer, heads)) for n in range(8)) / 4
    own = {name: rule(batch, rewards, torch.Generator()) for name, rule in own_rules.RULES.items()}
    own = {name: tuple(map(int, pair)) for name, pair in own.items()}
    six = max(bits[pair] for pair in itertools.permutations(mean.topk(6).indices.tolist(), 2))
    assert bits[own["information"]] == pytest.approx(max(bits.values())) != pytest.approx(six)
    assert bits[own["information_six"]] == pytest.approx(six)
    assert {*own["disputed_four"]} <= {*mean.topk(4).indices.tolist()}
    assert gains[own["gain"]] == pytest.approx(max(gains.values()))
    assert own["best_and_any"][0] == mean.argmax() == 0 < own["best_and_any"][1] < 8
