"""Does the policy get better? On the shipped world, beyond the error bar; no ranking of methods."""

import json
import math

import sea


def test_512_labels_raise_the_oracles_reward_on_held_out_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(sea.__file__.rsplit("/", 1)[0])
    flags = dict(num_queries=512, eval_every=512, eval_prompts=200, output_dir=str(tmp_path))
    run = sea.train(sea.Config(**flags))
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    before, after = ([s["reward"] for s in samples if s["queries"] == q] for q in (0, 512))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gains) / len(gains)
    spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / len(gains))
    assert mean > 3 * spread / math.sqrt(len(gains)), mean
    assert before != after and len(gains) == 200
