"""Do SEA's ensemble, its choice of duels and its loop do what the paper and its corrections say?"""

import dataclasses
import itertools
import math
from statistics import mean, stdev, variance

import common
import harness
import sea
from common import Batch
from sea import Config, EpistemicRewardModel, choose_duels

import pytest
import torch
from conftest import make_batch, make_model, plain_token_logps, real_ids
from test_run import Rule
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_loss(gap: float) -> float:
    return math.log1p(math.exp(-gap))


# ---------------------------------------------------------------- the epistemic reward model


def small(num_features: int = 6, hidden: int = 16, num_heads: int = 3, **flags):
    return EpistemicRewardModel(num_features, Config(num_heads=num_heads, **flags), hidden)


def parameters(ensemble: EpistemicRewardModel) -> list[Tensor]:
    return [p.detach().clone() for p in (*ensemble.weights, *ensemble.biases)]


def calibrate(ensemble: EpistemicRewardModel, features: Tensor) -> None:
    ensemble.calibrate(features, torch.ones(features.shape[:2], dtype=torch.bool))


def separate_rewards(ensemble: EpistemicRewardModel, standardised: Tensor) -> Tensor:
    """Rewards (E, B, N) of one network after another, in float64."""
    rewards = []
    w1, w2, w3, b1, b2, b3 = [p.double() for p in parameters(ensemble)]
    for e in range(len(w1)):
        hidden = (standardised.double() @ w1[e] + b1[e]).clamp(min=0)
        hidden = (hidden @ w2[e] + b2[e]).clamp(min=0)
        rewards.append((hidden @ w3[e] + b3[e])[..., 0])
    return torch.stack(rewards)


def test_heads_start_by_lecuns_rule_each_elsewhere_and_elsewhere_with_another_seed():
    ensemble, other = (EpistemicRewardModel(40, Config(seed=seed)) for seed in (0, 1))
    for layer, fan_in in enumerate((40, 128, 128)):
        weight = ensemble.weights[layer]  # (E, fan_in, fan_out)
        assert (weight.std() * fan_in**0.5).item() == pytest.approx(1, abs=0.1)
        assert weight.shape[1] == fan_in and not ensemble.biases[layer].any()
        assert not torch.equal(weight[0], weight[1]) | torch.equal(weight, other.weights[layer])


def test_calibration_waits_for_distinct_neighbours_and_gives_their_gaps_the_spread_prior_std():
    """Equal texts change nothing, at first or later; what hardly varies gets the usual scale."""
    ensemble, features = small(prior_std=3.0), torch.randn(6, 5, 6, generator=stream())
    features = features * torch.tensor([1e-3, 0.02, 1, 3, 9, 50]) + torch.arange(6) * 5 - 9
    before = ensemble(features)
    ensemble.calibrate(features[:, :1].expand(-1, 3, -1), common.distinct([["a", "a ", " a"]] * 6))
    assert torch.equal(ensemble(features), before) and before.isfinite().all()
    calibrate(ensemble, features[:, :1].expand(-1, 3, -1))  # other texts that the encoder confuses
    assert torch.equal(ensemble(features), before)
    texts = ["abcda", "aabcc", "aaaaa", "abcde", "abcde", "abcde"]
    is_distinct = common.distinct([list(row) for row in texts])
    features[~is_distinct] += 1e3
    ensemble.calibrate(features, is_distinct)

    columns = list(zip(*features[is_distinct].tolist()))
    stds = [stdev(column) for column in columns]
    stds[0] = mean(stds)
    standardised = (features.double() - torch.tensor([*map(mean, columns)])) / torch.tensor(stds)
    raw = separate_rewards(small(), standardised)
    pairs = [(b, n) for b in range(6) for n in range(4) if is_distinct[b, n : n + 2].all()]
    variances = [variance((raw[:, b, n] - raw[:, b, n + 1]).tolist()) for b, n in pairs]
    assert len(variances) == 3 + 1 + 0 + 3 * 4
    expected = raw * 3.0 / mean(variances) ** 0.5
    torch.testing.assert_close(ensemble(features).double(), expected, rtol=1e-3, atol=1e-3)
    calibrate(ensemble, features * 7)  # once is for good
    torch.testing.assert_close(ensemble(features).double(), expected, rtol=1e-3, atol=1e-3)


def test_heads_equal_separate_networks_and_the_loss_sums_mean_fits_and_anchors_in_deviations():
    ensemble, features = small(anchor=2.5), torch.randn(9, 4, 6, generator=stream())
    raw = parameters(ensemble)[2]
    calibrate(ensemble, features)
    flat, start, num_labels = features.flatten(0, 1), parameters(ensemble), 50
    for n, parameter in enumerate([*ensemble.weights, *ensemble.biases]):
        parameter.data += torch.randn(parameter.shape, generator=stream(n)) * 0.3
    scale = (start[2] / raw).mean().item()
    sigmas = [6**-0.5, 16**-0.5, scale * 16**-0.5] * 2  # of the weights, and of the biases
    pairs, expected = torch.randn(7, 2, 6, generator=stream(1)), 0.0
    rewards = separate_rewards(ensemble, (pairs - flat.mean(0)) / flat.std(0))
    torch.testing.assert_close(ensemble(pairs).double(), rewards, rtol=1e-4, atol=1e-4)
    for e in range(3):
        expected += mean(log_loss(won - lost) for won, lost in rewards[e].tolist())
        for now, then, sigma in zip(parameters(ensemble), start, sigmas):
            moves = (now[e] - then[e]).flatten().tolist()
            expected += 2.5 / (2 * num_labels) * sum((move / sigma) ** 2 for move in moves)
    assert ensemble.loss(pairs, num_labels).item() == pytest.approx(expected, rel=1e-4)


class Watched(EpistemicRewardModel):  # keeps what its loss was asked
    def loss(self, pairs: Tensor, num_labels: int) -> Tensor:
        self.asked.append((pairs[..., 0].tolist(), num_labels))
        return super().loss(pairs, num_labels)


def test_a_round_takes_five_adam_steps_on_random_minibatches_of_at_most_128_of_all_pairs():
    ensemble, rng = Watched(1, Config(num_heads=3), 8), stream()
    for new, seen in ((0, 0), (40, 40), (160, 200), (0, 200)):
        ids, ensemble.asked = torch.arange(seen - new, seen).float(), []
        before = parameters(ensemble)[2]
        ensemble.fit(torch.stack([ids, -ids], dim=1)[..., None], rng)
        assert len(ensemble.asked) == len({*map(str, ensemble.asked)}) == (5 if seen else 0)
        for pairs, num_labels in ensemble.asked:
            assert num_labels == seen and len({*map(tuple, pairs)}) == min(128, seen)
            assert all(0 <= chosen < seen and rejected == -chosen for chosen, rejected in pairs)
        move = (ensemble.weights[2] - before).abs().max().item()
        assert move == pytest.approx(0.005 if seen else 0, rel=0.3)  # 0.001 a step, at first


def learn(strength: float, to_zero: bool = False) -> tuple[float, float]:
    """Spread (at first 1) and loss of 20 heads on unseen pairs, after 800 steps on 32 labels."""
    rng, ensemble = stream(3), small(8, 32, 20, anchor=strength)
    teacher = torch.randn(8, generator=rng)
    candidates, pairs = (torch.randn(n, 2, 8, generator=rng) for n in (320, 1032))
    gaps = (pairs[:, 0] - pairs[:, 1]) @ (2 * teacher / teacher.norm())
    is_lost = torch.rand(1032, generator=rng) > gaps.sigmoid()
    pairs[is_lost] = pairs[is_lost].flip(1)
    calibrate(ensemble, candidates)
    for tensor in ensemble.start:
        tensor.mul_(0 if to_zero else 1)
    ensemble.num_steps = 800
    ensemble.fit(pairs[:32], rng)
    gaps = -ensemble(pairs[32:]).diff(dim=-1)[..., 0].detach()  # (E, 1000)
    return gaps.var(0).mean().sqrt().item(), mean(map(log_loss, gaps.flatten().tolist()))


def test_the_anchor_at_each_heads_own_start_keeps_heads_apart_where_there_is_no_data():
    """An equal pull to zero makes them collapse, and without an anchor they overfit."""
    (spread, loss), (collapsed, _), (_, free_loss) = learn(1), learn(1, to_zero=True), learn(0)
    assert spread > 1 / 2 and collapsed < 1 / 10
    assert free_loss > math.log(2) > loss + 0.05


# ---------------------------------------------------------------- which pair to compare

NUM_HEADS, NUM_PROMPTS, NUM_CANDIDATES = 5, 60, 6


def texts_batch(texts: list[list[str]]) -> Batch:
    """Texts as a batch, for what reads nothing else."""
    batch = make_batch([1] * len(texts), [[1] * len(texts[0])] * len(texts))
    return dataclasses.replace(batch, responses=texts)


def random_choice(seed: int) -> tuple[Tensor, Batch, Tensor]:
    """Rewards (E, B, N) of heads that agree on half of the prompts, and texts, some repeated."""
    rewards = torch.randn(NUM_HEADS, NUM_PROMPTS, NUM_CANDIDATES, generator=stream(seed))
    rewards[:, ::2] += 3 * torch.randn(NUM_CANDIDATES, generator=stream(seed + 1))
    numbers = torch.randint(9, (NUM_PROMPTS, NUM_CANDIDATES), generator=stream(seed))
    numbers[0] = 0  # one text
    batch = texts_batch([[f"y{n}" + " " * (n % 2) for n in row] for row in numbers.tolist()])
    return rewards, batch, common.distinct(batch.responses)


def most_varied(rewards: Tensor, pairs: list[tuple], is_sigmoid: bool) -> tuple:
    """The pair with the largest variance over heads of its gap, rewards (E, N)."""
    spreads = []
    for i, j in pairs:
        gaps = (rewards[:, i] - rewards[:, j]).tolist()
        spreads.append(variance(math.exp(-log_loss(g)) if is_sigmoid else g for g in gaps))
    return pairs[spreads.index(max(spreads))]


@pytest.mark.parametrize("seed", range(3))
def test_each_rule_for_a_duel_equals_brute_force(seed):
    """`ee` takes the first redrawn head that disagrees, else the second best of the first's own."""
    rewards, _, is_distinct = random_choice(seed)
    heads, *redraws = torch.randint(NUM_HEADS, (1 + NUM_HEADS, NUM_PROMPTS), generator=stream(seed))
    first = sea.thompson_first(rewards, heads, is_distinct)
    bai = [sea.second_bai(rewards, first, is_distinct, name) for name in ("logit", "sigmoid")]
    agreed = sea.second_bai(rewards[:1].expand(2, -1, -1), first, is_distinct, "sigmoid")
    by_ee = sea.second_ee(rewards, first, heads, torch.stack(redraws), is_distinct)
    uncertain = torch.stack(sea.most_uncertain_pair(rewards, is_distinct), dim=1)
    num_clashes = 0  # prompts where all redrawn heads agree
    for b in range(NUM_PROMPTS):
        choices = is_distinct[b].nonzero()[:, 0].tolist()
        ranks = [sorted(choices, key=lambda n: -reward[n]) for reward in rewards[:, b]]
        own = ranks[heads[b]]
        assert first[b] == own[0]
        duels = [(own[0], n) for n in own[1:]] or [(own[0], own[0])]
        assert (own[0], agreed[b]) in duels  # heads that agree learn from no duel; it is one
        for is_sigmoid, second in enumerate(bai):
            assert second[b] == most_varied(rewards[:, b], duels, is_sigmoid)[1]
        others = [ranks[head[b]][0] for head in redraws if ranks[head[b]][0] != own[0]]
        assert by_ee[b] == (others[0] if others else own[:2][-1])
        num_clashes += not others
        pairs = list(itertools.combinations(choices, 2)) or [(0, 0)]
        assert tuple(sorted(uncertain[b].tolist())) == most_varied(rewards[:, b], pairs, False)
    assert 0 < num_clashes < NUM_PROMPTS


@pytest.mark.parametrize("explore", Config.__annotations__["explore"].__args__)
@pytest.mark.parametrize("variance", ["sigmoid", "logit"])
def test_each_arm_has_its_rule_and_a_synthetic_pair_is_a_heads_best_and_worst(explore, variance):
    rewards, batch, is_distinct = random_choice(4)
    config = Config(explore=explore, bai_variance=variance)
    own = rewards[:1] if explore == "apl" else rewards
    which = (torch.arange(NUM_PROMPTS) % 3 == 0) & torch.tensor(config.gamma < 1)
    (first, second), again = (choose_duels(config, batch, own, which, stream()) for _ in range(2))
    assert torch.equal(second, again[1])  # nothing is drawn from a stream without a seed
    widest = [common.widest_pair(reward, is_distinct) for reward in own]
    is_best = [torch.stack([best == n for best, _ in widest]).any(0) for n in (first, second)]
    is_widest = torch.stack([(best == first) & (worst == second) for best, worst in widest]).any(0)
    others = is_distinct.scatter(1, first[:, None], False)
    best_of_others = own.masked_fill(~others, -99).argmax(-1)  # (E, B)
    uncertain = sea.most_uncertain_pair(rewards, is_distinct)
    sums = rewards.sum(0).masked_fill(~is_distinct, -99)  # (B, N)
    next_distinct = [([n for n, is_new in enumerate(row) if is_new and n] or [1])[0]
                     for row in is_distinct.tolist()]  # fmt: skip
    is_right = {
        "bai": is_best[0] & (second == sea.second_bai(rewards, first, is_distinct, variance)),
        "ee": is_best[0] & (best_of_others == second).any(0),
        "uncertainty": (first == uncertain[0]) & (second == uncertain[1]),
        "best_two": (sums.gather(1, torch.stack([first, second], 1)) == sums.topk(2)[0]).all(1),
        "random": (first == 0) & (second == torch.tensor(next_distinct)),
        "passive": (first == 0) & (second == 1),
        "apl": is_widest,
    }
    assert torch.where(which, is_widest, is_right[explore]).all()


@pytest.mark.parametrize("is_synthetic", [False, True])
def test_each_prompt_draws_its_own_head_and_each_head_as_often(is_synthetic):
    rewards = torch.eye(4)[:, None].expand(-1, 4000, -1)  # head e likes candidate e best
    batch, which = texts_batch([["a", "b", "c", "d"]] * 4000), torch.tensor([is_synthetic] * 4000)
    first, second = choose_duels(Config(explore="ee"), batch, rewards, which, stream())
    assert (first.bincount() / 4000 - 0.25).abs().max() < 0.03  # 4 standard errors
    assert (first[1:] == first[:-1]).double().mean().item() == pytest.approx(0.25, abs=0.03)
    # A head's worst is the first of the zeros; four redraws all find the first's head 1 in 4^4.
    share = (second == (first == 0).long()).double().mean().item()  # of the first of the others
    assert share == pytest.approx(1 if is_synthetic else 1 / 3 + 2 / 3 / 4**4, abs=0.03)
    assert (first != second).all()


def test_apl_keeps_the_prompts_of_highest_entropy_with_their_implicit_rewards():
    policy, ref_model = (make_model(AutoModelForCausalLM, "gpt_neox", seed) for seed in (0, 1))
    batch = make_batch([4, 7, 5, 3, 6], [[8, 8, 1], [7, 7, 7], [4, 4, 4], [1, 1, 2], [9, 2, 1]])
    config = Config(explore="apl", beta=0.3, batch_size=2, micro_batch_size=4)
    kept, implicit_rewards = sea.keep_uncertain(batch, policy, ref_model, config)
    with torch.no_grad():
        logps, ref_logps = (plain_token_logps(m, batch).sum(-1) for m in (policy, ref_model))
    entropies = {b: -mean(row) for b, row in enumerate(logps.tolist())}
    numbers = [batch.columns["prompt"].index(prompt) for prompt in kept.columns["prompt"]]
    assert numbers == sorted(entropies, key=entropies.get)[:-3:-1]
    assert [real_ids(kept, n, 1) for n in (0, 1)] == [real_ids(batch, b, 1) for b in numbers]
    expected = 0.3 * (logps - ref_logps)[numbers][None]
    torch.testing.assert_close(implicit_rewards, expected, rtol=1e-4, atol=1e-4)
    assert not implicit_rewards.requires_grad


def last_third_regret(seed: int) -> float:
    """Regret a duel, r(best) - (r(first) + r(second)) / 2, of 16 prompts in 5 of 15 rounds."""
    world, rng, regrets = stream(seed), stream(100 + seed), []
    weight = torch.randn(32, generator=world)
    batch, nothing = texts_batch([[*map(str, range(20))]] * 16), torch.zeros(16).bool()
    ensemble, config = small(32, 32, 20, seed=seed), Config(explore="ee")
    for _ in range(15):
        features = torch.randn(16, 20, 32, generator=world)
        coins, rewards = torch.rand(16, generator=world), features @ (2 * weight / weight.norm())
        calibrate(ensemble, features)
        guess = ensemble(features).detach()
        duel = torch.stack(choose_duels(config, batch, guess, nothing, rng), 1)  # (16, 2)
        won, lost = rewards.gather(1, duel).T
        regrets.append((rewards.max(-1).values - (won + lost) / 2).mean().item())
        is_lost = coins > (won - lost).sigmoid()
        duel[is_lost] = duel[is_lost].flip(1)
        ensemble.fit(features[torch.arange(16)[:, None], duel], rng)
    return mean(regrets[10:])


def test_thompson_sampling_learns_a_bandit_that_random_duels_do_not():
    """It shows learning, not that exploration pays: the mean head's best two do as well here."""
    regrets = [last_third_regret(seed) for seed in range(8)]
    random = 2 * 1.867  # of random duels: 2 times the best of 20 normals, on average
    assert mean(regrets) < 0.65 * random and max(regrets) < 0.8 * random


# ---------------------------------------------------------------- features, losses, metrics


@torch.no_grad()
def plain_features(backbone: nn.Module, batch: Batch) -> Tensor:
    """Means over response tokens (B, N, D), from one unpacked forward a response."""
    means = []
    for b, n in itertools.product(*map(range, batch.response_mask.shape[:2])):
        prompt, response = real_ids(batch, b, n)
        states = backbone(torch.tensor([prompt + response])).last_hidden_state[0]
        means.append(sum(states[len(prompt) :]) / len(response))
    return torch.stack(means).view(*batch.response_mask.shape[:2], -1)


def test_ipo_is_on_means_over_tokens_and_the_other_losses_on_sums():
    logps, ref_logps = torch.tensor([[-6.0, -9.0]]), torch.tensor([[-10.0, -9.5]])
    part = make_batch([3], [[2, 5]])  # the margin of sums is 4 - 0.5, of means 2 - 0.1
    expected = {"dpo": log_loss(0.25 * 3.5), "ipo": (1.9 - 2) ** 2, "slic": 1 - 0.25 * 3.5}
    values = [sea.pair_loss(Config(loss=n, beta=0.25), logps, ref_logps, part) for n in expected]
    assert torch.cat(values).tolist() == pytest.approx(list(expected.values()), abs=1e-6)


def test_head_metrics_equal_a_loop():
    rewards = torch.randn(4, 9, 5, generator=stream()) * 2
    chances = [[(head[b, 0] - head[b, 1]).sigmoid().item() for head in rewards] for b in range(9)]
    found = {"ensemble_disagreement": pytest.approx(mean(map(stdev, chances)))}
    assert sea.head_metrics(rewards) == found


# ---------------------------------------------------------------- the loop and the flags


def train(flags: dict, **more) -> harness.Run:
    own = dict(num_candidates=4, num_heads=4, burn_in=4, eval_every=1000, erm_backbone="reference")
    config = Config(**flags | own | more)
    return sea.train(config, Rule(config))


def from_disk(run: harness.Run) -> tuple[bool, list[Batch]]:
    """Is the policy --model as it is on the disk? And what that one draws in each round."""
    config, batches = run.config, []
    model, _, tokenizer = harness.load_policies(config)
    prompts, _ = harness.load_prompts(config, tokenizer)
    for number in range(run.round):
        batch = harness.next_prompts(prompts, number * 4, 4, config.seed)
        rng = common.generator(config.seed, "round", number)
        batches.append(common.respond(model, tokenizer, batch, 4, rng, config))
    pairs = zip(model.parameters(), run.parts["policy"].parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs), batches


def test_synthetic_pairs_are_a_heads_own_and_reach_neither_oracle_nor_heads(flags, monkeypatch):
    monkeypatch.setattr(sea.EpistemicRewardModel, "num_steps", 0)  # a round: the heads stay
    name = f"{flags['dataset']}/erm_backbone"
    run = train(flags, learning_rate=0.0, gamma=0.4, temperature=0.1, erm_backbone=name)
    backbone, ensemble = AutoModel.from_pretrained(name), run.parts["ensemble"]
    pairs, data, duels, (is_same, batches) = run.rows["preferences"], [], [], from_disk(run)
    for number, batch in enumerate(batches):
        features, is_distinct = plain_features(backbone, batch), common.distinct(batch.responses)
        for pair in [row for row in pairs if row["round"] == number]:
            b = batch.columns["prompt"].index(pair["prompt"])
            duel = [batch.responses[b].index(pair[name]) for name in ("chosen", "rejected")]
            if pair["source"] == "oracle":
                data.append(features[b, duel])
                duels.append((pair["prompt"], {batch.responses[b][n].strip() for n in duel}))
            else:
                rewards = ensemble(features[[b]])  # (E, 1, N)
                assert tuple(duel) in [common.widest_pair(r, is_distinct[[b]]) for r in rewards]
    assert len(pairs) - len(data) == run.counts.synthetic_pairs >= 4 and len(data) == 12 and is_same
    first = plain_features(backbone, batches[0])[common.distinct(batches[0].responses)]
    torch.testing.assert_close(ensemble.mean, first.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ensemble.pairs, torch.stack(data), rtol=1e-4, atol=1e-4)
    assert [(x, {*y}) for x, y in run.oracle.asked] == duels and len(first) < 16


@pytest.mark.parametrize("offline", [True, False])
def test_offline_samples_come_from_the_reference_which_stays_else_from_the_policy(offline, flags):
    run = train(flags, offline=offline, learning_rate=0.01, gamma=1.0)
    is_same, batches = from_disk(run)
    texts = [dict(zip(batch.columns["prompt"], batch.responses)) for batch in batches]
    for pair in run.rows["preferences"]:
        is_drawn = {pair["chosen"], pair["rejected"]} <= {*texts[pair["round"]][pair["prompt"]]}
        assert is_drawn == (offline or pair["round"] == 0)
    assert run.round == 3 and not is_same and abs(run.rows["metrics"][-1]["chosen_reward"]) > 0.01


def test_the_budget_is_hit_exactly_and_gamma_shares_the_prompts_from_the_burn_in_on(flags):
    run = train(flags, gamma=0.6, burn_in=10, num_queries=77, eval_prompts=1)
    given, shares = 0, []
    for _, pairs in itertools.groupby(run.rows["preferences"], key=lambda pair: pair["round"]):
        is_asked = [pair["source"] == "oracle" for pair in pairs]
        assert given >= 10 or all(is_asked)
        shares += is_asked if given >= 10 else []
        given += sum(is_asked)
    assert run.oracle.queries == len(run.oracle.asked) == given == 77 and len(shares) > 90
    assert abs(mean(shares) - 0.6) < 3 * math.sqrt(0.24 / len(shares))


def test_rounds_that_asked_nothing_do_not_stop_a_run(flags):
    more = dict(batch_size=2, burn_in=1, num_queries=4)
    run = train(flags, **more, gamma=0.02, checkpoint_every=1000)
    asked = [pair["round"] for pair in run.rows["preferences"] if pair["source"] == "oracle"]
    assert len(asked) == 4 and max(b - a for a, b in itertools.pairwise(asked)) > 21


@pytest.mark.parametrize("explore, num_prompts", [("passive", 4), ("apl", 16)])
def test_heads_for_best_of_n_change_none_of_a_baselines_duels(explore, num_prompts, flags):
    more = dict(explore=explore, num_candidates=2, num_heads=None, overwrite=True)
    plain, best = (train(flags, **more, best_of_n=n) for n in (0, 2))
    assert plain.rows["preferences"] == best.rows["preferences"]
    assert plain.counts.candidates == 2 * num_prompts * plain.round
    assert "best_of_n_win_rate" in best.rows["metrics"][-1] and "ensemble" not in plain.parts


def test_best_of_n_metrics_are_of_the_mean_heads_best_sample_at_temperature_1(flags):
    config = Config(**flags | dict(best_of_n=5, temperature=0.01, eval_prompts=10))
    task, ensemble = harness.load(config, Rule(config)), small(32, 8)
    backbone = make_model(AutoModel, "gpt_neox", 4)
    metrics = sea.best_of_n_metrics(task, config, backbone, ensemble)
    models, rng = (task.policy, task.tokenizer), common.generator(config.seed, "best of n")
    batch = common.respond(*models, task.held_out, 5, rng, config, temperature=1.0)
    sums = ensemble(plain_features(backbone, batch)).sum(0).tolist()
    texts = [row[own.index(max(own))] for row, own in zip(batch.responses, sums)]
    rewards = task.oracle.score([""] * 10, [[text] for text in texts])[:, 0]
    expected = harness.win_metrics(rewards, torch.tensor(task.held_out.columns["reference_reward"]))
    expected["reward"] = mean(rewards.tolist())
    assert metrics == pytest.approx({f"best_of_n_{name}": x for name, x in expected.items()})
