"""Does the policy get better? On the shipped world, beyond the error bar; no ranking of methods."""

import math
from statistics import mean, pstdev

import pytest
from conftest import ROOT, rows
from test_run import SCRIPTS

RUNS = {"sea": dict(num_queries=512), "pilaf": dict(num_queries=1280)}
RUNS["selm"] = dict(num_queries=1536, learning_rate_factors=[1.0] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_labels_raise_the_oracles_reward_on_held_out_prompts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    more = dict(eval_every=4096, output_dir=str(tmp_path / "run"))
    SCRIPTS[name].train(SCRIPTS[name].Config(**RUNS[name], **more))
    samples = rows(tmp_path / "run" / "samples.jsonl")
    last = max(sample["queries"] for sample in samples)
    before, after = ([s["reward"] for s in samples if s["queries"] == q] for q in (0, last))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    assert len(gains) == 256 and mean(gains) > 3 * pstdev(gains) / math.sqrt(256), mean(gains)
