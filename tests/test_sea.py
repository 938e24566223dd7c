"""Do SEA's ensemble and its choice of duels do what the paper and the corrections to it define?"""

import copy
import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_batch, make_model, plain_token_logps, real_ids
from torch import Tensor, nn

import sea
from common import Batch, generator, widest_pair
from sea import (
    Config,
    EpistemicRewardModel,
    choose_duels,
    head_metrics,
    keep_uncertain,
    most_uncertain_pair,
    packed_features,
    plain_features,
    retokenise,
    second_bai,
    second_ee,
    thompson_first,
)

NUM_HEADS, NUM_PROMPTS, NUM_CANDIDATES = 5, 40, 6


def random_choice(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards (E, B, N), where candidates are distinct (B, N), heads (B,), redraws (E, B)."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(NUM_HEADS, NUM_PROMPTS, NUM_CANDIDATES, generator=rng)
    rewards[:, ::2] += 2 * torch.randn(NUM_CANDIDATES, generator=rng)  # heads that mostly agree
    is_distinct = torch.rand(NUM_PROMPTS, NUM_CANDIDATES, generator=rng) < 0.7
    is_distinct[:, 0] = True
    is_distinct[0] = torch.arange(NUM_CANDIDATES) == 0  # one candidate left
    heads = torch.randint(NUM_HEADS, (NUM_PROMPTS,), generator=rng)
    redraws = torch.randint(NUM_HEADS, (NUM_HEADS, NUM_PROMPTS), generator=rng)
    return rewards, is_distinct, heads, redraws


def allowed(is_distinct: Tensor, b: int) -> list[int]:
    return [n for n, flag in enumerate(is_distinct[b].tolist()) if flag]


def candidates(texts: list[list[str]]) -> Batch:
    """Texts as a batch, for what reads nothing else."""
    size = (len(texts), len(texts[0]))
    ones, tokens = torch.ones(size[0], 1).long(), torch.ones(*size, 1).long()
    columns = {"prompt": [f"prompt {b}" for b in range(size[0])]}
    return Batch(columns, ones, ones, texts, tokens, tokens)


def numbered(num_prompts: int, num_candidates: int) -> Batch:
    return candidates([[f"y{n}" for n in range(num_candidates)]] * num_prompts)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------ which pair to compare


@pytest.mark.parametrize("seed", range(5))
def test_the_first_response_is_the_best_distinct_one_of_each_prompts_own_head(seed: int) -> None:
    rewards, is_distinct, heads, _ = random_choice(seed)
    first = thompson_first(rewards, heads, is_distinct)
    for b in range(NUM_PROMPTS):
        own = rewards[heads[b], b].tolist()
        assert first[b] == max(allowed(is_distinct, b), key=lambda n: own[n])


@pytest.mark.parametrize("variance", ["sigmoid", "logit"])
@pytest.mark.parametrize("seed", range(5))
def test_bai_takes_the_candidate_of_largest_variance_against_the_first(seed: int, variance) -> None:
    rewards, is_distinct, heads, _ = random_choice(seed)
    first = thompson_first(rewards, heads, is_distinct)
    second = second_bai(rewards, first, is_distinct, variance)
    for b in range(NUM_PROMPTS):
        spreads = {}
        for n in allowed(is_distinct, b):
            gaps = [(rewards[e, b, first[b]] - rewards[e, b, n]).item() for e in range(NUM_HEADS)]
            values = [sigmoid(gap) for gap in gaps] if variance == "sigmoid" else gaps
            spreads[n] = statistics.variance(values)
        assert second[b] == max(spreads, key=spreads.get)
        assert (second[b] == first[b]) == (len(spreads) == 1)


def test_the_sigmoid_variance_ignores_gaps_whose_winner_is_certain() -> None:
    # Heads differ by 8 logits on candidate 1, which loses anyway; by 1 on candidate 2, a toss-up.
    rewards = torch.tensor([[[0.0, -10.0, 0.5]], [[0.0, -18.0, -0.5]]])
    first, everything = torch.tensor([0]), torch.ones(1, 3).bool()
    assert second_bai(rewards, first, everything, "sigmoid") == 2
    assert second_bai(rewards, first, everything, "logit") == 1


@pytest.mark.parametrize("seed", range(5))
def test_ee_takes_the_first_redrawn_head_that_disagrees_else_the_heads_second_best(seed) -> None:
    rewards, is_distinct, heads, redraws = random_choice(seed)
    first = thompson_first(rewards, heads, is_distinct)
    second, is_clash = second_ee(rewards, first, heads, redraws, is_distinct)
    assert is_clash.any() and not is_clash.all(), "both branches are to be seen"
    for b in range(NUM_PROMPTS):
        choices = allowed(is_distinct, b)
        answer, clash = None, True
        for head in redraws[:, b].tolist():
            best = max(choices, key=lambda n: rewards[head, b, n].item())
            if best != first[b]:
                answer, clash = best, False
                break
        if clash:  # of the head that chose the first, not of the last one drawn
            ranked = sorted(choices, key=lambda n: -rewards[heads[b], b, n].item())
            answer = ranked[min(1, len(ranked) - 1)]
        assert second[b] == answer and is_clash[b] == clash


def test_the_fallback_of_ee_asks_the_head_that_chose_first() -> None:
    rewards = torch.tensor([[[3.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]]])  # both heads: candidate 0
    everything, redraws = torch.ones(1, 3).bool(), torch.tensor([[0], [1]])
    for head, runner_up in ((0, 1), (1, 2)):
        heads = torch.tensor([head])
        second, is_clash = second_ee(rewards, torch.tensor([0]), heads, redraws, everything)
        assert second.item() == runner_up and is_clash.item()


@pytest.mark.parametrize("seed", range(5))
def test_the_uncertain_pair_has_the_largest_variance_of_its_gap(seed: int) -> None:
    rewards, is_distinct, *_ = random_choice(seed)
    first, second = most_uncertain_pair(rewards, is_distinct)
    for b in range(NUM_PROMPTS):
        spreads = {}
        for i, j in itertools.combinations(allowed(is_distinct, b), 2):
            gaps = [(rewards[e, b, i] - rewards[e, b, j]).item() for e in range(NUM_HEADS)]
            spreads[i, j] = statistics.variance(gaps)
        duel = tuple(sorted((first[b].item(), second[b].item())))
        assert duel == (max(spreads, key=spreads.get) if spreads else (0, 0))


@pytest.mark.parametrize("seed", range(5))
def test_the_widest_pair_has_the_largest_margin_and_the_better_one_first(seed: int) -> None:
    rewards, is_distinct, *_ = random_choice(seed)
    for head in range(NUM_HEADS):
        best, worst = widest_pair(rewards[head], is_distinct)
        for b in range(NUM_PROMPTS):
            pairs = itertools.permutations(allowed(is_distinct, b), 2)
            margins = {p: (rewards[head, b, p[0]] - rewards[head, b, p[1]]).item() for p in pairs}
            expected = max(margins, key=margins.get) if margins else (0, 0)
            assert (best[b].item(), worst[b].item()) == expected


def test_the_widest_pair_of_equal_rewards_is_still_two_different_texts() -> None:
    is_distinct = torch.tensor([[True, False, True, True], [True, True, False, False]])
    best, worst = widest_pair(torch.zeros(2, 4), is_distinct)
    assert (best != worst).all()
    assert is_distinct[[0, 1], best].all() and is_distinct[[0, 1], worst].all()


@pytest.mark.parametrize("explore", ["bai", "ee", "uncertainty", "passive", "apl"])
def test_candidates_that_all_read_the_same_give_a_duel_of_one_text(explore: str) -> None:
    batch = candidates([["same", "same ", " same"]] * 4)
    rewards = torch.randn(1 if explore == "apl" else 3, 4, 3, generator=generator(0, explore))
    for is_synthetic in (torch.zeros(4).bool(), torch.ones(4).bool()):
        duel = choose_duels(Config(explore=explore), batch, rewards, is_synthetic, generator(1))
        for b in range(4):
            assert len({batch.responses[b][n[b]].strip() for n in duel[:2]}) == 1


@pytest.mark.parametrize("explore", ["bai", "ee", "uncertainty", "apl"])
def test_no_duel_is_between_texts_that_read_the_same_if_two_differ(explore: str) -> None:
    batch = candidates([["a", "a", "b", "b ", "c"]] * 200)
    rng = generator(0, explore)
    rewards = torch.randn(1 if explore == "apl" else 3, 200, 5, generator=rng)
    rewards[..., [1, 3]] = rewards[..., [0, 2]]  # the same text has the same reward
    is_synthetic = torch.rand(200, generator=rng) < 0.3
    first, second, _ = choose_duels(Config(explore=explore), batch, rewards, is_synthetic, rng)
    for b in range(200):
        assert batch.responses[b][first[b]].strip() != batch.responses[b][second[b]].strip()
        assert {first[b].item(), second[b].item()} <= {0, 2, 4}


@pytest.mark.parametrize("explore", ["bai", "ee"])
def test_a_head_is_drawn_for_each_prompt_and_each_head_as_often(explore: str) -> None:
    num_heads, num_prompts = 4, 4000
    rewards = torch.eye(num_heads)[:, None].expand(-1, num_prompts, -1)  # head e likes e best
    batch, nothing = numbered(num_prompts, num_heads), torch.zeros(num_prompts).bool()
    first, second, is_clash = choose_duels(
        Config(explore=explore), batch, rewards, nothing, generator(0)
    )
    share = torch.bincount(first, minlength=num_heads) / num_prompts
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / num_prompts)
    changes = (first[1:] != first[:-1]).double().mean().item()  # independent of the neighbour
    assert abs(changes - 0.75) < 5 * math.sqrt(0.25 * 0.75 / num_prompts)
    if explore == "ee":  # clash: each of the 4 heads redrawn chose the first again
        assert (second != first).all()
        assert abs(is_clash.double().mean().item() - 0.25**4) < 0.005
        share = torch.bincount((second - first)[~is_clash] % 4, minlength=4) / (~is_clash).sum()
        assert (share[1:] - 1 / 3).abs().max() < 0.04


def test_each_way_to_explore_chooses_by_its_own_rule_and_repeats_with_its_stream() -> None:
    rewards, *_ = random_choice(7)
    batch, nothing = numbered(NUM_PROMPTS, NUM_CANDIDATES), torch.zeros(NUM_PROMPTS).bool()
    everything = torch.ones(NUM_PROMPTS, NUM_CANDIDATES).bool()

    def choose(config: Config, rewards: Tensor = rewards) -> tuple[Tensor, Tensor, Tensor]:
        once, again = (
            choose_duels(config, batch, rewards, nothing, generator(3)) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(once, again))
        return once

    first, second, is_clash = choose(Config(explore="passive"))
    assert (first == 0).all() and (second == 1).all() and not is_clash.any()
    *duel, _ = choose(Config(explore="uncertainty"))
    assert torch.equal(torch.stack(duel), torch.stack(most_uncertain_pair(rewards, everything)))
    *duel, _ = choose(Config(explore="apl"), rewards[:1])
    assert torch.equal(torch.stack(duel), torch.stack(widest_pair(rewards[0], everything)))
    for variance in ("sigmoid", "logit"):
        first, second, is_clash = choose(Config(explore="bai", bai_variance=variance))
        assert torch.equal(second, second_bai(rewards, first, everything, variance))
        best = rewards.argmax(-1)  # (E, B)
        assert all(first[b] in best[:, b] for b in range(NUM_PROMPTS)) and not is_clash.any()


@pytest.mark.parametrize("explore", ["bai", "ee", "uncertainty"])
def test_a_synthetic_pair_is_a_drawn_heads_best_and_worst_and_never_a_clash(explore: str) -> None:
    num_heads, num_prompts = 3, 600
    rewards = torch.randn(num_heads, num_prompts, 5, generator=generator(0)) + torch.tensor(
        [0.0, 6.0, 0.0, 0.0, 0.0]  # heads agree on the best: `ee` would clash
    )
    batch, nothing = numbered(num_prompts, 5), torch.zeros(num_prompts).bool()
    is_synthetic = torch.arange(num_prompts) % 2 == 0
    config = Config(explore=explore)
    mixed = choose_duels(config, batch, rewards, is_synthetic, generator(1))
    plain = choose_duels(config, batch, rewards, nothing, generator(1))
    owners = torch.zeros(num_heads)
    for b in range(num_prompts):
        if not is_synthetic[b]:
            assert [x[b] for x in mixed] == [x[b] for x in plain], "the others' duels are as ever"
            continue
        duel = (mixed[0][b].item(), mixed[1][b].item())
        own = [(r.argmax().item(), r.argmin().item()) for r in rewards[:, b]]
        assert duel in own and not mixed[2][b]
        if own.count(duel) == 1:
            owners[own.index(duel)] += 1
    assert (owners > 0.2 * owners.sum()).all(), "one head labels all"
    assert explore != "ee" or plain[2][is_synthetic].any()


# ------------------------------------------------------------------ the epistemic reward model


def make_ensemble(num_features: int, hidden: int, num_heads: int = 20, **flags):
    config = Config(num_heads=num_heads, device="cpu", **flags)
    return EpistemicRewardModel(num_features, config, hidden=hidden)


def parameters(ensemble: EpistemicRewardModel) -> list[Tensor]:
    return [p.detach().clone() for p in (*ensemble.weights, *ensemble.biases)]


@torch.no_grad()
def disturb(ensemble: EpistemicRewardModel, size: float, seed: int = 0) -> None:
    for p in (*ensemble.weights, *ensemble.biases):
        p.add_(torch.randn(p.shape, generator=generator(seed, tuple(p.shape))), alpha=size)


@torch.no_grad()
def test_the_ensemble_equals_a_loop_over_separate_networks() -> None:
    ensemble = make_ensemble(7, 16, num_heads=4)
    features = torch.randn(3, 5, 7, generator=generator(0)) * 3 + 1
    ensemble.calibrate(features)
    disturb(ensemble, 0.1)  # biases too
    rewards = ensemble(features)
    assert rewards.shape == (4, 3, 5)
    flat = features.flatten(0, 1)
    standardised = (features - flat.mean(0)) / flat.std(0)
    for e in range(4):
        layers = [nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)]
        for layer, weight, bias in zip(layers[::2], ensemble.weights, ensemble.biases):
            layer.weight.copy_(weight[e].T)
            layer.bias.copy_(bias[e, 0])
        network = nn.Sequential(*layers)
        torch.testing.assert_close(rewards[e], network(standardised)[..., 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("anchor", "scale"), [("1", 1.0), ("released", 0.5)])
def test_heads_start_apart_with_lecun_weights_and_zero_biases(anchor: str, scale: float) -> None:
    ensemble = make_ensemble(64, 128, anchor=anchor)
    assert [tuple(w.shape[1:]) for w in ensemble.weights] == [(64, 128), (128, 128), (128, 1)]
    for weight, fan_in in zip(ensemble.weights, (64, 128, 128)):
        assert weight.std().item() == pytest.approx(scale / math.sqrt(fan_in), rel=0.05)
        assert abs(weight.mean().item()) < 0.05 / math.sqrt(fan_in)
        assert len({tuple(w.flatten()[:3].tolist()) for w in weight}) == 20
    assert all((bias == 0).all() for bias in ensemble.biases)
    assert sum(p.numel() for p in parameters(ensemble)) == 20 * (64 * 128 + 128 * 130 + 128 + 1)


def test_the_heads_are_mlps_of_two_hidden_layers_of_128_by_default() -> None:
    ensemble = EpistemicRewardModel(2048, Config(device="cpu"))
    assert sum(p.numel() for p in parameters(ensemble)) == 20 * 278_913  # the fact sheet's count


@torch.no_grad()
def rms_disagreement(ensemble, first: Tensor, second: Tensor) -> float:
    """Standard deviation over heads of reward gaps, root mean square over pairs, in a loop."""
    gaps = (ensemble(first) - ensemble(second)).flatten(1).T.tolist()
    return math.sqrt(statistics.mean(statistics.variance(heads) for heads in gaps))


def scaled_features(num_prompts: int, num_candidates: int, seed: int) -> Tensor:
    """Features (B, N, 12) of very different scales and means."""
    scales, shifts = torch.rand(12, generator=generator(0)) * 50 + 0.1, torch.arange(12) * 5.0
    rng = generator(seed)
    return torch.randn(num_prompts, num_candidates, 12, generator=rng) * scales + shifts


@pytest.mark.parametrize("prior_std", [0.5, 1.0, 3.0])
def test_calibration_sets_the_heads_disagreement_on_neighbouring_candidates(prior_std) -> None:
    ensemble = make_ensemble(12, 32, num_heads=3, prior_std=prior_std)
    features, before = scaled_features(4, 5, seed=1), parameters(ensemble)
    ensemble.calibrate(features)
    neighbours = rms_disagreement(ensemble, features[:, :-1], features[:, 1:])
    assert neighbours == pytest.approx(prior_std, rel=1e-4)
    after = parameters(ensemble)
    ratios = after[2] / before[2]  # one scalar, on the output layer alone
    assert (ratios - ratios.mean()).abs().max() < 1e-4 * ratios.mean()
    assert all(torch.equal(before[layer], after[layer]) for layer in (0, 1, 3, 4, 5))


def test_calibrated_heads_disagree_by_prior_std_on_any_two_candidates_also_unseen_ones() -> None:
    ensemble, features = make_ensemble(12, 32, prior_std=2.0), scaled_features(32, 8, seed=1)
    ensemble.calibrate(features)
    pairs = [
        rms_disagreement(ensemble, features[:, i : i + 1], features[:, j : j + 1])
        for i, j in itertools.combinations(range(8), 2)
    ]
    assert math.sqrt(statistics.mean(x**2 for x in pairs)) == pytest.approx(2.0, rel=0.1)
    unseen = scaled_features(64, 2, seed=2)
    unseen = rms_disagreement(ensemble, unseen[:, :1], unseen[:, 1:])
    assert unseen == pytest.approx(2.0, rel=0.25)


@torch.no_grad()
def test_features_are_standardised_by_the_first_rounds_statistics_for_good() -> None:
    rng = generator(0)
    features = torch.randn(16, 4, 6, generator=rng) * 40 - 7
    ensemble, twin = (make_ensemble(6, 16) for _ in range(2))
    flat = features.flatten(0, 1)
    ensemble.calibrate(features)
    twin.calibrate((features - flat.mean(0)) / flat.std(0))
    later = torch.randn(16, 4, 6, generator=rng) * 3
    for seen in (features, later):
        same = twin((seen - flat.mean(0)) / flat.std(0))
        torch.testing.assert_close(ensemble(seen), same, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_feature_that_never_varies_in_the_first_round_does_not_swamp_the_others_later() -> None:
    ensemble, rng = make_ensemble(6, 16), generator(0)
    features = torch.randn(16, 4, 6, generator=rng)
    features[..., 2] = 1.0
    ensemble.calibrate(features)
    assert ensemble(features).isfinite().all()
    later = features.clone()
    later[..., 2] += 0.0078  # one step of bfloat16
    assert (ensemble(later) - ensemble(features)).abs().max() < 1


def test_the_released_settings_neither_standardise_nor_scale() -> None:
    ensemble = make_ensemble(6, 16, anchor="released")
    before, features = parameters(ensemble), torch.randn(8, 4, 6, generator=generator(0)) * 9
    expected = ensemble(features)
    ensemble.calibrate(features)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(ensemble)))
    assert torch.equal(ensemble(features), expected)


def fit_loss(ensemble: EpistemicRewardModel, pairs: Tensor) -> list[list[float]]:
    """softplus(-gap), head by head and pair by pair."""
    rewards = ensemble(pairs).tolist()
    return [[math.log1p(math.exp(lost - won)) for won, lost in head] for head in rewards]


@pytest.mark.parametrize("strength", ["0", "1", "2.5"])
def test_the_loss_sums_mean_fits_over_heads_and_the_anchor_in_initial_deviations(
    strength: str,
) -> None:
    ensemble = make_ensemble(6, 16, num_heads=3, anchor=strength)
    raw = parameters(ensemble)[2]
    ensemble.calibrate(torch.randn(16, 4, 6, generator=generator(0)))
    start = parameters(ensemble)
    scale = (start[2] / raw).mean().item()  # of the output layer
    disturb(ensemble, 0.3)
    pairs, num_labels = torch.randn(7, 2, 6, generator=generator(1)), 50
    # Weights of layers of fan-in 6, 16, 16, then the biases, which use their layer's deviation.
    sigmas = [6**-0.5, 16**-0.5, scale * 16**-0.5] * 2
    expected, fits = 0.0, fit_loss(ensemble, pairs)
    for e in range(3):
        expected += sum(fits[e]) / 7
        for now, then, sigma in zip(parameters(ensemble), start, sigmas):
            for phi, phi0 in zip(now[e].flatten().tolist(), then[e].flatten().tolist()):
                expected += float(strength) / (2 * num_labels) * ((phi - phi0) / sigma) ** 2
    assert ensemble.loss(pairs, num_labels).item() == pytest.approx(expected, rel=1e-4)


def test_the_released_loss_is_a_mean_over_heads_and_parameters() -> None:
    ensemble = make_ensemble(6, 16, num_heads=3, anchor="released")
    start = parameters(ensemble)
    disturb(ensemble, 0.3)
    pairs, num_labels = torch.randn(7, 2, 6, generator=generator(1)), 50
    total, count = 0.0, 0
    for now, then in zip(parameters(ensemble), start):
        for phi, phi0 in zip(now.flatten().tolist(), then.flatten().tolist()):
            total, count = total + (phi - phi0) ** 2, count + 1
    fits = [x for head in fit_loss(ensemble, pairs) for x in head]
    expected = sum(fits) / 21 + 0.5 * 7 / num_labels * total / count
    assert ensemble.loss(pairs, num_labels).item() == pytest.approx(expected, rel=1e-4)


def test_a_head_learns_from_its_own_errors_alone() -> None:
    ensemble = make_ensemble(6, 16, num_heads=3)
    pairs = torch.randn(7, 2, 6, generator=generator(1))
    before = torch.autograd.grad(ensemble.loss(pairs, 7), list(ensemble.weights))
    with torch.no_grad():
        for weight in ensemble.weights:
            weight[0] *= 3
    after = torch.autograd.grad(ensemble.loss(pairs, 7), list(ensemble.weights))
    for old, new in zip(before, after):
        assert torch.equal(old[1:], new[1:]) and not torch.equal(old[0], new[0])


def watched(ensemble: EpistemicRewardModel) -> list[tuple[Tensor, int]]:
    """The arguments of every later call of `ensemble.loss`."""
    calls, loss = [], ensemble.loss

    def record(pairs: Tensor, num_labels: int) -> Tensor:
        calls.append((pairs.clone(), num_labels))
        return loss(pairs, num_labels)

    ensemble.loss = record
    return calls


def test_a_round_takes_five_adam_steps_on_random_minibatches_of_at_most_128() -> None:
    ensemble = make_ensemble(1, 8)
    calls, rng, seen = watched(ensemble), generator(0), 0
    for new in (32, 96, 40, 0):
        before = parameters(ensemble)
        ids = torch.arange(seen, seen + new).float()
        ensemble.fit(torch.stack([ids, -ids], dim=1)[..., None], rng)
        seen += new
        assert len(calls) == 5
        for pairs, num_labels in calls:
            drawn = pairs[:, 0, 0].tolist()
            assert num_labels == seen and len(drawn) == min(128, seen)
            assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(seen))
            assert torch.equal(pairs[:, 1], -pairs[:, 0]), "chosen and rejected stay in place"
        assert len({tuple(sorted(pairs[:, 0, 0].tolist())) for pairs, _ in calls}) == (
            5 if seen > 128 else 1
        )
        assert not torch.equal(before[0], parameters(ensemble)[0])
        calls.clear()
    (settings,) = ensemble.optimizer.param_groups
    assert isinstance(ensemble.optimizer, torch.optim.Adam) and settings["lr"] == 1e-3
    assert settings["weight_decay"] == 0


def test_without_a_label_nothing_is_trained() -> None:
    ensemble = make_ensemble(4, 8)
    calls, before = watched(ensemble), parameters(ensemble)
    ensemble.fit(torch.zeros(0, 2, 4), generator(0))
    assert not calls and all(torch.equal(a, b) for a, b in zip(before, parameters(ensemble)))


def test_the_released_settings_wait_for_128_pairs_and_decay_weights() -> None:
    ensemble = make_ensemble(4, 8, anchor="released")
    calls = watched(ensemble)
    ensemble.fit(torch.randn(127, 2, 4, generator=generator(0)), generator(1))
    assert not calls
    ensemble.fit(torch.randn(1, 2, 4, generator=generator(2)), generator(1))
    assert len(calls) == 5
    assert ensemble.optimizer.param_groups[0]["weight_decay"] == 5e-5


def test_a_checkpoint_of_the_ensemble_holds_its_scales_its_start_and_its_data() -> None:
    ensemble, features = make_ensemble(4, 8), torch.randn(8, 3, 4, generator=generator(0)) * 5
    ensemble.calibrate(features)
    ensemble.fit(features[:, :2], generator(1))
    twin = make_ensemble(4, 8, seed=9)
    twin.load_state_dict(copy.deepcopy(ensemble.state_dict()))
    twin.optimizer.load_state_dict(copy.deepcopy(ensemble.optimizer.state_dict()))
    assert torch.equal(twin(features), ensemble(features))
    for model in (twin, ensemble):
        model.fit(features[:, 1:], generator(2))
    assert all(torch.equal(a, b) for a, b in zip(parameters(twin), parameters(ensemble)))


# ------------------------------------------------------------------ what the anchor is for


class Teacher:
    """A linear reward of standard deviation 2 on d = 8 standard normal features."""

    def __init__(self, seed: int) -> None:
        self.rng = generator(seed, "teacher")
        weight = torch.randn(8, generator=self.rng)
        self.weight = 2 * weight / weight.norm()

    def pairs(self, count: int) -> Tensor:
        """Features (count, 2, 8) of chosen and rejected, by Bernoulli labels."""
        features = torch.randn(count, 2, 8, generator=self.rng)
        gaps = (features[:, 0] - features[:, 1]) @ self.weight
        is_flipped = torch.rand(count, generator=self.rng) >= gaps.sigmoid()
        return torch.where(is_flipped[:, None, None], features.flip(1), features)


def learn(
    num_pairs: int, anchor: str, is_pulled_to_zero: bool = False
) -> tuple[float, float, float]:
    """Spread over heads on unseen pairs before and after 800 steps, and unseen NLL after."""
    teacher, ensemble = Teacher(0), make_ensemble(8, 32, anchor=anchor)
    ensemble.calibrate(torch.randn(32, 20, 8, generator=teacher.rng))
    seen, unseen = teacher.pairs(num_pairs), teacher.pairs(1000)
    if is_pulled_to_zero:
        for tensor in ensemble.start:
            tensor.data.zero_()
    before = rms_disagreement(ensemble, unseen[:, :1], unseen[:, 1:])
    ensemble.num_steps = 800
    ensemble.fit(seen, generator(0, "minibatches"))
    after = rms_disagreement(ensemble, unseen[:, :1], unseen[:, 1:])
    with torch.no_grad():
        losses = fit_loss(ensemble, unseen)
    return before, after, statistics.mean(map(statistics.mean, losses))


def test_the_anchor_at_each_heads_own_start_keeps_the_heads_apart_where_there_is_no_data() -> None:
    start, anchored, anchored_loss = learn(32, "1")
    _, collapsed, _ = learn(32, "1", is_pulled_to_zero=True)
    _, _, free_loss = learn(32, "0")
    assert start == pytest.approx(1, rel=0.2)
    assert anchored > start / 2 and collapsed < start / 10
    assert free_loss > math.log(2) > anchored_loss + 0.05


def test_with_more_labels_the_heads_agree() -> None:
    spreads = [learn(num_pairs, "1")[1] for num_pairs in (32, 512)]
    assert spreads[1] < 0.8 * spreads[0]


# ------------------------------------------------------------------ a contextual bandit


def last_third_regret(seed: int, is_random: bool) -> float:
    """Reward regret a duel, r(best) - (r(first) + r(second)) / 2, in the last third of 15 rounds
    of 16 prompts with 20 candidates, of a linear reward of standard deviation 2 on d = 32."""
    world, rng = generator(seed, "world"), generator(seed, "agent")
    weight = torch.randn(32, generator=world)
    weight *= 2 / weight.norm()
    config, batch, rows = Config(explore="ee", seed=seed), numbered(16, 20), torch.arange(16)
    ensemble = make_ensemble(32, 32, seed=seed)
    regrets = []
    for number in range(15):
        features = torch.randn(16, 20, 32, generator=world)
        oracle_rewards, coins = features @ weight, torch.rand(16, generator=world)
        first, second = torch.rand(16, 20, generator=rng).topk(2).indices.T
        if not is_random:
            if number == 0:
                ensemble.calibrate(features)
            rewards = ensemble(features).detach()
            first, second, _ = choose_duels(config, batch, rewards, torch.zeros(16).bool(), rng)
        won, lost = oracle_rewards[rows, first], oracle_rewards[rows, second]
        regrets.append((oracle_rewards.max(-1).values - (won + lost) / 2).mean().item())
        is_first = coins < (won - lost).sigmoid()
        chosen, rejected = (torch.where(is_first, *x) for x in ((first, second), (second, first)))
        if not is_random:
            ensemble.fit(torch.stack([features[rows, chosen], features[rows, rejected]], 1), rng)
    return statistics.mean(regrets[10:])


def test_thompson_sampling_learns_a_bandit_that_random_duels_do_not() -> None:
    agent = [last_third_regret(seed, is_random=False) for seed in range(20)]
    chance = [last_third_regret(seed, is_random=True) for seed in range(20)]
    gains = [b - a for a, b in zip(agent, chance)]
    t = statistics.mean(gains) / (statistics.stdev(gains) / math.sqrt(20))
    assert t > 3.883, "paired t-test of 19 degrees of freedom, two-sided p < 0.001"
    assert statistics.mean(chance) == pytest.approx(2 * 1.867, rel=0.05)  # E max of 20 normals
    assert statistics.mean(agent) < 0.7 * statistics.mean(chance)


# ------------------------------------------------------------------ APL


def test_apl_keeps_the_prompts_of_highest_entropy_with_their_implicit_rewards() -> None:
    causal = transformers.AutoModelForCausalLM
    policy, ref_model = (make_model(causal, "gpt_neox", seed) for seed in (0, 1))
    # Prompt 0 has the second highest mean, but its shortest response is likelier than any of 2's.
    lengths = [[8, 8, 1], [7, 7, 7], [4, 4, 4], [1, 1, 2], [9, 2, 1], [2, 3, 2]]
    batch = make_batch([4, 7, 5, 3, 6, 9], lengths)
    config = Config(explore="apl", beta=0.3)
    run = SimpleNamespace(policy=policy, ref_model=ref_model, config=config)
    kept, implicit_rewards = keep_uncertain(batch, run, 2)
    with torch.no_grad():
        logps = plain_token_logps(policy, batch).sum(-1)
        gaps = logps - plain_token_logps(ref_model, batch).sum(-1)
    entropies = [-sum(row) / 3 for row in logps.tolist()]
    expected = sorted(range(6), key=lambda b: -entropies[b])[:2]
    numbers = [batch.columns["prompt"].index(prompt) for prompt in kept.columns["prompt"]]
    assert sorted(numbers) == sorted(expected) and implicit_rewards.shape == (1, 2, 3)
    for new, old in enumerate(numbers):
        assert kept.responses[new] == batch.responses[old]
        assert real_ids(kept, new, 1) == real_ids(batch, old, 1)
        torch.testing.assert_close(implicit_rewards[0, new], 0.3 * gaps[old], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ features


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def backbone(request) -> nn.Module:
    return make_model(transformers.AutoModel, request.param, seed=4)


@torch.no_grad()
def test_packed_features_are_the_last_tokens_state_of_one_plain_row_a_response(backbone) -> None:
    batch = make_batch([7, 3, 11], [[4, 1, 6], [2, 6, 5], [6, 3, 1]])
    features = packed_features(backbone, batch)
    assert features.shape == (3, 3, 32) and features.dtype == torch.float32
    for b, n in itertools.product(range(3), range(3)):
        prompt, response = real_ids(batch, b, n)
        plain = backbone(torch.tensor([prompt + response])).last_hidden_state[0, -1]
        torch.testing.assert_close(features[b, n], plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_features_depend_on_neither_neighbours_nor_padding(backbone) -> None:
    batch = make_batch([7, 3, 11], [[4, 1, 6], [2, 6, 5], [6, 3, 1]])
    features = packed_features(backbone, batch)
    for rows, picks in itertools.product(([1], [2, 0]), ([2], [1, 0])):
        part = batch.select(torch.tensor(rows), torch.tensor([picks] * len(rows)))  # padding is cut
        expected = features[rows][:, picks]
        torch.testing.assert_close(packed_features(backbone, part), expected, rtol=1e-4, atol=1e-4)


TEXTS = [["cats", " the keyboard again ", "a"], ["Jack sat on the report so", "!", "the cat"]]
PROMPTS = {"prompt": ["The cat sat on my keyboard. TL;DR:", "Jack? TL;DR:"]}


def texts_batch(texts: list[list[str]] = TEXTS) -> Batch:
    """As the policy sampled it, in tokens that mean nothing here."""
    other = make_batch([2, 5], [[1, 3, 2]] * 2)
    return Batch(
        PROMPTS, other.prompt_ids, other.prompt_mask, texts, other.response_ids, other.response_mask
    )


def test_retokenising_gives_the_prompt_and_a_space_and_the_stripped_response(tokenizer) -> None:
    batch = retokenise(texts_batch(), padded(tokenizer))
    assert batch.responses == TEXTS and batch.columns == PROMPTS
    for b, n in itertools.product(range(2), range(3)):
        prompt, response = real_ids(batch, b, n)
        text = f"{PROMPTS['prompt'][b]} {TEXTS[b][n].strip()}"
        assert tokenizer.decode(prompt + response) == text
        assert prompt + response == tokenizer(text)["input_ids"]


def test_an_empty_response_is_retokenised_as_one_eos(tokenizer) -> None:
    batch = retokenise(texts_batch([["", "a", "  "], ["b", "c", "d"]]), padded(tokenizer))
    for n in (0, 2):
        assert real_ids(batch, 0, n)[1] == [tokenizer.eos_token_id]


def padded(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def test_plain_and_packed_features_of_texts_agree(backbone, tokenizer) -> None:
    batch = texts_batch()
    plain = plain_features(backbone, padded(tokenizer), batch)
    packed = packed_features(backbone, retokenise(batch, padded(tokenizer)))
    torch.testing.assert_close(plain, packed, rtol=1e-4, atol=1e-4)
    for b, n in itertools.product(range(2), range(3)):
        ids = tokenizer(f"{PROMPTS['prompt'][b]} {TEXTS[b][n].strip()}")["input_ids"]
        alone = backbone(torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(plain[b, n], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_plain_features_serve_an_encoder_that_sees_both_ways(tokenizer) -> None:
    encoder = make_model(transformers.AutoModel, "bert", 5)
    features = plain_features(encoder, padded(tokenizer), texts_batch())
    for b, n in itertools.product(range(2), range(3)):
        ids = tokenizer(f"{PROMPTS['prompt'][b]} {TEXTS[b][n].strip()}")["input_ids"]
        alone = encoder(torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(features[b, n], alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ what is logged


def test_head_metrics_equal_a_loop() -> None:
    rewards = torch.randn(4, 9, 5, generator=generator(0)) * 2
    chosen, rejected = torch.arange(9) % 5, (torch.arange(9) + 2) % 5
    asked = torch.tensor([0, 3, 4, 7, 8])
    weight, metrics = head_metrics(rewards, asked, chosen, rejected)
    right = []
    for b in asked.tolist():
        mean = [statistics.mean(rewards[:, b, n].tolist()) for n in range(5)]
        right.append(float(mean[chosen[b]] > mean[rejected[b]]))
    spreads = []
    for b in range(9):
        gaps = rewards[:, b, 0] - rewards[:, b, 1]
        spreads.append(statistics.stdev(sigmoid(gap) for gap in gaps.tolist()))
    assert weight == 5 and statistics.mean(right) not in (0, 1)
    assert metrics == pytest.approx({
        "ensemble_accuracy": statistics.mean(right),
        "ensemble_disagreement": statistics.mean(spreads),
    })  # fmt: skip


# ------------------------------------------------------------------ what the ensemble learns from


def trained_ensemble(monkeypatch, flags: dict, is_flipped: bool) -> EpistemicRewardModel:
    """The ensemble of a run whose policy stays as it is, the labels of its synthetic pairs as the
    heads gave them or the other way round."""
    made, synthetic = [], []

    class Watched(EpistemicRewardModel):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    def choose(config, batch, rewards, is_synthetic, rng):
        first, second, is_clash = choose_duels(config, batch, rewards, is_synthetic, rng)
        synthetic.append(int(is_synthetic.sum()))
        if is_flipped:
            first, second = (
                torch.where(is_synthetic, *pair) for pair in ((second, first), (first, second))
            )
        return first, second, is_clash

    with monkeypatch.context() as patch:
        patch.setattr(sea, "EpistemicRewardModel", Watched)
        patch.setattr(sea, "choose_duels", choose)
        sea.train(Config(**flags))
    assert sum(synthetic) >= 4
    return made[0]


def test_a_flipped_label_of_a_synthetic_pair_changes_nothing_in_the_ensemble(
    monkeypatch, flags, folder
) -> None:
    flags |= dict(
        erm_backbone=str(folder / "erm_backbone"), num_candidates=4, num_heads=3, burn_in=4,
        gamma=0.5, learning_rate=0.0, num_queries=20, eval_every=1000, overwrite=True,
    )  # fmt: skip
    plain, flipped = (trained_ensemble(monkeypatch, flags, x) for x in (False, True))
    assert len(plain.pairs) == flags["num_queries"]
    assert torch.equal(plain.pairs, flipped.pairs)
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(flipped)))


class Stop(Exception):
    """A test has seen what it came for."""


def test_apl_compares_by_implicit_rewards_also_where_heads_are_trained_for_best_of_n(
    monkeypatch, flags, folder
) -> None:
    expected = []

    def keep(*args):
        batch, implicit_rewards = keep_uncertain(*args)
        expected.append(implicit_rewards)
        return batch, implicit_rewards

    def choose(config, batch, rewards, *args):
        assert torch.equal(rewards, expected[0])
        raise Stop

    monkeypatch.setattr(sea, "keep_uncertain", keep)
    monkeypatch.setattr(sea, "choose_duels", choose)
    backbone = str(folder / "erm_backbone")
    config = Config(**flags, explore="apl", num_heads=3, best_of_n=2, erm_backbone=backbone)
    with pytest.raises(Stop):
        sea.train(config)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic"])
def test_ipo_is_on_means_over_tokens_and_the_other_losses_on_sums(monkeypatch, flags, loss) -> None:
    def update(policy, optimizer, groups, pair_loss, config):
        logps, ref_logps = torch.tensor([[-6.0, -9.0]]), torch.tensor([[-10.0, -9.0]])
        part = SimpleNamespace(response_mask=torch.tensor([[[1, 1, 0], [1, 1, 1]]]))
        # Sums: (-6 + 10) - (-9 + 9) = 4. Means, of both models: (-3 + 5) - (-3 + 3) = 2.
        expected = dict(dpo=math.log(1 + math.exp(-1.0)), ipo=(2 - 2) ** 2, slic=0.0)
        value = pair_loss(logps, ref_logps, part)
        assert value.tolist() == pytest.approx([expected[loss]])
        raise Stop

    monkeypatch.setattr("common.update", update)
    with pytest.raises(Stop):
        sea.train(Config(**flags, explore="passive", loss=loss, beta=0.25))
