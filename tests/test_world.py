"""What tiny/ must be, measured on the shipped files."""

import re
from pathlib import Path

import pytest
import torch
from conftest import rows

import common
import harness
from tiny import make

TINY = Path(__file__).resolve().parent.parent / "tiny"
DATA = {name: rows(TINY / f"{name}.jsonl") for name in ("train", "test")}
EVERY = [*DATA["train"], *DATA["test"]]


def words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and gold of four SFT samples of 300 held-out posts, (B, N), and the references'."""
    folders = dict(model=TINY / "sft", dataset=TINY, reward_model=TINY / "reward_model")
    flags = {name: str(folder) for name, folder in folders.items()}
    folder = str(tmp_path_factory.mktemp("world") / "run")
    config = harness.Config(**flags, eval_prompts=300, output_dir=folder)
    task = harness.load(config, None)
    rng = common.generator(0, "world")
    batch = common.respond(task.policy, task.tokenizer, task.held_out, 4, rng, config)
    rewards = task.oracle.score(batch.columns["prompt"], batch.responses)
    facts = zip(batch.responses, batch.columns["facts"], batch.columns["wrong_facts"])
    gold = [[harness.gold_score(text, *kinds) for text in texts] for texts, *kinds in facts]
    return rewards, torch.tensor(gold), torch.tensor(batch.columns["reference_reward"])


def test_make_writes_the_shipped_data_again(tmp_path):
    make.write_data(tmp_path, seed=0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_posts_are_many_and_state_their_facts_and_no_wrong_one():
    assert [len(DATA["train"]), len(DATA["test"])] == [10_000, 1_000]
    assert len({row["prompt"] for row in EVERY}) == 11_000  # no post twice
    for row in EVERY:
        assert row["prompt"].endswith("TL;DR:") and row["reference"] != row["other"]
        assert all(words(fact) in words(row["prompt"]) for fact in row["facts"])
        assert not any(words(fact) in words(row["prompt"]) for fact in row["wrong_facts"])


def test_samples_of_the_start_lose_a_little_and_labels_are_noisy_and_say_something(scored):
    rewards, gold, references = scored
    assert 0.38 <= (rewards > references[:, None]).double().mean().item() <= 0.52
    assert 1.6 <= (rewards[:, 0] - rewards[:, 1]).std().item() <= 2.4
    first, second = torch.combinations(torch.arange(4)).T
    gaps, golden = rewards[:, first] - rewards[:, second], gold[:, first] - gold[:, second]
    agrees = (gaps > 0) == (golden > 0)
    assert agrees[golden.abs() > 1e-4].double().mean().item() >= 0.90
