"""What tiny/ must be, measured on the shipped files. `TINY_WORLD=FOLDER` measures another folder."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import transformers

from common import Batch, PackedDecoder, generate, gold_score, plain_text
from tiny import make

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(os.environ.get("TINY_WORLD", ROOT / "tiny"))
NUM_POSTS, NUM_SAMPLES = 500, 4


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()]


def words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def best_gold(row: dict) -> float:
    """All five facts and not a word more."""
    return len(row["facts"]) - 0.1 * sum(len(words(fact).split()) for fact in row["facts"])


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return read_rows("train")


@pytest.fixture(scope="module")
def test() -> list[dict]:
    return read_rows("test")


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(TINY / "sft")


@torch.no_grad()
def score(folder: Path, prompts: list[str], responses: list[str]) -> torch.Tensor:
    """Rewards (len(prompts),) by the reward model in `folder`."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    texts = [plain_text(*pair) for pair in zip(prompts, responses, strict=True)]
    parts = [texts[start : start + 100] for start in range(0, len(texts), 100)]
    encoded = [tokenizer(part, padding=True, return_tensors="pt") for part in parts]
    return torch.cat([model(**tokens).logits[:, 0] for tokens in encoded])


def draw(folder: Path, rows: list[dict], num: int) -> list[list[str]]:
    """`num` responses to each row's prompt at temperature 1."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return make.sample_summaries(policy, tokenizer, [row["prompt"] for row in rows], num, seed=9)


@pytest.fixture(scope="module")
def samples(test) -> list[list[str]]:
    return draw(TINY / "sft", test[:NUM_POSTS], NUM_SAMPLES)


def oracle_and_gold(rows: list[dict], samples: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and gold scores of the samples, (B, N) each."""
    pairs = [(row, text) for row, texts in zip(rows, samples, strict=False) for text in texts]
    prompts, texts = [row["prompt"] for row, _ in pairs], [text for _, text in pairs]
    rewards = score(TINY / "reward_model", prompts, texts)
    gold = [gold_score(text, row["facts"], row["wrong_facts"]) for row, text in pairs]
    shape = (len(samples), len(samples[0]))
    return rewards.view(shape), torch.tensor(gold).view(shape)


@pytest.fixture(scope="module")
def scored(test, samples) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_and_gold(test, samples)


def agreement(rewards: torch.Tensor, gold: torch.Tensor) -> float:
    """Share of pairs of one post, of different gold, that the oracle orders as gold does."""
    first, second = torch.combinations(torch.arange(rewards.shape[1])).T
    gold_gaps = gold[:, first] - gold[:, second]
    agrees = (rewards[:, first] > rewards[:, second]) == (gold_gaps > 0)
    return agrees[gold_gaps.abs() > 1e-4].double().mean().item()


def test_the_grammar_is_rich():
    assert make.count_posts() >= 100_000
    assert len(make.TOPICS) >= 6
    assert len(make.DETAILS) + 2 >= 6  # who and deed, and the kinds of detail


def test_the_files_have_their_sizes(train, test):
    assert (len(train), len(test)) == (10_000, 1_000)
    assert len({row["prompt"] for row in train + test}) == 11_000  # no post twice
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6


def test_posts_state_their_facts_and_no_wrong_one(train, test):
    for row in train + test:
        assert row["prompt"].endswith("TL;DR:")
        assert len(row["facts"]) == 5 and len(row["wrong_facts"]) == 10
        assert all(words(fact) in words(row["prompt"]) for fact in row["facts"]), row
        assert not any(words(fact) in words(row["prompt"]) for fact in row["wrong_facts"]), row


def test_summaries_are_short_and_two(train, test):
    for row in train + test:
        assert row["reference"] != row["other"]
        for summary in (row["reference"], row["other"]):
            assert 5 <= len(summary.split()) <= 25
            assert summary == summary.strip() and summary[0].isupper()
            assert summary[-1] in ".?" and summary != summary.upper()


def test_the_tokenizer_takes_any_text(tokenizer, test):
    assert tokenizer.pad_token is None and tokenizer.eos_token_id == 0
    for text in ("Zyzzyva's naïve 🦙🔥", "\x00\x01 \n\n\t end ", "日本語 \u200b", "", "   ", " x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(tokenizer.decode(tokenizer(row["prompt"])["input_ids"]) == row["prompt"] for row in test)
    assert max(len(ids) for ids in tokenizer([row["prompt"] for row in test])["input_ids"]) <= 96


def test_sft_samples_lose_a_little_to_people(test, scored):
    rows = test[:NUM_POSTS]
    prompts, references = ([row[name] for row in rows] for name in ("prompt", "reference"))
    baseline = score(TINY / "reward_model", prompts, references)
    win_rate = (scored[0] > baseline[:, None]).double().mean().item()
    assert 0.40 <= win_rate <= 0.50, win_rate


def test_the_oracle_agrees_with_gold_on_sft_samples(scored):
    assert agreement(*scored) >= 0.90


def test_labels_are_noisy_and_informative(scored):
    gaps = scored[0][:, 0] - scored[0][:, 1]
    assert 1.6 <= gaps.std().item() <= 2.4


def test_near_best_summaries_are_rare(test, scored):
    best = torch.tensor([best_gold(row) for row in test[:NUM_POSTS]])
    share = (scored[1] >= best[:, None] - 0.5 - 1e-4).double().mean().item()
    assert 0.001 <= share <= 0.05, share


def test_make_writes_the_same_data_again(tmp_path):
    make.write_data(tmp_path, seed=0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
