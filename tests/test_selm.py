"""Do SELM's loss, rankings and iterations do what the paper and the corrections to it define?"""

import copy
import dataclasses
import itertools
import json
import math
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_batch, plain_token_logps, real_ids
from torch import Tensor, nn

import common
import selm
from common import Batch, generator
from selm import Config, bonus_loss, comparisons, loss_terms, training_groups

ARMS = {
    "selm": {},
    "sample": dict(bonus_response="sample"),
    "ranker": dict(ranker_candidates=2),
    "none": dict(bonus="none"),
    "xpo": dict(bonus="xpo"),
    "offline": dict(first_iteration="offline", num_iterations=2),
}
BETA, ALPHA, NUM_ARMS = 0.3, 0.7, 12


def make(flags: dict, **more) -> Config:
    """Three iterations of two rounds of two prompts, which cost three labels each."""
    return Config(**flags | dict(num_queries=36, batch_size=2, eval_every=12) | more)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: common.Run) -> list[dict]:
    return rows(run.folder / "metrics.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "preferences.jsonl", "samples.jsonl", "model/model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def value_of(text: str) -> float:
    """A reward without skill, in [-2, 2), so that each response is best, middle and worst."""
    return zlib.crc32(text.strip().encode()) % 4000 / 1000 - 2


class Rule(common.Oracle):
    """An oracle without a model, which ranks y first, in the middle and last."""

    def score(self, prompts: list[str], responses: list[list[str]]) -> Tensor:
        return torch.tensor([[value_of(text) for text in row] for row in responses])


def train(config: Config) -> common.Run:
    return selm.train(config, Rule(config))


@pytest.fixture
def steps(monkeypatch) -> list[SimpleNamespace]:
    """Each gradient step of a run: the groups, what the loss was given, rate, state and result."""
    seen, update = [], common.update

    def listening(policy, optimizer, groups, pair_loss, config):
        step = SimpleNamespace(groups=list(groups), parts=[], num_states=len(optimizer.state))
        step.rate = optimizer.param_groups[0]["lr"]

        def heard(logps, ref_logps, part):
            losses = pair_loss(logps, ref_logps, part)
            given = dict(logps=logps.detach(), ref_logps=ref_logps, losses=losses.detach())
            step.parts.append(SimpleNamespace(part=part, **given))
            return losses

        step.result = update(policy, optimizer, groups, heard, config)
        seen.append(step)
        return step.result

    monkeypatch.setattr(common, "update", listening)
    return seen


@pytest.fixture
def rounds(monkeypatch) -> list[SimpleNamespace]:
    """Each round of a run: number, iteration from 0, prompts, both models before it, the groups."""
    seen = []
    for name, collect in (("ranked_groups", selm.ranked_groups),
                          ("labelled_groups", selm.labelled_groups)):  # fmt: skip

        def listening(config, run, prompts, snapshot, rng, collect=collect):
            now = SimpleNamespace(number=run.counts["rounds"], t=run.counts["iteration"] - 1)
            now.prompts, now.kind = prompts, collect.__name__
            now.snapshot, now.policy = copy.deepcopy(snapshot), copy.deepcopy(run.policy)
            now.groups = collect(config, run, prompts, snapshot, rng)
            seen.append(now)
            return now.groups

        monkeypatch.setattr(selm, name, listening)
    return seen


# ------------------------------------------------------------------ the loss


def random_logps(num: int, dtype=torch.float64) -> tuple[Tensor, Tensor, SimpleNamespace]:
    """Log-probabilities of `num` prompts with three responses; y is each of them in turn."""
    rng = torch.Generator().manual_seed(0)
    logps, ref_logps = (-30 * torch.rand(num, 3, generator=rng, dtype=dtype) for _ in range(2))
    return logps, ref_logps, SimpleNamespace(columns={"y": [b % 3 for b in range(num)]})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_without_alpha_the_loss_is_dpos_bit_for_bit() -> None:
    logps, ref_logps, part = random_logps(60, torch.float32)
    for width in (2, 3):
        part.columns["y"] = [b % width for b in range(60)]
        config = Config(alpha=0.0, beta=BETA)
        losses, bonus, _ = loss_terms(logps[:, :width], ref_logps[:, :width], part, config)
        gap = (logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]
        assert torch.equal(losses + bonus, -nn.functional.logsigmoid(BETA * gap))


@pytest.mark.parametrize("bonus", ["selm", "xpo"])
def test_the_loss_and_its_gradient_are_dpos_plus_alpha_beta_at_y_and_for_xpo_alpha(bonus) -> None:
    logps, ref_logps, part = random_logps(12)
    logps.requires_grad_()
    config = Config(bonus=bonus, alpha=ALPHA, beta=BETA)
    losses, bonuses, log_ratios = loss_terms(logps, ref_logps, part, config)
    (gradient,) = torch.autograd.grad((losses + bonuses).sum(), logps)
    assert not log_ratios.requires_grad
    for b in range(12):
        (w, l, _), (ref_w, ref_l, _) = logps[b].tolist(), ref_logps[b].tolist()  # noqa: E741
        y = part.columns["y"][b]
        gap = BETA * ((w - l) - (ref_w - ref_l))
        ratio = logps[b, y].item() - ref_logps[b, y].item()
        assert losses[b].item() == pytest.approx(-math.log(sigmoid(gap)))
        assert log_ratios[b].item() == pytest.approx(ratio)
        weight = ALPHA * BETA if bonus == "selm" else ALPHA
        expected = weight * ratio if bonus == "selm" else weight * logps[b, y].item()
        assert bonuses[b].item() == pytest.approx(expected)
        slopes = [-BETA * sigmoid(-gap), BETA * sigmoid(-gap), 0.0]
        slopes[y] += weight
        assert gradient[b].tolist() == pytest.approx(slopes, abs=1e-12)


@pytest.mark.parametrize("bonus", ["selm", "xpo"])
def test_below_the_floor_neither_gain_nor_gradient_is_left_and_above_it_nothing_changes(bonus):
    ref, floor = torch.tensor(-20.0, dtype=torch.float64), 5.0
    for fallen in (-3.0, 0.0, 2.0, 4.99, 5.01, 9.0, 1e6):  # nats below the reference
        logps = (ref - fallen).requires_grad_()
        loss = bonus_loss(logps, ref, ALPHA, BETA, bonus, floor)
        (slope,) = torch.autograd.grad(loss, logps)
        free = bonus_loss(logps, ref, ALPHA, BETA, bonus)
        weight = ALPHA * (BETA if bonus == "selm" else 1)
        least = -weight * floor + (0 if bonus == "selm" else ALPHA * ref.item())
        assert loss.item() >= least - 1e-12
        if fallen > floor:
            assert slope.item() == 0.0 and loss.item() == pytest.approx(least)
        else:
            assert slope.item() == pytest.approx(weight) and loss.item() == free.item()


def test_the_floor_of_the_flag_reaches_the_loss() -> None:
    logps, ref_logps, part = random_logps(60)
    config = Config(alpha=ALPHA, beta=BETA, bonus_floor=2.0)
    _, bonus, ratios = loss_terms(logps, ref_logps, part, config)
    assert bonus.min().item() == pytest.approx(-ALPHA * BETA * 2.0) and ratios.min() < -2
    expected = [ALPHA * BETA * max(ratio, -2.0) for ratio in ratios.tolist()]
    assert bonus.tolist() == pytest.approx(expected)


def test_the_bonus_is_a_sum_over_tokens_so_it_doubles_with_them() -> None:
    tokens, ref_tokens = torch.randn(2, 8, 5, generator=generator(0), dtype=torch.float64)
    once = bonus_loss(tokens.sum(-1), ref_tokens.sum(-1), ALPHA, BETA)
    twice = (torch.cat([part, part], dim=-1).sum(-1) for part in (tokens, ref_tokens))
    torch.testing.assert_close(bonus_loss(*twice, ALPHA, BETA), 2 * once)


# ------------------------------------------------------------------ what the theory says of it


def policies(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a policy, which want a gradient, and a reference's probabilities: twelve arms."""
    logits, ref = torch.randn(2, NUM_ARMS, generator=generator(seed), dtype=torch.float64)
    return logits.requires_grad_(), (2 * ref).softmax(0)


def expected_bonus(logits: Tensor, ref: Tensor, bonus: str = "selm") -> Tensor:
    """The bonus of each arm as y, weighted by the reference."""
    logps = logits.log_softmax(0)
    return sum(p * bonus_loss(logp, p.log(), ALPHA, BETA, bonus) for p, logp in zip(ref, logps))


@pytest.mark.parametrize("bonus,weight", [("selm", ALPHA * BETA), ("xpo", ALPHA)])
def test_the_expected_gradient_of_the_bonus_is_reference_minus_policy(bonus, weight) -> None:
    logits, ref = policies()
    (gradient,) = torch.autograd.grad(expected_bonus(logits, ref, bonus), logits)
    torch.testing.assert_close(gradient, weight * (ref - logits.detach().softmax(0)))


def test_at_policy_equal_to_reference_a_sampled_y_has_no_expected_gradient_a_greedy_one_has():
    _, ref = policies()
    logits = ref.log().requires_grad_()
    (gradient,) = torch.autograd.grad(expected_bonus(logits, ref), logits)
    assert gradient.abs().max() < 1e-15
    mode = int(ref.argmax())
    greedy = bonus_loss(logits.log_softmax(0)[mode], ref[mode].log(), ALPHA, BETA)
    (gradient,) = torch.autograd.grad(greedy, logits)
    slopes = [ALPHA * BETA * ((arm == mode) - ref[arm].item()) for arm in range(NUM_ARMS)]
    assert gradient.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("seed", range(5))
def test_the_expected_bonus_is_minus_the_forward_kl(seed: int) -> None:
    logits, ref = policies(seed)
    policy = logits.softmax(0).tolist()
    kl = sum(q * math.log(q / p) for q, p in zip(ref.tolist(), policy))
    value = expected_bonus(logits, ref).item()
    assert value == pytest.approx(-ALPHA * BETA * kl) and value < 0


@pytest.mark.parametrize("seed", range(5))
def test_theorem_5_1_is_an_identity_whatever_the_policy_its_minimiser_is_the_reference(seed):
    logits, ref = policies(seed)
    rho = logits.detach().softmax(0)
    reward = BETA * (rho.log() - ref.log())
    weights = rho * (-reward / BETA).exp()
    torch.testing.assert_close(weights / weights.sum(), ref)
    torch.testing.assert_close((-reward / BETA).exp(), ref / rho)  # the change of measure

    def objective(policy: Tensor) -> float:
        return (policy @ reward + BETA * (policy @ (policy.log() - rho.log()))).item()

    for other in range(20):
        nearby = (ref.log() + 0.1 * policies(100 + other)[0].detach()).softmax(0)
        assert objective(nearby) > objective(ref)


def test_the_gradient_of_the_whole_loss_is_eq_4_3() -> None:
    logits, ref = policies()
    logps, w, l = logits.log_softmax(0), 3, 7  # noqa: E741
    config, total = Config(alpha=ALPHA, beta=BETA), 0.0
    for y in range(NUM_ARMS):  # y of the reference, by enumeration
        trio, part = [w, l, y], SimpleNamespace(columns={"y": [2]})
        terms = loss_terms(logps[trio][None], ref[trio].log()[None], part, config)
        total = total + ref[y] * (terms[0] + terms[1]).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    policy = logits.detach().softmax(0)
    scores = torch.eye(NUM_ARMS, dtype=torch.float64) - policy  # row y: grad log pi(y)
    reward = BETA * (policy.log() - ref.log())
    expected = -BETA * (reward[l] - reward[w]).sigmoid() * (scores[w] - scores[l])
    for y in range(NUM_ARMS):
        measure = policy[y] * math.exp(-reward[y].item() / BETA)
        expected = expected + ALPHA * BETA * measure * scores[y]
    torch.testing.assert_close(gradient, expected)


# ------------------------------------------------------------------ the groups that are stepped


def random_ranking(num: int) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Prompts with four responses, a pair of each, and y; every case of y in turn."""
    batch, rng = make_batch([3] * num, [[2, 3, 1, 4]] * num), generator(1)
    picks = torch.rand(num, 4, generator=rng).argsort(1)
    chosen, rejected = picks[:, 0], picks[:, 1]
    y = picks[torch.arange(num), torch.arange(num) % 3]
    batch.ref_logps = torch.randn(num, 4, generator=rng)
    return batch, chosen, rejected, y


def test_y_is_a_third_response_only_where_it_is_neither_chosen_nor_rejected() -> None:
    batch, chosen, rejected, y = random_ranking(30)
    duels, trios = training_groups(batch, chosen, rejected, y)
    assert duels.response_ids.shape[1] == 2 and trios.response_ids.shape[1] == 3
    assert len(duels) == 20 and len(trios) == 10
    seen = set()
    for group in (duels, trios):
        for row, prompt in enumerate(group.columns["prompt"]):
            b = int(prompt.split()[1])
            seen.add(b)
            wanted = [int(chosen[b]), int(rejected[b])]
            wanted += [int(y[b])] if group is trios else []
            assert (y[b] in (chosen[b], rejected[b])) == (group is duels)
            assert group.responses[row] == [f"response {b} {n}" for n in wanted]
            assert wanted[group.columns["y"][row]] == y[b]
            assert group.columns["y"][row] == (2 if group is trios else int(y[b] == rejected[b]))
            for place, n in enumerate(wanted):
                assert real_ids(group, row, place) == real_ids(batch, b, n)
                assert group.ref_logps[row, place] == batch.ref_logps[b, n]
    assert seen == set(range(30))


def test_groups_may_be_empty() -> None:
    batch, chosen, rejected, _ = random_ranking(6)
    duels, trios = training_groups(batch, chosen, rejected, chosen)
    assert len(duels) == 6 and len(trios) == 0 and duels.columns["y"] == [0] * 6
    taken = [set(pair) for pair in zip(chosen.tolist(), rejected.tolist())]
    third = torch.tensor([min({0, 1, 2} - pair) for pair in taken])
    duels, trios = training_groups(batch, chosen, rejected, third)
    assert len(duels) == 0 and len(trios) == 6 and trios.columns["y"] == [2] * 6


@pytest.mark.parametrize("place", [0, 1])
def test_y_in_the_pair_has_there_the_log_probability_of_its_own_forward_pass(model, place) -> None:
    batch = make_batch([5, 3, 7], [[4, 2, 6], [1, 5, 3], [6, 6, 2]])
    y = torch.tensor([2, 0, 1])
    other = (y + 1) % 3
    pair = (y, other) if place == 0 else (other, y)
    group, _ = training_groups(batch, *pair, y)
    assert group.columns["y"] == [place] * 3
    with torch.no_grad():
        packed = common.response_logps(model, group)[:, place]
        plain = plain_token_logps(model, batch).sum(-1)[torch.arange(3), y]
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-3)


def perturbed(model: nn.Module, seed: int = 5) -> nn.Module:
    other = copy.deepcopy(model)
    rng = generator(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=rng)
    return other


def plain_terms(policy, reference, batch, chosen, rejected, y, config) -> tuple[Tensor, Tensor]:
    """DPO's part and the bonus, means over prompts, from one plain forward pass a response."""
    logps = plain_token_logps(policy, batch).sum(-1)
    with torch.no_grad():
        ref_logps = plain_token_logps(reference, batch).sum(-1)
    dpo, bonus = [], []
    for b in range(len(batch)):
        (w, l, y_), ref = (int(x[b]) for x in (chosen, rejected, y)), ref_logps[b]  # noqa: E741
        gap = config.beta * ((logps[b, w] - ref[w]) - (logps[b, l] - ref[l]))
        dpo.append(torch.log1p(torch.exp(-gap)))
        selms = config.alpha * config.beta * (logps[b, y_] - ref[y_])
        bonus.append(config.alpha * logps[b, y_] if config.bonus == "xpo" else selms)
    return sum(dpo) / len(batch), sum(bonus) / len(batch)


@pytest.mark.parametrize("bonus,micro", [("selm", 64), ("selm", 2), ("xpo", 64)])
def test_a_step_on_both_groups_has_the_gradient_of_a_plain_loop_over_prompts(model, bonus, micro):
    config = Config(bonus=bonus, alpha=ALPHA, beta=BETA, max_grad_norm=1e9, micro_batch_size=micro)
    reference, policy = model, perturbed(model)
    batch = make_batch([5, 3, 7, 4, 6], [[4, 2, 5], [1, 5, 3], [6, 6, 2], [2, 4, 4], [3, 1, 2]])
    y = torch.zeros(5, dtype=torch.long)  # best, worst, middle, middle, best
    chosen, rejected = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 0, 1, 2, 1])
    weights = list(policy.parameters())
    terms = plain_terms(policy, reference, batch, chosen, rejected, y, config)
    alone = [torch.autograd.grad(term, weights, retain_graph=True) for term in terms]
    expected = [dpo + bonus for dpo, bonus in zip(*alone)]
    groups = training_groups(batch, chosen, rejected, y)
    for group in groups:
        group.ref_logps = common.frozen_logps(reference, group, config)
    norms = selm.gradient_norms(policy, groups, config)
    for name, gradients in zip(("dpo_grad_norm", "bonus_grad_norm"), alone):
        total = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        assert norms[name] == pytest.approx(total, rel=1e-3)
    assert all(weight.grad is None for weight in weights)
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    common.update(
        policy, optimizer, groups, lambda *given: sum(loss_terms(*given, config)[:2]), config
    )
    largest = max(gradient.abs().max().item() for gradient in expected)
    for weight, old, gradient in zip(weights, before, expected):
        torch.testing.assert_close(old - weight, gradient, rtol=1e-2, atol=1e-4 * largest)


@pytest.mark.parametrize("bonus", ["selm", "xpo"])
def test_a_step_on_the_bonus_alone_makes_y_less_likely(model, bonus: str) -> None:
    config = Config(bonus=bonus, alpha=1.0, beta=1.0)
    batch, chosen, rejected, y = random_ranking(6)
    policy = copy.deepcopy(model)
    groups = [group for group in training_groups(batch, chosen, rejected, y) if len(group)]
    for group in groups:
        group.ref_logps = common.frozen_logps(model, group, config)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    common.update(policy, optimizer, groups, lambda *g: loss_terms(*g, config)[1], config)
    with torch.no_grad():
        before, after = (plain_token_logps(m, batch).sum(-1) for m in (model, policy))
    assert (after - before)[torch.arange(6), y].mean() < -1e-3


# ------------------------------------------------------------------ rankings and what they cost


def tournament(values: list[int]) -> tuple[int | None, int | None, int]:
    """Best, worst, and comparisons: in twos, then winners among themselves, and losers."""
    count, winners, losers = 0, [], []

    def is_less(a: int, b: int) -> bool:
        nonlocal count
        count += 1
        return a < b

    for a, b in zip(values[::2], values[1::2]):
        low, high = (a, b) if is_less(a, b) else (b, a)
        winners.append(high)
        losers.append(low)
    for both in (winners, losers) if len(values) % 2 else ():
        both.append(values[-1])
    for found in (winners, losers):
        while len(found) > 1:
            a, b = found.pop(), found.pop()
            found.append(b if is_less(a, b) == (found is winners) else a)
    return (winners or [None])[0], (losers or [None])[0], count


def test_best_and_worst_cost_as_many_comparisons_as_a_tournament_needs() -> None:
    assert [comparisons(n) for n in range(8)] == [0, 0, 1, 3, 4, 6, 7, 9]
    for n in range(1, 20):
        values = torch.randperm(n, generator=generator(n)).tolist()
        assert tournament(values) == (n - 1, 0, comparisons(n))


def ranked(texts, scores, num_queries=10**6, labels="bernoulli", queries=0, is_noisy=True):
    """`Run.rank` on texts whose scores are given; and the labels counted so far."""
    oracle = SimpleNamespace(queries=queries, score=lambda prompts, responses: scores.clone())
    config = Config(num_queries=num_queries, labels=labels)
    run = SimpleNamespace(config=config, oracle=oracle, lap=lambda phase: None)
    batch = SimpleNamespace(responses=texts, columns={"prompt": ["x"] * len(texts)})
    return *common.Run.rank(run, batch, comparisons, is_noisy), oracle.queries


def random_texts(num: int, width: int = 5) -> tuple[list[list[str]], Tensor]:
    """Texts of which some read the same; equal texts have equal scores."""
    rng = generator(num)
    letters = torch.randint(4, (num, width), generator=rng)
    texts = [["abcd"[i] + " " * n for n, i in enumerate(row)] for row in letters.tolist()]
    return texts, torch.randn(num, 4, generator=rng).gather(1, letters)


def test_without_noise_best_and_worst_are_the_extreme_scores_and_distinct_texts_are_counted():
    texts, scores = random_texts(50)
    best, worst, is_ranked, queries = ranked(texts, scores, labels="argmax")
    total = 0
    for b, row in enumerate(texts):
        values = {text.strip(): scores[b, n].item() for n, text in enumerate(row)}
        assert row[best[b]].strip() == max(values, key=values.get)
        assert row[worst[b]].strip() == min(values, key=values.get)
        assert is_ranked[b].sum() == len(values)
        total += math.ceil(1.5 * len(values)) - 2 if len(values) > 1 else 0
    assert queries == total
    for more in (dict(is_noisy=False), dict(labels="argmax", queries=7)):
        again = ranked(texts, scores, **more)
        assert torch.equal(again[0], best) and torch.equal(again[1], worst)


def test_a_noisy_ranking_of_two_has_the_bradley_terry_frequency() -> None:
    num = 20_000
    best, worst, _, queries = ranked([["a", "b"]] * num, torch.tensor([[1.0, 0.0]]).expand(num, 2))
    assert queries == num and bool((best != worst).all())
    share = (best == 0).double().mean().item()
    assert share == pytest.approx(sigmoid(1.0), abs=4 * 0.45 / num**0.5)


def test_a_noisy_ranking_of_three_has_plackett_luces_probabilities_of_best_and_worst() -> None:
    num, scores = 30_000, [0.8, -0.5, 0.1]
    best, worst, *_ = ranked([["a", "b", "c"]] * num, torch.tensor([scores]).expand(num, 3))
    seen = Counter(zip(best.tolist(), worst.tolist()))
    odds = [math.exp(score) for score in scores]
    for first, second, third in itertools.permutations(range(3)):
        chance = odds[first] / sum(odds) * odds[second] / (odds[second] + odds[third])
        spread = math.sqrt(chance * (1 - chance) / num)
        assert seen[first, third] / num == pytest.approx(chance, abs=4 * spread)


def test_the_noise_of_a_ranking_depends_on_the_labels_given_before() -> None:
    texts, scores = [["a", "b", "c"]] * 200, torch.zeros(200, 3)
    once, again, later = (ranked(texts, scores, queries=n)[0] for n in (5, 5, 6))
    assert torch.equal(once, again) and not torch.equal(once, later)


@pytest.mark.parametrize("budget", range(0, 14))
def test_at_the_end_fewer_texts_are_ranked_so_that_the_budget_is_met_exactly(budget: int) -> None:
    width, num = 3, 14
    texts = [["a", "b", "c"]] * num
    scores = torch.randn(num, width, generator=generator(budget))
    *_, is_ranked, queries = ranked(texts, scores, num_queries=100 + budget, queries=100)
    assert queries == 100 + budget
    left, sizes = budget, []
    for _ in range(num):  # as many of the first texts as can still be paid
        sizes.append(max(n for n in range(1, width + 1) if comparisons(n) <= left))
        left -= comparisons(sizes[-1])
    assert is_ranked.tolist() == [[n < size for n in range(width)] for size in sizes]


@pytest.mark.parametrize("num_queries", [10, 11, 13])
@pytest.mark.parametrize("arm", ["selm", "xpo", "ranker"])
def test_an_awkward_budget_is_met_exactly(arm: str, num_queries: int, flags) -> None:
    config = make(flags, num_queries=num_queries, batch_size=1, eval_every=100, **ARMS[arm])
    run = train(config)
    assert run.oracle.queries == metrics(run)[-1]["queries"] == num_queries


# ------------------------------------------------------------------ candidates


@torch.no_grad()
def greedy_ids(model: nn.Module, prompt: list[int], length: int, eos: int) -> list[int]:
    """The likeliest token after the likeliest token, each from a forward pass of its own."""
    ids: list[int] = []
    while len(ids) < length and eos not in ids:
        ids.append(int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_first_changes_the_first_response_to_the_argmax_and_no_other(model) -> None:
    batch = make_batch([5, 3, 9], [[1], [1], [1]])
    uniforms = torch.rand(3, 4, 8, generator=generator(3))
    prompts = [real_ids(batch, b, 0)[0] for b in range(3)]
    eos = greedy_ids(model, prompts[1], 8, -1)[3]  # so that a greedy response ends early

    def sampled(change) -> tuple[Tensor, Tensor]:
        decoder = change(common.PackedDecoder(model, batch, 4))
        return common.generate(decoder, uniforms, eos, temperature=0.7)

    ids, mask = sampled(selm.greedy_first)
    plain_ids, plain_mask = sampled(lambda decoder: decoder)
    width = min(ids.shape[-1], plain_ids.shape[-1])
    assert torch.equal(ids[:, 1:, :width], plain_ids[:, 1:, :width])
    assert torch.equal(mask[:, 1:, :width], plain_mask[:, 1:, :width])
    assert not torch.equal(ids[:, 0], plain_ids[:, 0])
    for b in range(3):
        expected = greedy_ids(model, prompts[b], 8, eos)
        assert ids[b, 0][mask[b, 0].bool()].tolist() == expected


def test_greedy_first_leaves_the_decoders_logits_as_they_are() -> None:
    logits = torch.randn(2, 3, 7, generator=generator(0))
    before = logits.clone()
    selm.greedy_first(lambda tokens: logits)(None)
    assert torch.equal(logits, before)


def test_y_is_the_greedy_response_of_the_iterations_reference(flags, rounds) -> None:
    run = train(make(flags, learning_rate=3e-3))
    assert {now.t for now in rounds} == {0, 1, 2}
    for now in rounds:
        for group in now.groups:
            for row, y in enumerate(group.columns["y"]):
                prompt, response = real_ids(group, row, y)
                eos = run.tokenizer.eos_token_id
                assert response == greedy_ids(now.snapshot, prompt, 6, eos)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_sampled_y_comes_from_the_reference_at_the_temperature(flags, rounds, temperature):
    config = make(flags, bonus_response="sample", learning_rate=3e-3, temperature=temperature)
    run = train(config)
    for now in rounds:
        rng = generator(0, "round", now.number)
        sampled = run.respond(
            lambda part, model=now.snapshot: common.PackedDecoder(model, part, 1),
            now.prompts, 1, rng, temperature,
        )  # fmt: skip
        texts = dict(zip(now.prompts.columns["prompt"], sampled.responses))
        for group in now.groups:
            for row, y in enumerate(group.columns["y"]):
                assert [group.responses[row][y]] == texts[group.columns["prompt"][row]]


@pytest.fixture
def reader(tokenizer) -> SimpleNamespace:
    """What own_responses reads of a run, whose tokenizer pads with EOS."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return SimpleNamespace(tokenizer=tokenizer, config=Config(max_new_tokens=12))


def with_texts(texts: list) -> Batch:
    batch = make_batch([3] * len(texts), [[1]] * len(texts))
    batch.columns["other"] = texts
    return batch


@pytest.mark.parametrize("is_chat", [False, True])
def test_own_responses_are_the_text_after_a_space_or_a_template_and_eos(reader, is_chat) -> None:
    if is_chat:
        reader.tokenizer.chat_template = "{{ messages[0].content }}"
    texts = [" the cat\n", "keyboard", "a"]
    batch = selm.own_responses(with_texts(texts), "other", reader)
    assert [row[0].strip() for row in batch.responses] == ["the cat", "keyboard", "a"]
    for b, text in enumerate(texts):
        *ids, last = real_ids(batch, b, 0)[1]
        assert last == reader.tokenizer.eos_token_id and last not in ids
        assert reader.tokenizer.decode(ids) == ("" if is_chat else " ") + text.strip()
    reader.config = Config(max_new_tokens=12, chat_template="off")
    batch = selm.own_responses(with_texts(texts), "other", reader)
    assert reader.tokenizer.decode(real_ids(batch, 0, 0)[1][:-1]) == " the cat"


def test_own_responses_are_cut_at_the_limit_and_then_have_no_eos(reader) -> None:
    full = reader.tokenizer(" zqzqzqzqz")["input_ids"]
    eos = reader.tokenizer.eos_token_id
    for limit in range(1, len(full) + 3):
        reader.config.max_new_tokens = limit
        batch = selm.own_responses(with_texts(["zqzqzqzqz", "z"]), "other", reader)
        assert real_ids(batch, 0, 0)[1] == (full + [eos])[:limit]
        assert (eos in real_ids(batch, 0, 0)[1]) == (limit > len(full))


def test_an_empty_or_missing_text_is_one_eos(reader) -> None:
    batch = selm.own_responses(with_texts([None, "", "  ", "cat"]), "other", reader)
    for b in range(3):
        assert batch.responses[b] == [""]
        assert real_ids(batch, b, 0)[1] == [reader.tokenizer.eos_token_id]
    assert len(real_ids(batch, 3, 0)[1]) > 1


def test_a_further_sample_is_drawn_only_where_there_would_be_nothing_to_rank() -> None:
    for columns, number in (({}, 2), ({"reference"}, 1), ({"other"}, 1)):
        prompts = SimpleNamespace(columns=dict.fromkeys({"prompt"} | set(columns)))
        assert selm.num_samples(Config(), prompts) == number
        for further in (0, 3):
            config = Config(ranker_candidates=further)
            assert selm.num_samples(config, prompts) == 1 + further
    prompts = SimpleNamespace(columns={"prompt": [], "second": []})
    assert selm.num_samples(Config(other_column="second"), prompts) == 1


# ------------------------------------------------------------------ slices and iterations


def file_of(num: int, *more: str) -> SimpleNamespace:
    """A run that has only prompts, numbered in file order, and these other columns."""
    ids, none = torch.ones(num, 1, dtype=torch.long), torch.zeros(num, 0, 0, dtype=torch.long)
    columns = {name: [f"{name} {i}" for i in range(num)] for name in ("prompt", *more)}
    return SimpleNamespace(prompts=Batch(columns, ids, ids, [[]] * num, none, none))


@pytest.mark.parametrize("num,parts,size", [(61135, 4, 15283), (61135, 3, 20378), (40, 3, 13)])
def test_slices_are_disjoint_contiguous_and_in_file_order(num, parts, size) -> None:
    config = Config(num_iterations=parts, num_queries=12)
    found = selm.slices(config, file_of(num, "reference", "other"))
    assert [len(part) for part in found] == [size] * parts
    names = [name for part in found for name in part.columns["prompt"]]
    assert names == [f"prompt {i}" for i in range(size * parts)]


@pytest.mark.parametrize(
    "columns,more,cost",
    [
        (("reference", "other"), {}, 3),
        (("reference",), {}, 1),
        ((), {}, 1),
        ((), dict(ranker_candidates=3), 4),
        (("reference", "other"), dict(ranker_candidates=2), 6),
        (("reference", "other"), dict(bonus="xpo"), 1),
        (("reference", "other"), dict(first_iteration="offline"), 1),
    ],
)
def test_a_data_set_with_one_prompt_too_few_is_refused(columns, more, cost) -> None:
    enough = 3 * 10
    for queries, is_enough in ((3 * 10 * cost, True), (3 * 10 * cost + 1, False)):
        config = Config(num_queries=queries, **more)
        if is_enough:
            assert len(selm.slices(config, file_of(enough, *columns))) == 3
        else:
            with pytest.raises(common.UserError, match="10 prompts an iteration, not the 11"):
                selm.slices(config, file_of(enough, *columns))


def test_no_prompt_serves_two_iterations_and_each_comes_from_its_slice(flags, folder, rounds):
    for arm in ("selm", "xpo", "offline"):
        rounds.clear()
        config = make(flags, overwrite=True, **ARMS[arm])
        run = train(config)
        size = 40 // config.num_iterations
        numbers = {r["prompt"]: i for i, r in enumerate(rows(folder / "train.jsonl"))}
        iteration = {now.number: now.t for now in rounds}
        assert set(iteration.values()) == set(range(config.num_iterations))
        pairs = rows(run.folder / "preferences.jsonl")
        assert pairs and len({pair["prompt"] for pair in pairs}) == len(pairs)
        for pair in pairs:
            assert numbers[pair["prompt"]] // size == iteration[pair["round"]]
        drawn = [prompt for now in rounds for prompt in now.prompts.columns["prompt"]]
        assert len(set(drawn)) == len(drawn)


def test_no_prompt_comes_twice_in_an_iteration_or_the_run_is_refused(flags, rounds) -> None:
    """13 prompts an iteration, 13 labels, rounds of 4: the fourth round has one prompt left."""
    config = make(flags, num_queries=39, batch_size=4, first_iteration="offline")
    try:
        run = train(config)
    except common.UserError:
        return
    assert run.oracle.queries == 39
    drawn = [(now.t, prompt) for now in rounds for prompt in now.prompts.columns["prompt"]]
    assert [key for key, count in Counter(drawn).items() if count > 1] == []


def test_texts_that_read_the_same_cost_less_but_repeat_no_prompt(flags, rounds, tmp_path) -> None:
    """Where both of the data set's texts are equal a prompt brings one label, not three."""
    data = [dict(prompt=f"The cat {i}", reference="cat", other=" cat ") for i in range(40)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    config = make(flags, dataset=str(tmp_path / "same.jsonl"), num_queries=90)
    try:
        train(config)
    except common.UserError:
        return
    drawn = [(now.t, prompt) for now in rounds for prompt in now.prompts.columns["prompt"]]
    assert [key for key, count in Counter(drawn).items() if count > 1] == []


def test_every_iteration_gets_its_share_of_the_labels_or_the_run_is_refused(flags, rounds) -> None:
    """A round of 4 prompts costs 12 labels, all that three iterations have."""
    try:
        train(make(flags, num_queries=12, batch_size=4))
    except common.UserError:
        return
    assert {now.t for now in rounds} == {0, 1, 2}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_finishes_with_all_labels_and_iterations(arm: str, flags, steps) -> None:
    config = make(flags, **ARMS[arm])
    run = train(config)
    last = metrics(run)[-1]
    assert last["queries"] == 36 and last["iteration"] == config.num_iterations
    assert last["gradient_steps"] == len(steps) > 0
    drawn = {"selm": 1, "sample": 1, "ranker": 3, "none": 1, "xpo": 2}.get(arm)
    if drawn:
        assert last["candidates"] == last["decoder_streams"] == drawn * 2 * last["rounds"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert same_weights(loaded, run.policy) and not same_weights(loaded, run.ref_model)


def test_an_evaluation_closes_every_iteration_and_its_number_counts_from_one(flags) -> None:
    table = metrics(train(make(flags, eval_every=1000)))
    assert [(row["queries"], row["iteration"]) for row in table] == [
        (0, 0), (12, 1), (24, 2), (36, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("arm", ["selm", "none", "offline", "xpo"])
def test_the_reference_is_the_policy_at_the_iterations_start_and_for_xpo_the_initial_model(
    arm: str, flags, rounds
) -> None:
    run = train(make(flags, learning_rate=3e-3, **ARMS[arm]))
    start = transformers.AutoModelForCausalLM.from_pretrained(flags["model"])
    assert same_weights(run.ref_model, start)
    first = {}
    for now in rounds:
        is_new = now.t not in first
        first.setdefault(now.t, now.policy)
        assert same_weights(now.snapshot, first[now.t])
        assert same_weights(now.snapshot, now.policy) == is_new
        reference = start if arm == "xpo" else first[now.t]
        for group in now.groups:
            if len(group):
                with torch.no_grad():
                    expected = plain_token_logps(reference, group).sum(-1)
                torch.testing.assert_close(group.ref_logps, expected, rtol=1e-4, atol=1e-3)
    assert len(first) == (2 if arm == "offline" else 3)
    assert same_weights(run.parts["snapshot"], first[max(first)])


@pytest.mark.parametrize("arm", ["selm", "sample", "ranker", "none"])
def test_at_the_first_step_of_an_iteration_the_loss_is_log_2_and_the_bonus_zero(
    arm: str, flags, rounds, steps
) -> None:
    run = train(make(flags, num_queries=90, batch_size=4, eval_every=1, **ARMS[arm]))
    widths, first = set(), {}
    for now, step in zip(rounds, steps, strict=True):
        if now.t not in first:
            first[now.t] = now.number
            for seen in step.parts:
                widths.add(seen.logps.shape[1])
                assert torch.equal(seen.logps, seen.ref_logps)
                assert torch.equal(seen.losses, torch.full_like(seen.losses, math.log(2)))
    assert widths == {2, 3} and len(first) == 3
    table = metrics(run)[1:]
    for number in first.values():
        assert table[number]["y_log_ratio"] == 0.0
        assert table[number]["loss"] == torch.tensor(math.log(2)).item()
    assert any(row["y_log_ratio"] != 0.0 for row in table)


@pytest.mark.parametrize("response", ["greedy", "sample"])
def test_alpha_zero_is_iterative_dpo_byte_for_byte(response, flags, tmp_path) -> None:
    runs = [
        train(
            make(
                flags,
                output_dir=str(tmp_path / f"{bonus}{alpha}"),
                bonus=bonus,
                alpha=alpha,
                bonus_response=response,
            )
        )  # fmt: skip
        for bonus, alpha in (("selm", 0.0), ("none", None), ("selm", 0.5))
    ]
    selm_0, none, half = (contents(run.folder) for run in runs)
    assert selm_0 == none
    assert half["model/model.safetensors"] != none["model/model.safetensors"]


def test_the_rate_follows_its_factors_and_warms_up_with_a_fresh_optimiser(flags, rounds, steps):
    factors = [1.0, 0.5, 0.25]
    more = dict(warmup_steps=1, num_queries=54, learning_rate=1e-3)
    train(make(flags, learning_rate_factors=factors, **more))
    expected, fresh = [], []
    for now in rounds:
        place = sum(other.t == now.t for other in rounds[: now.number])
        expected.append(1e-3 * factors[now.t] * (0.5 if place == 0 else 1.0))
        fresh.append(place == 0)
    assert [step.rate for step in steps] == pytest.approx(expected) and len(steps) == 9
    assert [step.num_states == 0 for step in steps] == fresh


@pytest.mark.parametrize("num,factors", [(1, [1.0]), (2, [1, 0.2]), (3, [1, 0.6, 0.2])])
def test_the_factors_go_evenly_from_1_to_a_fifth_unless_given(num: int, factors) -> None:
    assert Config(num_iterations=num).learning_rate_factors == pytest.approx(factors)


# ------------------------------------------------------------------ the other arms


def test_xpo_trains_on_samples_of_the_start_and_of_the_frozen_reference_which_is_y(flags, rounds):
    run = train(make(flags, bonus="xpo", learning_rate=3e-3, labels="argmax"))
    is_first = set()
    for now in rounds:
        rng, sampled = generator(0, "round", now.number), []
        for model in (now.snapshot, run.ref_model):
            decoder = lambda part, model=model: common.PackedDecoder(model, part, 1)  # noqa: E731
            sampled.append(run.respond(decoder, now.prompts, 1, rng, 1.0).responses)
        duels = {p: (a[0], b[0]) for p, a, b in zip(now.prompts.columns["prompt"], *sampled)}
        for group in now.groups:
            assert group.response_ids.shape[1] == 2 or not len(group)
            for row, y in enumerate(group.columns["y"]):
                own, theirs = duels[group.columns["prompt"][row]]
                assert group.responses[row][y] == theirs and group.responses[row][1 - y] == own
                assert value_of(group.responses[row][0]) > value_of(group.responses[row][1])
                is_first.add(y)
    assert is_first == {0, 1}


def test_xpo_replays_as_many_old_pairs_a_past_iteration_as_it_has_new_ones(flags, rounds, steps):
    run = train(make(flags, bonus="xpo"))
    pairs = rows(run.folder / "preferences.jsonl")
    iteration = {now.number: now.t for now in rounds}
    where = {(p["prompt"], p["chosen"], p["rejected"]): iteration[p["round"]] for p in pairs}
    replayed, last = set(), max(iteration.values())
    for now, step in zip(rounds, steps, strict=True):
        new, *old = step.groups
        assert len(new) == sum(p["round"] == now.number for p in pairs) == 2
        assert sum(map(len, old)) == now.t * len(new)
        for group in old:
            assert group.ref_logps is not None
            keys = [(x, *y) for x, y in zip(group.columns["prompt"], group.responses)]
            assert len(set(keys)) == len(keys)
            assert all(where[key] < now.t for key in keys)
            replayed.update(keys if now.t == last else ())
            with torch.no_grad():
                expected = plain_token_logps(run.ref_model, group).sum(-1)
            torch.testing.assert_close(group.ref_logps, expected, rtol=1e-4, atol=1e-3)
    assert {where[key] for key in replayed} == {0, 1} and len(replayed) > 8
    assert sum(map(len, run.parts["replay"].parts)) == len(pairs) == 36


def test_only_xpo_replays(flags, rounds, steps) -> None:
    run = train(make(flags))
    for now, step in zip(rounds, steps, strict=True):
        assert sum(map(len, step.groups)) == len(now.prompts)
    assert run.parts["replay"].parts == []


def test_an_offline_iteration_is_plain_dpo_on_the_data_sets_own_pairs(flags, folder, rounds, steps):
    config = make(flags, labels="argmax", alpha=3.0, eval_every=1, **ARMS["offline"])
    run = train(config)
    data = {row["prompt"]: row for row in rows(folder / "train.jsonl")}
    offline = {now.number for now in rounds if now.t == 0}
    assert len(offline) == 9
    pairs = rows(run.folder / "preferences.jsonl")
    for pair in pairs:
        own = [data[pair["prompt"]][name] for name in ("reference", "other")]
        if pair["round"] in offline:
            assert sorted((pair["chosen"].strip(), pair["rejected"].strip())) == sorted(own)
            assert pair["chosen"].strip() == max(own, key=value_of)
    assert any(
        p["chosen"].strip() == data[p["prompt"]]["other"] for p in pairs if p["round"] in offline
    )
    for now, step in zip(rounds, steps, strict=True):
        total = Counter()
        for seen in step.parts:
            gaps = (seen.logps - seen.ref_logps)[:, :2].double()
            plain = torch.log1p((-config.beta * (gaps[:, 0] - gaps[:, 1])).exp())
            total["more"] += (seen.losses - plain).abs().max().item()
        is_first = now.number in (0, 9)  # where the log-ratios are zero
        assert (total["more"] < 1e-6) == (now.t == 0 or is_first)
    names = {"y_best", "y_middle", "y_worst", "y_log_ratio", "bonus_grad_norm", "dpo_grad_norm"}
    for row in metrics(run)[1:]:
        assert names & row.keys() == (names if row["iteration"] == 2 else set())


def test_chosen_and_rejected_are_best_and_worst_of_y_further_samples_and_the_data_sets_two(
    flags, folder, rounds
) -> None:
    run = train(make(flags, labels="argmax", num_queries=72, **ARMS["ranker"]))
    data = {row["prompt"]: row for row in rows(folder / "train.jsonl")}
    pairs = {(p["round"], p["prompt"]): p for p in rows(run.folder / "preferences.jsonl")}
    for now in rounds:
        decoder = lambda part, model=now.snapshot: selm.greedy_first(  # noqa: E731
            common.PackedDecoder(model, part, 3)
        )
        rng = generator(0, "round", now.number)
        sampled = run.respond(decoder, now.prompts, 3, rng, 1.0).responses
        for prompt, texts in zip(now.prompts.columns["prompt"], sampled):
            everything = [*texts, data[prompt]["reference"], data[prompt]["other"]]
            pair = pairs[now.number, prompt]
            assert pair["chosen"].strip() == max(everything, key=value_of).strip()
            assert pair["rejected"].strip() == min(everything, key=value_of).strip()
            assert pair["source"] == "oracle"


@pytest.mark.parametrize("labels", ["bernoulli", "argmax"])
def test_the_rankings_of_a_run_err_unless_labels_are_argmax(labels: str, flags) -> None:
    run = train(make(flags, labels=labels, num_queries=72))
    pairs = rows(run.folder / "preferences.jsonl")
    errors = sum(value_of(pair["chosen"]) < value_of(pair["rejected"]) for pair in pairs)
    assert (errors > 0) == (labels == "bernoulli")


def test_a_data_set_of_prompts_alone_is_ranked_between_two_samples(flags, rounds, tmp_path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"The cat {i}"}) + "\n" for i in range(40)))
    more = dict(dataset=str(data), num_queries=12)
    run = train(make(flags, **more))
    assert metrics(run)[-1]["queries"] == 12 and metrics(run)[-1]["y_middle"] == 0
    assert {
        group.response_ids.shape[1] for now in rounds for group in now.groups if len(group)
    } == {2}
    for further in ({"ranker_candidates": 0}, {"first_iteration": "offline"}):
        name = "ranker_candidates" if "ranker_candidates" in further else "other_column"
        with pytest.raises(common.UserError, match=f"--{name}"):
            train(make(flags, **more, overwrite=True, **further))
    train(make(flags, **more, overwrite=True, bonus="xpo"))


def test_another_column_can_be_the_second_response(flags, folder, tmp_path) -> None:
    data = [dict(row, second=f"dog {i}") for i, row in enumerate(rows(folder / "train.jsonl"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    config = make(flags, dataset=str(tmp_path / "data.jsonl"), other_column="second",
                  first_iteration="offline", num_queries=9)  # fmt: skip
    pairs = rows(train(config).folder / "preferences.jsonl")
    texts = {text.strip() for pair in pairs for text in (pair["chosen"], pair["rejected"])}
    assert any(text.startswith("dog") for text in texts)
    assert not any(text.startswith("a cat") for text in texts)


@pytest.mark.parametrize("arm", ["selm", "sample", "none", "xpo", "offline"])
def test_a_run_that_was_cut_and_resumed_equals_one_that_was_not(arm: str, flags, tmp_path) -> None:
    more = dict(learning_rate=3e-3, eval_every=5, **ARMS[arm])
    whole = train(make(flags, output_dir=str(tmp_path / "whole"), **more))
    config = make(flags, output_dir=str(tmp_path / "halves"), checkpoint_every=1, **more)

    class Stopped(Exception):
        pass

    class Flaky(Rule):
        def score(self, prompts, responses):
            is_training = "train" in prompts[0]
            if is_training and self.queries >= (24 if arm == "offline" else 18):
                raise Stopped  # in the middle of a round in the middle of the second iteration
            return super().score(prompts, responses)

    with pytest.raises(Stopped):
        selm.train(config, Flaky(config))
    counts = torch.load(Path(config.output_dir) / "checkpoint.pt", weights_only=True)["counts"]
    assert counts["iteration"] == 2 and counts["queries"] == {"offline": 24, "xpo": 16}.get(arm, 18)
    train(dataclasses.replace(config, resume=True))
    assert contents(whole.folder) == contents(tmp_path / "halves")


def test_a_run_that_is_prolonged_goes_on_in_its_last_iteration(flags, rounds) -> None:
    config = make(flags)
    train(config)
    num_rounds = len(rounds)
    run = train(dataclasses.replace(config, resume=True, num_queries=60))
    assert run.oracle.queries == 60 and len(rounds) > num_rounds
    assert {now.t for now in rounds[num_rounds:]} == {2}


# ------------------------------------------------------------------ what is logged


def test_the_shares_of_y_are_those_counted_in_the_iteration_so_far(flags, monkeypatch) -> None:
    calls, rank = [], common.Run.rank

    def listening(run, *given, **named):
        best, worst, is_ranked = rank(run, *given, **named)
        calls.append((run.counts["iteration"], best.tolist(), worst.tolist()))
        return best, worst, is_ranked

    monkeypatch.setattr(common.Run, "rank", listening)
    table = metrics(train(make(flags, num_queries=82, batch_size=3, eval_every=1)))[1:]
    assert len(table) == len(calls) > 8
    for number, row in enumerate(table):
        cases = Counter()
        for iteration, best, worst in calls[: number + 1]:
            if iteration == row["iteration"]:
                cases.update(
                    "y_best" if b == 0 else "y_worst" if w == 0 else "y_middle"
                    for b, w in zip(best, worst) if b != w
                )  # fmt: skip
        shares = {name: row[name] for name in ("y_best", "y_middle", "y_worst")}
        assert sum(shares.values()) == pytest.approx(1.0)
        for name, share in shares.items():
            assert share == pytest.approx(cases[name] / sum(cases.values()))
    assert min(max(row[name] for row in table) for name in ("y_best", "y_middle", "y_worst")) > 0


@pytest.mark.parametrize("arm", ["selm", "xpo"])
@pytest.mark.parametrize("micro", [64, 2])
def test_both_divergences_and_both_gradients_equal_plain_loops(arm, micro, flags, steps) -> None:
    more = dict(alpha=0.4, learning_rate=3e-3, batch_size=4, micro_batch_size=micro, seed=1)
    run = train(make(flags, num_queries=72 if arm == "selm" else 24, **more, **ARMS[arm]))
    last, config, policy = metrics(run)[-1], run.config, run.policy
    reference = run.ref_model if arm == "xpo" else run.parts["snapshot"]
    for name, stream, sampler, sign in (
        ("kl_iteration", "evaluation", policy, 1), ("forward_kl", "forward kl", reference, -1),
    ):  # fmt: skip
        batch = run.respond(
            lambda part, model=sampler: common.PackedDecoder(model, part, 1),
            run.eval_prompts, 1, generator(1, stream), 1.0,
        )  # fmt: skip
        with torch.no_grad():
            logps, ref_logps = (plain_token_logps(m, batch) for m in (policy, reference))
        gaps = [sign * (logps[b].sum() - ref_logps[b].sum()).item() for b in range(len(batch))]
        assert last[name] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3) and abs(last[name]) > 0
    totals, num = [0.0, 0.0], sum(map(len, steps[-1].groups))
    for group in steps[-1].groups:
        y, first = torch.tensor(group.columns["y"]), torch.zeros(len(group)).long()
        terms = plain_terms(policy, reference, group, first, first + 1, y, config)
        totals = [total + term * len(group) / num for total, term in zip(totals, terms)]
    for name, total in zip(("dpo_grad_norm", "bonus_grad_norm"), totals):
        gradients = torch.autograd.grad(total, list(policy.parameters()), retain_graph=True)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        assert last[name] == pytest.approx(norm, rel=1e-3) and norm > 0


@pytest.mark.parametrize("arm", ["selm", "xpo"])
def test_the_log_ratio_of_y_is_the_mean_over_the_pairs_of_the_step(arm, flags, steps) -> None:
    more = dict(learning_rate=3e-3, batch_size=3, eval_every=1, micro_batch_size=2)
    table = metrics(train(make(flags, num_queries=36, **more, **ARMS[arm])))[1:]
    for row, step in zip(table, steps, strict=True):
        values = [
            (seen.logps[b, y] - seen.ref_logps[b, y]).item()
            for seen in step.parts
            for b, y in enumerate(seen.part.columns["y"])
        ]
        assert len(values) == sum(map(len, step.groups))
        assert row["y_log_ratio"] == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_evaluations_change_no_training_number(flags, tmp_path) -> None:
    often, seldom = (
        contents(train(make(flags, eval_every=n, output_dir=str(tmp_path / str(n)))).folder)
        for n in (1, 1000)
    )
    for name in ("preferences.jsonl", "model/model.safetensors"):
        assert often[name] == seldom[name]


def test_a_loss_below_zero_is_counted_and_said_once_an_iteration_with_its_remedy(
    flags, rounds, steps, capsys
) -> None:
    more = dict(alpha=1e4, learning_rate=1e-3, num_queries=54, eval_every=1)
    table = metrics(train(make(flags, **more)))[1:]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "--bonus_floor" in line]
    losses, expected = [step.result["loss"] for step in steps], []
    for now in rounds:
        past = [r for r in rounds[: now.number + 1] if r.t == now.t]
        expected.append(sum(losses[r.number] < 0 for r in past))
    assert [row["negative_losses"] for row in table] == expected and max(expected) > 1
    guilty = [r.number for r in rounds if losses[r.number] < 0 and expected[r.number] == 1]
    assert len(warnings) == len(guilty)
    assert all(f"round {number}:" in line for number, line in zip(guilty, warnings))


def test_a_floor_keeps_the_loss_of_a_greedy_run_from_falling_below_zero(flags, capsys) -> None:
    more = dict(alpha=1e4, learning_rate=1e-3, num_queries=54, eval_every=1, bonus_floor=1e-4)
    table = metrics(train(make(flags, **more)))[1:]
    assert "--bonus_floor" not in capsys.readouterr().out
    assert all(row["negative_losses"] == 0 for row in table)


# ------------------------------------------------------------------ contradictions


@pytest.mark.parametrize(
    "more,word",
    [
        (dict(bonus="none", alpha=1e-3), "--alpha"),
        (dict(bonus="xpo", ranker_candidates=0), "xpo"),
        (dict(bonus="xpo", ranker_candidates=2), "xpo"),
        (dict(bonus="xpo", first_iteration="offline"), "xpo"),
        (dict(learning_rate_factors=[1.0, 0.5]), "learning_rate_factors"),
        (dict(num_iterations=2, learning_rate_factors=[1.0, 0.5, 0.2]), "learning_rate_factors"),
        (dict(num_queries=2), "--num_queries 2"),
        (dict(alpha=-1.0), "--alpha"),
        (dict(ranker_candidates=-1), "--ranker_candidates"),
        (dict(bonus_floor=0.0), "--bonus_floor"),
        (dict(bonus="other"), "--bonus"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(more: dict, word: str) -> None:
    with pytest.raises(common.UserError, match=word):
        Config(**more)


def test_too_few_prompts_for_the_labels_are_refused_in_a_sentence(flags) -> None:
    with pytest.raises(common.UserError, match="13 prompts an iteration, not the 14"):
        train(make(flags, num_queries=40, bonus="xpo"))


def test_alpha_is_that_of_its_method_and_the_folder_bears_the_arms_name() -> None:
    assert Config().alpha == 1e-3 and Config(bonus="xpo").alpha == 1e-5
    assert Config(bonus="none").alpha == 0.0 and Config(bonus="none", alpha=0.0).alpha == 0.0
    names = [
        Config(**ARMS[arm], seed=3).output_dir
        for arm in ("selm", "sample", "none", "xpo", "offline")
    ]
    arms = ("selm", "selm-sample", "none", "xpo", "selm-offline")
    assert names == [f"runs/selm-{arm}-3" for arm in arms]
