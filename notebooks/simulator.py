"""SEA's choice of duels without a policy, in seconds a run: try your rule (my_rule.py) here first.

    python notebooks/simulator.py --rules random bai ee uncertainty best_two --seeds 10

Posts stay fixed, each with 20 SFT candidates; features and rewards take minutes, once, and stay in
runs/simulator.pt (delete it when a model changes). A run trains the heads of sea.py on a rule's
duels, with noisy labels. Its mean head is measured on other posts: `accuracy`, share of pairs of
candidates that it orders as the oracle does; `share`, reward of its best of 20 minus the mean
candidate's, over what the best one gains. B posts, N candidates a post, E heads, D features.
"""

import argparse
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import harness  # noqa: E402
import sea  # noqa: E402
from notebooks import analysis, drawing  # noqa: E402
from tiny import make  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

Posts = namedtuple("Posts", ("batch", "features", "rewards"))  # (B, N), (B, N, D), (B, N)
POINTS = (0, 32, 64, 128, 256, 384, 512, 768, 1024)  # numbers of labels at which we measure


def duels_of_sea(name: str, batch: common.Batch, rewards: torch.Tensor, rng: object) -> tuple:
    """A rule of sea.py: two candidate numbers a post, (B,) and (B,), from the heads' rewards (E, B,
    N) and from `batch.responses`, a list of N texts a post."""
    is_synthetic = torch.zeros(len(batch), dtype=torch.bool)
    return sea.choose_duels(sea.Config(explore=name), batch, rewards, is_synthetic, rng)


RULES = {n: partial(duels_of_sea, n) for n in "random bai ee uncertainty best_two".split()}


def prepare(is_test: bool, num: int, config: sea.Config) -> Posts:
    """The first posts of a file of tiny/, with candidates, features and rewards."""
    policy, ref_model, tokenizer = harness.load_policies(config)
    backbone, _ = sea.load_ensemble(config, ref_model, tokenizer)
    prompts = harness.load_prompts(config, tokenizer)[is_test].select(torch.arange(num))
    rng = common.generator(config.seed, "simulator", is_test)
    batch = common.respond(policy, tokenizer, prompts, config.num_candidates, rng, config)
    rewards = harness.RewardModelOracle(config).score(batch.columns["prompt"], batch.responses)
    return Posts(batch, sea.read_features(backbone, batch, config), rewards)


def rewards_by_rule(batch: common.Batch, taste: int) -> torch.Tensor:
    """Gold scores (B, N) for annotators who want the kinds of fact that the seed `taste` draws."""
    table = make.write_rows(11_000, 0, make.draw_taste(taste))  # the posts stay those of seed 0
    facts = {row["prompt"]: (row["wanted"], row["wrong"], row["clutter"]) for row in table}
    rows = zip(batch.columns["prompt"], batch.responses)
    return torch.tensor([[harness.gold_score(y, *facts[x]) for y in texts] for x, texts in rows])


def measure(mean: torch.Tensor, rewards: torch.Tensor) -> tuple[float, float]:
    """Accuracy and share of rewards by the mean head, against the oracle's, (B, N) each."""
    gaps, true_gaps = mean[:, ::2] - mean[:, 1::2], rewards[:, ::2] - rewards[:, 1::2]
    agrees = ((gaps > 0) == (true_gaps > 0))[true_gaps != 0]  # equal texts are no pair
    picked = rewards.gather(1, mean.argmax(1, keepdim=True)).mean()
    share = (picked - rewards.mean()) / (rewards.max(1).values.mean() - rewards.mean())
    return agrees.double().mean().item(), share.item()


def simulate(rule: Callable, seed: int, train: Posts, test: Posts) -> list[tuple[float, float]]:
    """Accuracy and share of one run at each of `POINTS`."""
    config, measured = sea.Config(seed=seed), []
    ensemble = sea.EpistemicRewardModel(train.features.shape[-1], config)
    oracle = harness.Oracle(config)  # it draws labels, given the rewards
    order = torch.randperm(len(train.batch), generator=common.generator(seed, "posts"))
    for number, posts in enumerate(order[: POINTS[-1]].split(config.batch_size)):
        batch, features = train.batch.select(posts), train.features[posts]  # (B, N, D)
        ensemble.calibrate(features, common.distinct(batch.responses))
        if oracle.queries in POINTS:
            measured.append(measure(ensemble(test.features).mean(0), test.rewards))
        rng = common.generator(seed, "round", number)
        duels = torch.stack(rule(batch, ensemble(features).detach(), rng), dim=1)  # (B, 2)
        is_first = oracle.prefer([], [], train.rewards[posts].gather(1, duels))  # (B,)
        oracle.queries += len(posts)
        winners = duels.gather(1, torch.stack([~is_first, is_first], dim=1).long())
        ensemble.fit(train.features[posts[:, None], winners], rng)
    return [*measured, measure(ensemble(test.features).mean(0), test.rewards)]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--against", nargs="+", choices=RULES, default=["random"])
    parser.add_argument("--taste", type=int, help="annotators who want other kinds of fact")
    args, config, path = parser.parse_args(words), sea.Config(), ROOT / "runs" / "simulator.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        posts = prepare(False, 1024, config), prepare(True, 256, config)
        torch.save([(vars(batch), *tensors) for batch, *tensors in posts], path)
    posts = [Posts(common.Batch(**state), *tensors) for state, *tensors in torch.load(path)]
    if args.taste is not None:
        posts = [part._replace(rewards=rewards_by_rule(part.batch, args.taste)) for part in posts]
    print(f"mean ± standard error over {args.seeds} seeds, after so many labels:")
    print(" " * 26 + "".join(f"{num:<16}" for num in POINTS))
    found = {}  # rule -> accuracy and share, (S, points, 2)
    for name in args.rules:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        found[name] = runs = np.array([simulate(RULES[name], seed, *posts) for seed in seeds])
        for metric, values in zip(("accuracy", "share"), runs.T):  # (points, S)
            print(f"{name:16}{metric:9}", *[f"{analysis.with_stderr(v):15}" for v in values])
        for other in [rule for rule in args.against if rule in found]:
            ratio, low, high = analysis.label_ratio(found[other][..., 1], runs[..., 1], POINTS)
            print(f"{name:16}{other}'s labels / own: {ratio:.2f}, 90 % {low:.2f} to {high:.2f}")
    drawing.simulated(POINTS, found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
