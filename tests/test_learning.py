"""Does the policy get better? On the shipped world, beyond the error bar; no ranking of methods."""

import math
from pathlib import Path

import pilaf
import sea
import selm

import pytest
from conftest import rows

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "sea": (sea, dict(num_queries=512)),
    "selm": (selm, dict(num_queries=1536, learning_rate_factors=[1.0] * 3)),
    "pilaf": (pilaf, dict(num_queries=1280)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_labels_raise_the_oracles_reward_on_held_out_prompts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, flags = RUNS[name]
    script.train(script.Config(**flags, eval_every=4096, output_dir=str(tmp_path / "run")))
    samples = rows(tmp_path / "run" / "samples.jsonl")
    last = max(sample["queries"] for sample in samples)
    before, after = ([s["reward"] for s in samples if s["queries"] == q] for q in (0, last))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gains) / len(gains)
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / len(gains))
    assert len(gains) == 256 and mean > 3 * spread / math.sqrt(len(gains)), mean
