"""Does each formula give the numbers of its definition? Expected values come from other algebra."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, real_ids
from torch import Tensor

from common import (
    dpo,
    generator,
    gold_score,
    ipo,
    margin,
    response_logps,
    sample_tokens,
    slic,
    win_metrics,
)

LOSSES = [dpo, ipo, slic]
LOGPS = torch.tensor([[-1.0, -2.0], [-7.5, -3.0], [-40.0, -41.0]], dtype=torch.double)
REF_LOGPS = torch.tensor([[-1.5, -1.0], [-7.0, -4.0], [-40.0, -20.0]], dtype=torch.double)
MARGINS = [1.5, -1.5, 21.0]  # (-1 + 1.5) - (-2 + 1) and so on


# ------------------------------------------------------------------ log-probabilities


def log_softmax_of(logits: list[float], token: int) -> float:
    largest = max(logits)
    return logits[token] - largest - math.log(math.fsum(math.exp(x - largest) for x in logits))


@torch.no_grad()
def test_response_logps_equal_a_python_loop_over_a_softmax(model) -> None:
    batch = make_batch([5, 9], [[3, 6], [1, 4]])
    logps = response_logps(model, batch)
    assert logps.shape == (2, 2) and logps.dtype == torch.float32
    for b in range(2):
        for n in range(2):
            prompt, response = real_ids(batch, b, n)
            rows = model(torch.tensor([prompt + response])).logits[0].tolist()
            total = 0.0
            for t, token in enumerate(response):
                total += log_softmax_of(rows[len(prompt) + t - 1], token)
            assert logps[b, n].item() == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_response_logps_equal_minus_the_summed_cross_entropy(model) -> None:
    batch = make_batch([4, 8], [[2, 5], [7, 3]], seed=1)
    for b in range(2):
        for n in range(2):
            prompt, response = real_ids(batch, b, n)
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            loss = F.cross_entropy(logits, torch.tensor(response), reduction="sum")
            torch.testing.assert_close(response_logps(model, batch)[b, n], -loss, rtol=1e-5, atol=0)


# ------------------------------------------------------------------ losses


def test_the_margin_is_the_gap_of_log_ratios_chosen_minus_rejected() -> None:
    assert margin(LOGPS, REF_LOGPS).tolist() == MARGINS


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    swapped = margin(LOGPS.flip(1), REF_LOGPS.flip(1))
    torch.testing.assert_close(swapped, -margin(LOGPS, REF_LOGPS))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_minus_log_bradley_terry_of_the_likelihood_ratios(beta: float) -> None:
    for row, loss in enumerate(dpo(LOGPS, REF_LOGPS, beta).tolist()):
        ratios = [math.exp(p) / math.exp(q) for p, q in zip(LOGPS[row], REF_LOGPS[row])]
        chosen, rejected = (ratio**beta for ratio in ratios)
        assert loss == pytest.approx(math.log(chosen + rejected) - math.log(chosen), rel=1e-9)


def test_ipo_is_the_squared_distance_of_the_margin_from_one_over_two_beta() -> None:
    # beta 0.1: target 5; (1.5 - 5)^2, (-1.5 - 5)^2, (21 - 5)^2
    torch.testing.assert_close(ipo(LOGPS, REF_LOGPS, 0.1).tolist(), [12.25, 42.25, 256.0])
    torch.testing.assert_close(ipo(LOGPS, REF_LOGPS, 0.5).tolist(), [0.25, 6.25, 400.0])


def test_slic_is_a_hinge_at_margin_one_over_beta() -> None:
    torch.testing.assert_close(slic(LOGPS, REF_LOGPS, 0.1).tolist(), [0.85, 1.15, 0.0])
    torch.testing.assert_close(slic(LOGPS, REF_LOGPS, 0.5).tolist(), [0.25, 1.75, 0.0])


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_passes_gradcheck(loss) -> None:
    logps = LOGPS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, REF_LOGPS, 0.3), logps)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_one_number_a_pair_and_pulls_chosen_up_and_rejected_down(loss) -> None:
    logps = LOGPS[:2].clone().requires_grad_()
    losses = loss(logps, REF_LOGPS[:2], 0.1)
    assert losses.shape == (2,)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()


def test_dpo_starts_at_log_2_with_gradient_beta_over_2() -> None:
    logps = REF_LOGPS.clone().requires_grad_()
    losses = dpo(logps, REF_LOGPS, 0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradient, torch.tensor([[-0.05, 0.05]] * 3, dtype=torch.double))


def test_dpo_stays_finite_at_huge_margins_and_is_linear_where_the_pair_is_wrong() -> None:
    logps = torch.tensor([[-1e5, 0.0], [0.0, -1e5]])
    torch.testing.assert_close(dpo(logps, torch.zeros(2, 2), 0.1), torch.tensor([1e4, 0.0]))


def test_ipo_is_zero_with_zero_gradient_at_its_target_only() -> None:
    logps = torch.tensor([[2.5, 0.0], [2.6, 0.0], [2.4, 0.0]], dtype=torch.double).requires_grad_()
    losses = ipo(logps, torch.zeros(3, 2), 0.2)  # 1 / (2 * 0.2) = 2.5
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(losses.tolist(), [0.0, 0.01, 0.01])
    torch.testing.assert_close(gradient[:, 0].tolist(), [0.0, 0.2, -0.2])


def test_slic_is_zero_with_zero_gradient_beyond_its_margin() -> None:
    logps = torch.tensor([[4.9, 0.0], [5.1, 0.0]], dtype=torch.double).requires_grad_()
    losses = slic(logps, torch.zeros(2, 2), 0.2)  # 1 / 0.2 = 5
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(losses.tolist(), [0.02, 0.0])
    torch.testing.assert_close(gradient.tolist(), [[-0.2, 0.2], [0.0, 0.0]])


@pytest.mark.parametrize("loss", [dpo, slic])
def test_beta_only_scales_the_log_ratios(loss) -> None:
    scaled = loss(3 * LOGPS, 3 * REF_LOGPS, 0.1)
    torch.testing.assert_close(loss(LOGPS, REF_LOGPS, 0.3), scaled)


def test_ipo_scales_with_one_over_beta_squared() -> None:
    scaled = ipo(3 * LOGPS, 3 * REF_LOGPS, 0.1)
    torch.testing.assert_close(9 * ipo(LOGPS, REF_LOGPS, 0.3), scaled)


# ------------------------------------------------------------------ sampling


def sample_one(logits: list[float], uniform: float, temperature: float = 1.0) -> int:
    return sample_tokens(torch.tensor([[logits]]), torch.tensor([[uniform]]), temperature).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_evenly_spread_uniforms_draw_each_token_as_often_as_the_softmax_says(
    temperature: float,
) -> None:
    logits, count = [0.3, -1.2, 2.0, 0.0, -3.0], 4000
    uniforms = (torch.arange(count) + 0.5).view(4, 1000) / count
    tokens = sample_tokens(torch.tensor(logits).expand(4, 1000, 5), uniforms, temperature)
    weights = [math.exp(x / temperature) for x in logits]
    for token, weight in enumerate(weights):
        expected = count * weight / sum(weights)
        assert abs((tokens == token).sum().item() - expected) <= 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_random_uniforms_draw_each_token_as_the_softmax_within_five_standard_errors(
    temperature: float,
) -> None:
    rng, count = torch.Generator().manual_seed(0), 20_000
    logits = torch.randn(6, generator=rng) * 2
    uniforms = torch.rand(2, count // 2, generator=rng)
    tokens = sample_tokens(logits.expand(2, count // 2, 6), uniforms, temperature)
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    for token, weight in enumerate(weights):
        share = weight / sum(weights)
        error = math.sqrt(share * (1 - share) / count)
        assert abs((tokens == token).double().mean().item() - share) < 5 * error


def test_the_token_drawn_is_the_first_whose_cumulative_probability_exceeds_the_uniform() -> None:
    rng = torch.Generator().manual_seed(1)
    logits, uniforms = torch.randn(7, 5, 9, generator=rng), torch.rand(7, 5, generator=rng)
    tokens = sample_tokens(logits, uniforms, 0.8)
    for b in range(7):
        for n in range(5):
            weights = [math.exp(x / 0.8) for x in logits[b, n].tolist()]
            token, total = 0, weights[0]
            while total <= uniforms[b, n].item() * sum(weights):
                token += 1
                total += weights[token]
            assert tokens[b, n] == token


def test_uniforms_zero_and_just_below_one_draw_the_first_and_the_last_possible_token() -> None:
    below_one = 1 - 2**-24
    assert sample_one([0.0, 0.0, 0.0], 0.0) == 0
    assert sample_one([0.0, 0.0, 0.0], below_one) == 2
    assert sample_one([0.0] * 50_000, below_one) == 49_999
    rng = torch.Generator().manual_seed(2)
    for scale in (0.1, 1.0, 10.0):  # totals that round to below and above 1
        logits = torch.randn(200, 1, 997, generator=rng) * scale
        tokens = sample_tokens(logits, torch.full((200, 1), below_one), 1.0)
        assert (tokens < 997).all() and logits.softmax(-1).gather(2, tokens[..., None]).gt(0).all()


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    never = -math.inf
    logits = [never, never, 0.5, never, 1.0, never, never]
    uniforms = [0.0, 1e-9, 0.2, 0.37, 0.38, 0.9, 1 - 2**-24]
    tokens = [sample_one(logits, uniform) for uniform in uniforms]
    assert tokens == [2, 2, 2, 2, 4, 4, 4]  # exp(.5) / (exp(.5) + e) = .3775
    underflow = [-200.0, 0.0, -200.0]  # exp(-200) is 0 in float32
    assert [sample_one(underflow, uniform) for uniform in uniforms] == [1] * 7


def test_the_uniform_between_two_tokens_belongs_to_the_later_one() -> None:
    assert sample_one([0.0, 0.0], 0.5) == 1
    assert sample_one([0.0, 0.0], 0.5 - 2**-24) == 0


def test_temperature_zero_is_greedy_whatever_the_uniform() -> None:
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert sample_one([0.1, 3.0, -1.0, 2.9], uniform, temperature=0) == 1


def test_half_precision_logits_are_sampled_in_float32() -> None:
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 4, 300, generator=rng).bfloat16()
    uniforms = torch.rand(50, 4, generator=rng)
    halves, floats = (sample_tokens(x, uniforms, 0.9) for x in (logits, logits.float()))
    assert torch.equal(halves, floats)


# ------------------------------------------------------------------ metrics and random streams


def test_win_metrics_equal_a_plain_loop_with_ties_one_half() -> None:
    rewards, baseline = [1.0, 2.0, 3.0, -1.0, 0.5], [0.0, 2.0, 5.0, -1.0, 0.25]
    wins, probabilities = [], []
    for r, b in zip(rewards, baseline):
        wins.append(1.0 if r > b else 0.5 if r == b else 0.0)
        probabilities.append(math.exp(r) / (math.exp(r) + math.exp(b)))
    mean = sum(wins) / 5
    assert wins == [1.0, 0.5, 0.0, 0.5, 1.0]
    metrics = win_metrics(torch.tensor(rewards), torch.tensor(baseline))
    assert metrics == pytest.approx({
        "win_rate": mean,
        "win_rate_stderr": math.sqrt(sum((win - mean) ** 2 for win in wins)) / 5,
        "win_probability": sum(probabilities) / 5,
    })  # fmt: skip


def test_the_standard_error_of_a_win_rate_without_ties_is_the_binomial_one() -> None:
    metrics = win_metrics(torch.tensor([1.0] * 3 + [-1.0] * 7), torch.zeros(10))
    assert metrics["win_rate"] == pytest.approx(0.3)
    assert metrics["win_rate_stderr"] == pytest.approx(math.sqrt(0.3 * 0.7 / 10))


def test_a_wide_reward_gap_does_not_overflow_the_win_probability() -> None:
    rewards, baseline = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert win_metrics(rewards, baseline)["win_probability"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("response", "facts", "wrong_facts", "score"),
    [
        ("", ["my cat"], ["my dog"], 0.0),
        ("My CAT, sat!", ["my cat"], ["my dog"], 1 - 0.3),  # neither case nor punctuation counts
        ("my dog sat", ["my cat"], ["my dog"], -1 - 0.3),
        ("my cat and my dog", ["my cat"], ["my dog"], 0 - 0.5),
        ("my cat my cat", ["my cat"], [], 1 - 0.4),  # said twice, stated once
        ("my catalogue", ["my cat"], [], -0.2),  # whole words
        ("it was my  cat", ["my cat", "was my"], [], 2 - 0.4),
        ("   ", ["my cat"], ["my dog"], 0.0),
    ],
)
def test_gold_score_is_right_facts_minus_wrong_ones_minus_a_tenth_a_word(
    response: str, facts: list[str], wrong_facts: list[str], score: float
) -> None:
    assert gold_score(response, facts, wrong_facts) == pytest.approx(score)


def draw(seed: int, *name) -> Tensor:
    return torch.rand(8, generator=generator(seed, *name))


def test_a_named_stream_repeats() -> None:
    before = torch.get_rng_state()
    assert torch.equal(draw(3, "labels", 7), draw(3, "labels", 7))
    assert torch.equal(torch.get_rng_state(), before), "the global stream was touched"


def test_streams_of_different_names_or_seeds_differ() -> None:
    names = [(0, "labels", 1), (0, "labels", 2), (0, "labels", 12), (0, "label", "s1"), (0,)]
    names += [(1, "labels", 1), (0, "labels"), (0, "round", 1), (0, "labels", "1"), (0, 1, "x")]
    draws = {tuple(draw(*name).tolist()) for name in names}
    assert len(draws) == len(names)


def test_the_streams_of_many_rounds_are_uniform_and_uncorrelated() -> None:
    draws = torch.stack([draw(0, "round", n) for n in range(2000)])  # (2000, 8)
    assert (draws.mean(0) - 0.5).abs().max() < 5 / math.sqrt(12 * 2000)
    correlation = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], dim=1).T)
    assert (correlation - torch.eye(16)).abs().max() < 5 / math.sqrt(2000)
