"""What tiny/ must be, measured on the shipped files."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import sea
from common import Batch, gold_score, plain_text
from tiny import make

TINY = Path(__file__).resolve().parent.parent / "tiny"
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
def held_out() -> list[dict]:
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
def samples(held_out) -> list[list[str]]:
    return draw(TINY / "sft", held_out[:NUM_POSTS], NUM_SAMPLES)


def oracle_and_gold(
    rows: list[dict], samples: list[list[str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and gold scores of the samples, (B, N) each."""
    rows = rows[: len(samples)]
    pairs = [(row, text) for row, texts in zip(rows, samples, strict=True) for text in texts]
    prompts, texts = [row["prompt"] for row, _ in pairs], [text for _, text in pairs]
    rewards = score(TINY / "reward_model", prompts, texts)
    gold = [gold_score(text, row["facts"], row["wrong_facts"]) for row, text in pairs]
    shape = (len(samples), len(samples[0]))
    return rewards.view(shape), torch.tensor(gold).view(shape)


@pytest.fixture(scope="module")
def scored(held_out, samples) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_and_gold(held_out, samples)


def agreement(rewards: torch.Tensor, gold: torch.Tensor) -> float:
    """Share of pairs of one post, of different gold, that the oracle orders as gold does."""
    first, second = torch.combinations(torch.arange(rewards.shape[1])).T
    gold_gaps = gold[:, first] - gold[:, second]
    agrees = (rewards[:, first] > rewards[:, second]) == (gold_gaps > 0)
    return agrees[gold_gaps.abs() > 1e-4].double().mean().item()


def win_rate(rows: list[dict], rewards: torch.Tensor) -> float:
    """Share of samples (B, N) that the oracle scores above their post's reference."""
    rows = rows[: len(rewards)]
    prompts, references = ([row[name] for row in rows] for name in ("prompt", "reference"))
    baseline = score(TINY / "reward_model", prompts, references)
    return (rewards > baseline[:, None]).double().mean().item()


def test_the_grammar_is_rich():
    assert make.count_posts() >= 100_000
    assert len(make.TOPICS) >= 6
    assert len(make.DETAILS) + 2 >= 6  # who and deed, and the kinds of detail


def test_the_files_have_their_sizes(train, held_out):
    assert (len(train), len(held_out)) == (10_000, 1_000)
    assert len({row["prompt"] for row in train + held_out}) == 11_000  # no post twice
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6


def test_posts_state_their_facts_and_no_wrong_one(train, held_out):
    for row in train + held_out:
        assert row["prompt"].endswith("TL;DR:")
        assert len(row["facts"]) == 5 and len(row["wrong_facts"]) == 10
        assert all(words(fact) in words(row["prompt"]) for fact in row["facts"]), row
        assert not any(words(fact) in words(row["prompt"]) for fact in row["wrong_facts"]), row


def test_summaries_are_short_and_two(train, held_out):
    for row in train + held_out:
        assert row["reference"] != row["other"]
        for summary in (row["reference"], row["other"]):
            assert 5 <= len(summary.split()) <= 25
            assert summary == summary.strip() and summary[0].isupper()
            assert summary[-1] in ".?" and summary != summary.upper()


def test_the_tokenizer_takes_any_text(tokenizer, held_out):
    assert tokenizer.pad_token is None and tokenizer.eos_token_id == 0
    for text in ("Zyzzyva's naïve 🦙🔥", "\x00\x01 \n\n\t end ", "日本語 \u200b", "", "   ", " x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompts = [row["prompt"] for row in held_out]
    all_ids = tokenizer(prompts)["input_ids"]
    assert tokenizer.batch_decode(all_ids) == prompts
    assert max(map(len, all_ids)) <= 96


def test_sft_samples_lose_a_little_to_people(held_out, scored):
    assert 0.40 <= win_rate(held_out, scored[0]) <= 0.50


def test_the_oracle_agrees_with_gold_on_sft_samples(scored):
    assert agreement(*scored) >= 0.90


def test_labels_are_noisy_and_informative(scored):
    gaps = scored[0][:, 0] - scored[0][:, 1]
    assert 1.6 <= gaps.std().item() <= 2.4


def test_near_best_summaries_are_rare(held_out, scored):
    best = torch.tensor([best_gold(row) for row in held_out[:NUM_POSTS]])
    share = (scored[1] >= best[:, None] - 0.5 - 1e-4).double().mean().item()
    assert 0.001 <= share <= 0.05, share


def test_make_writes_the_same_data_again(tmp_path):
    make.write_data(tmp_path, seed=0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


@torch.no_grad()
def backbone_features(rows: list[dict], samples: list[list[str]]) -> torch.Tensor:
    """Last hidden state of the frozen backbone at each response's last token, (B, N, D)."""
    folder, empty = TINY / "erm_backbone", torch.empty(len(rows), 0)
    backbone = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    prompts = {"prompt": [row["prompt"] for row in rows]}
    return sea.plain_features(
        backbone, tokenizer, Batch(prompts, empty, empty, samples, empty, empty)
    )


def test_the_ensemble_learns_the_oracle_from_the_backbone(train, held_out, samples, scored):
    """As sea.py trains it: rounds of 32 random pairs, noisy labels, mean over three seeds."""
    rows = train[:1024]
    drawn = draw(TINY / "sft", rows, 2)
    features, (rewards, _) = backbone_features(rows, drawn), oracle_and_gold(rows, drawn)
    fresh, fresh_gaps = backbone_features(held_out[:NUM_POSTS], samples), scored[0].diff(dim=1)
    accuracy = {128: [], 992: []}
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows), generator=rng)
        ensemble = sea.EpistemicRewardModel(features.shape[-1], sea.Config(seed=seed))
        ensemble.calibrate(features[order[:32]])
        for labels in range(32, 993, 32):
            picked = order[labels - 32 : labels]
            wins = rewards[picked, 0] - rewards[picked, 1]
            loses = torch.rand(32, generator=rng) > wins.sigmoid()
            columns = torch.stack([loses, ~loses], dim=1).long()  # chosen, rejected
            ensemble.fit(features[picked[:, None], columns], rng)
            if labels in accuracy:
                gaps = ensemble(fresh).mean(0).diff(dim=1)  # (B, N - 1) by the mean head
                accuracy[labels].append(((gaps > 0) == (fresh_gaps > 0)).double().mean().item())
    assert sum(accuracy[128]) / 3 >= 0.60, accuracy
    assert sum(accuracy[992]) / 3 >= 0.75, accuracy


@pytest.mark.slow
def test_the_oracle_agrees_with_gold_on_a_trained_policy(held_out, tmp_path):
    """After passive online DPO for 2,000 labels."""
    folders = dict(model=TINY / "sft", dataset=TINY, reward_model=TINY / "reward_model")
    flags = {name: str(folder) for name, folder in folders.items()}
    flags |= dict(explore="passive", num_queries=2_000, output_dir=str(tmp_path / "run"))
    sea.train(sea.Config(**flags))
    drawn = draw(tmp_path / "run" / "model", held_out[:NUM_POSTS], NUM_SAMPLES)
    rewards, gold = oracle_and_gold(held_out, drawn)
    assert agreement(rewards, gold) >= 0.80


def test_the_training_functions_learn_and_come_out_the_same_twice(train, tokenizer):
    """A few steps of both stages on the first posts: the loss falls, the weights repeat."""
    names = ("prompt", "reference", "other")
    prompts, *pairs = ([row[name] for row in train[:64]] for name in names)
    settings = dict(learning_rate=1e-3, batch_size=16, num_steps=12)

    def loss(judge: transformers.PreTrainedModel) -> float:
        chosen, rejected = (make.rewards(judge, tokenizer, prompts, texts) for texts in pairs)
        return torch.nn.functional.softplus(rejected - chosen).mean().item()

    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        policy = make.small_pythia(tokenizer, num_layers=1, num_matching_heads=0)
        judge = make.small_reward_model(policy, num_layers=1)
        before = loss(judge)
        make.train_sft(policy, tokenizer, prompts, [[text] for text in pairs[0]], **settings)
        make.train_reward_model(judge, tokenizer, prompts, *pairs, **settings)
        assert loss(judge) < before
        weights.append([*policy.parameters(), *judge.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
