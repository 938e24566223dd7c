"""Does each formula give the numbers of its definition? Expected values come from other algebra."""

import math

from common import dpo, generator, ipo, margin, response_logps, sample_tokens, slic
from harness import gold_score, win_metrics

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, real_ids

LOGPS = torch.tensor([[-1.0, -2.0], [-7.5, -3.0], [-40.0, -41.0]], dtype=torch.double)
REF_LOGPS = torch.tensor([[-1.5, -1.0], [-7.0, -4.0], [-40.0, -20.0]], dtype=torch.double)
MARGINS = [1.5, -1.5, 21.0]  # (-1 + 1.5) - (-2 + 1) and so on
BELOW_ONE = 1 - 2**-24  # the largest uniform in float32


# ---------------------------------------------------------------- log-probabilities


@torch.no_grad()
def test_response_logps_equal_a_python_loop_over_a_softmax_and_minus_cross_entropy(model):
    batch = make_batch([5, 9], [[3, 6], [1, 4]])
    logps = response_logps(model, batch)
    assert logps.shape == (2, 2) and logps.dtype == torch.float32
    for b, n in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        prompt, response = real_ids(batch, b, n)
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total = 0.0
        for row, token in zip(logits.tolist(), response, strict=True):
            total += row[token] - math.log(math.fsum(math.exp(x) for x in row))
        assert logps[b, n].item() == pytest.approx(total, rel=1e-5)
        loss = F.cross_entropy(logits, torch.tensor(response), reduction="sum")
        assert logps[b, n].item() == pytest.approx(-loss.item(), rel=1e-5)


# ---------------------------------------------------------------- losses


def test_the_margin_is_the_gap_of_log_ratios_and_swapping_the_pair_negates_it():
    assert margin(LOGPS, REF_LOGPS).tolist() == MARGINS
    assert margin(LOGPS.flip(1), REF_LOGPS.flip(1)).tolist() == [-value for value in MARGINS]
    third = [F.pad(logps, (0, 1), value=value) for logps, value in ((LOGPS, -3), (REF_LOGPS, 6))]
    assert margin(*third).tolist() == MARGINS, "a third response plays no part"


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_minus_log_bradley_terry_of_the_likelihood_ratios(beta):
    for row, loss in enumerate(dpo(LOGPS, REF_LOGPS, beta).tolist()):
        ratios = [math.exp(p) / math.exp(q) for p, q in zip(LOGPS[row], REF_LOGPS[row])]
        chosen, rejected = (ratio**beta for ratio in ratios)
        assert loss == pytest.approx(math.log(chosen + rejected) - math.log(chosen), rel=1e-9)


def test_dpo_starts_at_log_2_with_gradient_beta_over_2():
    logps = REF_LOGPS.clone().requires_grad_()
    losses = dpo(logps, REF_LOGPS, 0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert dpo(torch.tensor([[-1e5, 0]]), torch.zeros(1, 2), 0.1) == 1e4, "finite far down"
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradient, torch.tensor([[-0.05, 0.05]] * 3, dtype=torch.double))


def test_ipo_is_a_squared_distance_from_1_over_2_beta_and_slic_a_hinge_at_1_over_beta():
    # beta 0.1: targets 5 and 10; (1.5 - 5)^2 and so on, and max(0, 1 - 0.1 * 1.5) and so on
    assert ipo(LOGPS, REF_LOGPS, 0.1).tolist() == pytest.approx([12.25, 42.25, 256.0])
    assert ipo(LOGPS, REF_LOGPS, 0.5).tolist() == pytest.approx([0.25, 6.25, 400.0])
    assert slic(LOGPS, REF_LOGPS, 0.1).tolist() == pytest.approx([0.85, 1.15, 0.0])
    assert slic(LOGPS, REF_LOGPS, 0.5).tolist() == pytest.approx([0.25, 1.75, 0.0])


@pytest.mark.parametrize("loss", [dpo, ipo, slic])
def test_each_loss_passes_gradcheck_and_pulls_chosen_up_and_rejected_down(loss):
    logps = LOGPS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, REF_LOGPS, 0.3), logps)
    losses = loss(logps, REF_LOGPS, 0.1)
    assert losses.shape == (3,)
    (gradient,) = torch.autograd.grad(losses[:2].sum(), logps)
    assert (gradient[:2, 0] < 0).all() and (gradient[:2, 1] > 0).all() and not gradient[2].any()


# ---------------------------------------------------------------- sampling


def sample_one(logits: list[float], uniform: float, temperature: float = 1.0) -> int:
    return sample_tokens(torch.tensor([[logits]]), torch.tensor([[uniform]]), temperature).item()


def test_a_large_vocabulary_is_drawn_as_its_softmax_says_and_to_its_very_end():
    size, count, rng = 50_304, 1000, torch.Generator().manual_seed(2)
    logits = torch.randn(size, generator=rng) * 2
    uniforms = (torch.arange(count) + 0.5)[None] / count  # (1, count)
    tokens = sample_tokens(logits.expand(1, count, size), uniforms, 1.0)[0]
    below = logits.double().softmax(-1).cumsum(-1)  # the exact distribution function, in float64
    assert (below[tokens] >= uniforms[0] - 1e-5).all()
    assert (below[tokens - 1] <= uniforms[0] + 1e-5).all()
    assert sample_one([0.0] * size, BELOW_ONE) == size - 1
    for scale in (0.1, 1.0, 10.0):  # totals that round to below and above 1
        logits = torch.randn(200, 1, 997, generator=rng) * scale
        last = sample_tokens(logits, torch.full((200, 1), BELOW_ONE), 1.0)
        assert (last < 997).all() and logits.softmax(-1).gather(2, last[..., None]).gt(0).all()


def test_zero_probability_is_never_drawn_and_a_tie_goes_to_the_later_token():
    never = -math.inf
    logits = [never, never, 0.5, never, 1.0, never, never]
    uniforms = [0.0, 1e-9, 0.2, 0.37, 0.38, 0.9, BELOW_ONE]  # e^.5 / (e^.5 + e) = .3775
    assert [sample_one(logits, uniform) for uniform in uniforms] == [2, 2, 2, 2, 4, 4, 4]
    assert [sample_one([-200.0, 0.0, -200.0], uniform) for uniform in uniforms] == [1] * 7
    assert [sample_one([0.0, 0.0], uniform) for uniform in (0.5 - 2**-24, 0.5)] == [0, 1]


# ---------------------------------------------------------------- random streams


def draw(seed: int, purpose: str, *numbers: int) -> tuple[float, ...]:
    return tuple(torch.rand(8, generator=generator(seed, purpose, *numbers)).tolist())


def test_a_named_stream_changes_with_seed_purpose_and_number_and_with_nothing_else():
    purposes = ["round", "coins", "labels", "ranking", "evaluation", "baseline", "epoch", "order"]
    names = [(seed, purpose) for seed in (0, 1, 11) for purpose in purposes]
    names += [(seed, "round", n) for seed in (0, 1, 11) for n in (0, 1, 2, 10, 11)]
    names += [(seed, "order", t, epoch) for seed in (0, 1) for t in (0, 1, 11) for epoch in (0, 1)]
    before = torch.get_rng_state()
    draws = [draw(*name) for name in names]
    assert torch.equal(torch.get_rng_state(), before), "the global stream was touched"
    assert len(set(draws)) == len(names) == 51
    assert [draw(*name) for name in names] == draws


# ---------------------------------------------------------------- metrics


def test_win_metrics_equal_a_plain_loop_with_ties_one_half():
    rewards, baseline = [1.0, 2.0, 3.0, -1.0, 0.5, 4.0], [0.0, 2.0, 5.0, -1.0, 0.25, 3.0]
    wins = [1.0, 0.5, 0.0, 0.5, 1.0, 1.0]
    pairs = [(math.exp(r), math.exp(b)) for r, b in zip(rewards, baseline)]
    assert win_metrics(torch.tensor(rewards), torch.tensor(baseline)) == pytest.approx({
        "win_rate": 4 / 6,
        "win_rate_stderr": math.sqrt(sum((win - 4 / 6) ** 2 for win in wins)) / 6,
        "win_probability": sum(r / (r + b) for r, b in pairs) / 6,
    })  # fmt: skip


def test_gold_is_wanted_facts_minus_wrong_ones_minus_clutter_minus_a_tenth_a_word():
    for response, wanted, wrong, clutter, score in [
        ("", ["my cat"], ["my dog"], ["a hat"], 0.0),
        ("My CAT, sat!", ["my cat"], ["my dog"], [], 1.5 - 0.3),  # neither case nor punctuation
        ("my dog sat", ["my cat"], ["my dog"], [], -1.5 - 0.3),
        ("a hat, my cat", ["my cat"], ["my dog"], ["a hat"], 1.5 - 0.5 - 0.4),
        ("my cat my cat", ["My cat."], [], [], 1.5 - 0.4),  # said twice, stated once
        ("my catalogue", ["my cat"], ["log"], ["alog"], -0.2),  # whole words
        ("it was my  cat", ["my cat", "was my"], [], [], 3 - 0.4),
    ]:
        assert gold_score(response, wanted, wrong, clutter) == pytest.approx(score), response
