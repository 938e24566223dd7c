"""Is PILAF's theory right, and are its pairs drawn, weighed, counted and trained on as it says?"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
import transformers
from conftest import make_batch, make_model, plain_token_logps, real_ids
from torch import Tensor, nn

import common
import pilaf
from common import Batch, generator

ROOT = Path(__file__).resolve().parent.parent
CAUSAL = transformers.AutoModelForCausalLM
FILES = ("metrics.jsonl", "preferences.jsonl", "samples.jsonl")

# ------------------------------------------------------------------ a world that can be enumerated

BETA, EOS, VOCABULARY, WIDTH = 0.5, 0, 4, 12


class World:
    """Log-linear policies over all complete sequences of at most `length` tokens, in float64: the
    logits after a prefix p are Phi(p) theta. Y complete sequences, S prefixes, V tokens."""

    def __init__(self, seed: int, length: int = 3, is_at_reference: bool = False) -> None:
        self.rng, theta_rng = generator(seed, "world"), generator(0, "theta", seed // 100)
        middles = range(1, VOCABULARY)
        sizes = range(length)
        self.prefixes = [p for n in sizes for p in itertools.product(middles, repeat=n)]
        grown = [p + (v,) for p in self.prefixes for v in range(VOCABULARY)]
        self.sequences = [y for y in grown if y[-1] == EOS or len(y) == length]
        self.features = self.randn(len(self.prefixes), VOCABULARY, WIDTH)  # (S, V, d)
        self.theta, self.theta_ref = (
            0.3 * torch.randn(WIDTH, generator=theta_rng, dtype=torch.float64) for _ in range(2)
        )
        if is_at_reference:
            self.theta = self.theta_ref.clone()
        shape = (len(self.sequences), length)
        self.mask = torch.zeros(shape, dtype=torch.long)  # (Y, R)
        self.place, self.token = torch.zeros_like(self.mask), torch.zeros_like(self.mask)
        for i, y in enumerate(self.sequences):
            for t, v in enumerate(y):
                self.mask[i, t], self.token[i, t] = 1, v
                self.place[i, t] = self.prefixes.index(y[:t])
        self.noise = self.randn(len(self.sequences))
        logps, ref_logps = self.logps(self.theta), self.logps(self.theta_ref)
        self.pi, self.implicit = logps.exp(), BETA * (logps - ref_logps)  # (Y,), (Y,)
        self.plus, self.minus = self.pi * self.implicit.exp(), self.pi * (-self.implicit).exp()
        self.z_plus, self.z_minus = self.plus.sum(), self.minus.sum()
        self.plus, self.minus = self.plus / self.z_plus, self.minus / self.z_minus
        self.zz = self.z_plus * self.z_minus

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def logits(self, theta: Tensor) -> Tensor:
        return self.features @ theta  # (S, V)

    def summed(self, values: Tensor) -> Tensor:
        """Sums over each sequence's tokens of values (S, V) -> (Y,)."""
        return (values[self.place, self.token] * self.mask).sum(1)

    def logps(self, theta: Tensor) -> Tensor:
        return self.summed(self.logits(theta).log_softmax(-1))

    def sampler(self, c: float) -> Tensor:
        """Probabilities (Y,) of the shipped token-wise sampler of one coefficient."""
        pair = (self.logits(theta)[None] for theta in (self.theta, self.theta_ref))
        c = torch.full((1, len(self.prefixes)), c, dtype=torch.float64)
        return self.summed(pilaf.interpolate(*pair, c)[0].log_softmax(-1)).exp()

    def log_z(self, c: float) -> Tensor:
        """The shipped log z of the prefix of each token of each sequence, (Y, R)."""
        pair = (self.logits(theta)[None] for theta in (self.theta, self.theta_ref))
        c = torch.full((1, len(self.prefixes)), c, dtype=torch.float64)
        return pilaf.log_normaliser(*pair, c)[0][self.place]

    def weights(self, c: tuple[float, float]) -> Tensor:
        """The shipped weight of each pair of sequences, (Y, Y)."""
        size = len(self.sequences)
        first, second = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
        log_z = torch.stack([self.log_z(c[0])[first], self.log_z(c[1])[second]], dim=1)
        mask = torch.stack([self.mask[first], self.mask[second]], dim=1)
        return pilaf.pair_weights(log_z, mask).view(size, size)

    def tpilaf(self) -> Tensor:
        """The law (Y, Y) of T-PILAF's pairs, by its definition on whole sequences."""
        both = outer(self.pi, self.pi) + self.zz * outer(self.plus, self.minus)
        return both / (1 + self.zz)

    def expected_loss(self, theta: Tensor, law: Tensor, win: Tensor) -> Tensor:
        """Mean shipped DPO loss over a law of pairs (Y, Y); the first wins with chance `win`."""
        size, logps = len(self.sequences), self.logps(theta)
        ref_logps = self.logps(self.theta_ref)
        first, second = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
        total = 0.0
        for a, b, chance in ((first, second, win), (second, first, 1 - win)):
            pairs = (torch.stack([x[a], x[b]], dim=1) for x in (logps, ref_logps))
            total = total + (law * chance).flatten() @ common.dpo(*pairs, BETA)
        return total

    def descent(self, law: Tensor, win: Tensor) -> Tensor:
        """Minus the gradient of the expected loss, the law and the labels held fixed, (d,)."""
        theta = self.theta.clone().requires_grad_()
        return -torch.autograd.grad(self.expected_loss(theta, law, win), theta)[0]

    def objective(self, theta: Tensor, reward: Tensor) -> Tensor:
        logps = self.logps(theta)
        return logps.exp() @ (reward - BETA * (logps - self.logps(self.theta_ref)))

    def scores(self) -> Tensor:
        """grad log pi of each sequence, (Y, d)."""
        return torch.autograd.functional.jacobian(self.logps, self.theta)

    def objective_gradient(self, reward: Tensor) -> Tensor:
        """grad J in closed form."""
        return (self.pi * (reward - self.implicit)) @ self.scores()

    def gap(self) -> Tensor:
        return gaps(self.implicit)

    def reward(self, eps: float) -> Tensor:
        return self.implicit + eps * self.noise


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] * b


def gaps(values: Tensor) -> Tensor:
    return values[:, None] - values


def bernoulli(reward: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-gaps(reward)))


def slope(gap: Tensor) -> Tensor:
    """Derivative of the sigmoid."""
    return 1 / (2 + gap.exp() + (-gap).exp())


def linearised(world: World, reward: Tensor) -> Tensor:
    return bernoulli(world.implicit) + slope(world.gap()) * (gaps(reward) - world.gap())


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def branches() -> list[tuple[float, float]]:
    """The two pairs of coefficients between which the shipped coin decides."""
    rows = pilaf.coefficients(64, BETA, generator(0, "coin")).tolist()
    found = {tuple(row) for row in rows}
    assert len(found) == 2
    return sorted(found)


def weighted_law(world: World) -> Tensor:
    """The fair coin's pairs of the shipped samplers, each times its shipped weight, (Y, Y)."""
    return sum(
        0.5 * outer(world.sampler(c[0]), world.sampler(c[1])) * world.weights(c) for c in branches()
    )


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
def test_the_world_has_forty_sequences_whose_policy_is_moved(seed: int) -> None:
    world = World(seed)
    assert len(world.sequences) == 40 and len(world.prefixes) == 13
    assert world.pi.sum().item() == pytest.approx(1, abs=1e-14)
    assert world.zz > 1.1


@SEEDS
def test_optimism_and_conservatism_are_geometric_mixtures_of_policy_and_reference(seed) -> None:
    world = World(seed)
    logps, ref_logps = world.logps(world.theta), world.logps(world.theta_ref)
    for c, expected in ((BETA, world.plus), (-BETA, world.minus)):
        mixture = ((1 + c) * logps - c * ref_logps).softmax(-1)
        assert (mixture - expected).abs().max() < 1e-14


@SEEDS
@pytest.mark.parametrize("sign", [1, -1])
def test_the_token_wise_sampler_misses_the_sequence_one_by_its_normalisers(seed, sign) -> None:
    world, c = World(seed), sign * BETA
    exact, z = (world.plus, world.z_plus) if sign > 0 else (world.minus, world.z_minus)
    token_wise, log_sum = world.sampler(c), (world.log_z(c) * world.mask).sum(1)
    assert token_wise.sum().item() == pytest.approx(1, abs=1e-13)
    assert (exact.log() - token_wise.log() - (log_sum - z.log())).abs().max() < 1e-12
    assert (token_wise @ log_sum.exp()).item() == pytest.approx(z.item(), abs=1e-12)
    assert (exact - token_wise).abs().sum() / 2 > 0.01, "the two samplers are to differ"


@SEEDS
@pytest.mark.parametrize("sign", [1, -1])
def test_looking_ahead_token_by_token_gives_the_exact_sequence_sampler(seed, sign) -> None:
    world, c = World(seed), sign * BETA
    logps, ref_logps = (
        world.logits(theta).log_softmax(-1).tolist() for theta in (world.theta, world.theta_ref)
    )
    length = world.mask.shape[1]

    def ahead(prefix: tuple[int, ...]) -> list[float]:
        """pi^(1 + c) pi_ref^(-c) of each next token, times what may follow it."""
        row, values = world.prefixes.index(prefix), []
        for v in range(VOCABULARY):
            mixed = math.exp((1 + c) * logps[row][v] - c * ref_logps[row][v])
            is_over = v == EOS or len(prefix) + 1 == length
            values.append(mixed * (1.0 if is_over else sum(ahead(prefix + (v,)))))
        return values

    exact, z = (world.plus, world.z_plus) if sign > 0 else (world.minus, world.z_minus)
    assert sum(ahead(())) == pytest.approx(z.item(), rel=1e-13)
    for y, probability in zip(world.sequences, exact.tolist()):
        chance = 1.0
        for t, v in enumerate(y):
            values = ahead(y[:t])
            chance *= values[v] / sum(values)
        assert chance == pytest.approx(probability, rel=1e-12)


@SEEDS
def test_for_one_token_the_token_wise_samplers_are_exact(seed: int) -> None:
    world = World(seed, length=1)
    assert len(world.sequences) == VOCABULARY
    assert (world.sampler(BETA) - world.plus).abs().max() < 1e-14
    assert (world.sampler(-BETA) - world.minus).abs().max() < 1e-14
    assert world.log_z(BETA)[0, 0].item() == pytest.approx(world.z_plus.log().item(), abs=1e-14)


@SEEDS
def test_tpilafs_pairs_are_vanilla_ones_in_proportion_to_one_over_the_sigmoids_slope(seed) -> None:
    world = World(seed)
    law = world.tpilaf()
    symmetric = (law + law.T) / 2
    expected = outer(world.pi, world.pi) / slope(world.gap())
    assert (symmetric - expected / expected.sum()).abs().max() < 1e-15
    assert expected.sum().item() == pytest.approx(2 * (1 + world.zz.item()), rel=1e-13)


@SEEDS
def test_the_closed_gradient_of_the_objective_is_the_one_of_central_differences(seed: int) -> None:
    world, step = World(seed), 1e-5
    reward = world.reward(1.0)
    differences = []
    for i in range(WIDTH):
        shift = torch.zeros(WIDTH, dtype=torch.float64)
        shift[i] = step
        up, down = (world.objective(world.theta + s * shift, reward) for s in (1, -1))
        differences.append((up - down) / (2 * step))
    assert (world.objective_gradient(reward) - torch.stack(differences)).abs().max() < 1e-9


@SEEDS
@pytest.mark.parametrize("eps", [0.1, 3.0])
def test_tpilafs_gradient_is_that_of_the_objective_if_labels_are_linearised(seed, eps) -> None:
    world = World(seed)
    reward = world.reward(eps)
    descent = world.descent(world.tpilaf(), linearised(world, reward))
    expected = BETA / (1 + world.zz) * world.objective_gradient(reward)
    assert relative_error(descent, expected) < 1e-12
    # and by the shipped coin, samplers and weights, which are half of 1 + Z+ Z- times as much
    descent = world.descent(weighted_law(world), linearised(world, reward))
    assert relative_error(descent, BETA / 2 * world.objective_gradient(reward)) < 1e-12


@SEEDS
def test_with_bradley_terry_labels_the_gradients_error_halves_with_the_residual(seed) -> None:
    world, errors = World(seed), []
    for eps in (0.5, 0.25, 0.125, 0.0625, 0.03125):
        reward = world.reward(eps)
        descent = world.descent(world.tpilaf(), bernoulli(reward)) * (1 + world.zz) / BETA
        errors.append(relative_error(descent, world.objective_gradient(reward)))
    assert errors[-1] > 1e-6
    for larger, smaller in itertools.pairwise(errors):
        assert 0.45 < smaller / larger < 0.56


@SEEDS
def test_at_the_reference_tpilaf_is_vanilla_and_its_gradients_error_is_of_second_order(seed):
    world, errors = World(seed, is_at_reference=True), []
    assert 1 + world.zz.item() == pytest.approx(2, abs=1e-14)
    assert (world.tpilaf() - outer(world.pi, world.pi)).abs().max() < 1e-15
    assert (weighted_law(world) - outer(world.pi, world.pi)).abs().max() < 1e-15
    for eps in (0.2, 0.1, 0.05):
        reward = world.reward(eps)
        descent = world.descent(outer(world.pi, world.pi), bernoulli(reward))
        errors.append(relative_error(descent, BETA / 2 * world.objective_gradient(reward)))
    assert errors[0] < 0.2**2, "s(D) - s'(0) D is about -D^3 / 48, against D / 4"
    for larger, smaller in itertools.pairwise(errors):
        assert 0.24 < smaller / larger < 0.26


def test_over_two_prompts_only_weighted_gradients_add_up_to_that_of_the_objective() -> None:
    worlds = [World(seed) for seed in (0, 1)]  # of one theta and one reference
    assert torch.equal(worlds[0].theta, worlds[1].theta)
    constants = [1 + world.zz for world in worlds]
    assert abs(constants[0] / constants[1] - 1) > 0.1
    errors = []
    for eps in (0.1, 0.05, 0.025):
        rewards = [world.reward(eps) for world in worlds]
        expected = sum(w.objective_gradient(r) for w, r in zip(worlds, rewards)) * BETA
        exact = [w.descent(w.tpilaf(), linearised(w, r)) for w, r in zip(worlds, rewards)]
        plain = [w.descent(w.tpilaf(), bernoulli(r)) for w, r in zip(worlds, rewards)]
        shipped = [w.descent(weighted_law(w), bernoulli(r)) for w, r in zip(worlds, rewards)]
        unweighted, weighted = sum(exact), sum(k * x for k, x in zip(constants, exact))
        cosine = torch.cosine_similarity(unweighted, expected, dim=0).item()
        assert math.sqrt(1 - cosine**2) > 0.01, "not parallel"
        assert relative_error(weighted, expected) < 1e-12
        weighted = sum(k * x for k, x in zip(constants, plain))
        assert relative_error(2 * sum(shipped), weighted) < 1e-12, "no prompt's Z is needed"
        # |s(D*) - s(D) - s'(D) (D* - D)| <= (D* - D)^2 / (12 sqrt 3), Taylor with max |s''|
        bound = 0.0
        for world, reward, constant in zip(worlds, rewards, constants):
            scores = BETA * world.scores()
            spread = (scores[:, None] - scores).norm(dim=-1)
            rest = (gaps(reward) - world.gap()).square() / (12 * math.sqrt(3))
            bound += (constant * world.tpilaf() * rest * spread).sum()
        assert (weighted - expected).norm() <= bound
        errors.append(relative_error(weighted, expected))
    for larger, smaller in itertools.pairwise(errors):
        assert 0.45 < smaller / larger < 0.56


@SEEDS
def test_at_the_optimum_the_losss_curvature_is_in_proportion_to_that_of_the_objective(seed) -> None:
    world, hessian = World(seed), torch.autograd.functional.hessian
    scores = world.scores()
    centred = scores - world.pi @ scores
    fisher = centred.T @ (world.pi[:, None] * centred)
    reward, law = world.reward(0.0), world.tpilaf()
    win = bernoulli(reward)
    curvature = hessian(lambda theta: world.expected_loss(theta, law, win), world.theta)
    assert relative_error(curvature, BETA**2 / (1 + world.zz) * fisher) < 1e-12
    shipped_law = weighted_law(world)
    curvature = hessian(lambda theta: world.expected_loss(theta, shipped_law, win), world.theta)
    assert relative_error(curvature, BETA**2 / 2 * fisher) < 1e-12
    curvature = hessian(lambda theta: world.objective(theta, reward), world.theta)
    assert relative_error(-curvature, BETA * fisher) < 1e-12


@SEEDS
def test_the_weights_make_any_mean_over_fair_coins_pairs_that_of_tpilaf(seed: int) -> None:
    world = World(seed)
    loss = world.randn(40, 40)
    vanilla = (outer(world.pi, world.pi) * loss).sum()
    pushed = outer(world.sampler(BETA), world.sampler(-BETA))
    interpolated = (pushed * world.weights((BETA, -BETA)) * loss).sum()
    expected = (1 + world.zz) * (world.tpilaf() * loss).sum()
    assert abs(vanilla + interpolated - expected) < 1e-12
    assert (world.weights((0.0, 0.0)) - 1).abs().max() < 1e-14
    assert abs(2 * (weighted_law(world) * loss).sum() - expected) < 1e-12


@SEEDS
def test_the_weighted_gradient_is_tpilafs_and_that_of_vanilla_over_twice_the_slope(seed) -> None:
    world = World(seed)
    win = bernoulli(world.reward(2.0))
    expected = (1 + world.zz) * world.descent(world.tpilaf(), win)
    assert relative_error(2 * world.descent(weighted_law(world), win), expected) < 1e-12
    law = outer(world.pi, world.pi) / (2 * slope(world.gap()))
    assert relative_error(world.descent(law, win), expected) < 1e-12
    unweighted = sum(0.5 * outer(*map(world.sampler, c)) for c in branches())
    assert relative_error(2 * world.descent(unweighted, win), expected) > 0.01


# ------------------------------------------------------------------ the interpolation


def random_logits(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = generator(seed, "logits")
    policy, reference = (4 * torch.randn(3, 2, 7, generator=rng) for _ in range(2))
    return policy.to(dtype), reference.to(dtype)


def test_a_coefficient_of_minus_one_is_the_reference_bit_for_bit_even_at_minus_infinity() -> None:
    logits, ref_logits = random_logits()
    logits[0, 0, 2] = logits[1, 1, :3] = -math.inf
    ref_logits[0, 0, 2] = ref_logits[2, 0, 4] = -math.inf
    mixed = pilaf.interpolate(logits, ref_logits, torch.full((3, 2), -1.0))
    assert torch.equal(mixed, ref_logits) and not mixed.isnan().any()


def test_a_coefficient_of_zero_is_the_policy_bit_for_bit() -> None:
    logits, ref_logits = random_logits()
    assert torch.equal(pilaf.interpolate(logits, ref_logits, torch.zeros(3, 2)), logits)


def test_each_response_of_a_batch_is_the_mixture_of_its_own_coefficient() -> None:
    logits, ref_logits = random_logits()
    c = torch.tensor([[0.0, 0.0], [0.3, -0.3], [1.0, -1.0]])
    mixed = pilaf.interpolate(logits, ref_logits, c).softmax(-1)
    normalisers = pilaf.log_normaliser(logits, ref_logits, c)
    for b, n in itertools.product(range(3), range(2)):
        p, q = ([math.exp(x) for x in h[b, n].tolist()] for h in (logits, ref_logits))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        k = c[b, n].item()
        products = [x ** (1 + k) * y**-k for x, y in zip(p, q)]
        assert normalisers[b, n].item() == pytest.approx(math.log(sum(products)), abs=1e-5)
        expected = [x / sum(products) for x in products]
        assert mixed[b, n].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_bfloat16_logits_are_combined_in_float32() -> None:
    logits, ref_logits = random_logits(dtype=torch.bfloat16)
    c = torch.tensor([[0.0, 0.0], [0.1, -0.1], [0.7, -1.0]])
    mixed = pilaf.interpolate(logits, ref_logits, c)
    assert mixed.dtype == torch.float32
    for b, n in itertools.product(range(3), range(2)):
        k, h, h_ref = c[b, n].item(), logits[b, n].tolist(), ref_logits[b, n].tolist()
        expected = [(1 + k) * x - k * y for x, y in zip(h, h_ref)]
        assert mixed[b, n].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_fair_coin_decides_for_both_responses_of_a_prompt(beta: float) -> None:
    c = pilaf.coefficients(10_000, beta, generator(3, "coins"))
    assert c.shape == (10_000, 2)
    is_plain = (c == 0).all(1)
    is_mixed = (c == torch.tensor([beta, -beta])).all(1)
    assert (is_plain ^ is_mixed).all()
    assert is_mixed.sum().item() == pytest.approx(5000, abs=4 * math.sqrt(10_000) / 2)


def test_a_pairs_weight_is_the_product_of_its_own_tokens_normalisers() -> None:
    log_z = torch.randn(4, 2, 5, generator=generator(0, "log z"))
    lengths = [[5, 1], [2, 3], [4, 4], [1, 5]]
    mask = torch.zeros(4, 2, 5, dtype=torch.long)
    for b, row in enumerate(lengths):
        for n, size in enumerate(row):
            mask[b, n, :size] = 1
    weights = pilaf.pair_weights(log_z, mask)
    for b, row in enumerate(lengths):
        expected = 1.0
        for n, size in enumerate(row):
            expected *= math.prod(math.exp(x) for x in log_z[b, n, :size].tolist())
        assert weights[b].item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ decoding

PROMPT_LENGTHS = [5, 2, 9, 3, 7, 4, 6, 8]
LENGTH = 6


class Rewards(common.Oracle):
    """Scores a text by a table, or by a hash of it."""

    def __init__(self, config: common.Config, table: dict[str, float] | None = None) -> None:
        self.config, self.queries, self.table = config, 0, table

    def score(self, prompts: list[str], responses: list[list[str]]) -> Tensor:
        rule = self.table.get if self.table else lambda text: generator(7, text).initial_seed() % 97
        return torch.tensor([[float(rule(text)) for text in row] for row in responses])


def loose_run(policy: nn.Module, ref_model: nn.Module, **flags) -> common.Run:
    """A run without a folder, whose prompts and models a test brings along."""
    flags = {"max_new_tokens": LENGTH, "device": "cpu"} | flags
    run = object.__new__(common.Run)
    run.config = pilaf.Config(**flags)
    run.policy, run.ref_model, run.counts, run.means = policy, ref_model, Counter(), {}
    run.seconds, run.clock = Counter(), time.perf_counter()
    run.tokenizer = conftest.make_tokenizer()
    run.oracle = Rewards(run.config)
    return run


@pytest.fixture(scope="module")
def reference(model) -> nn.Module:
    return make_model(CAUSAL, model.config.model_type, seed=7)


@pytest.fixture(scope="module")
def ending(model, reference) -> tuple[nn.Module, nn.Module]:
    """Policy and reference of which EOS, a rare token of random models, is often the next one."""
    models = []
    for base in (model, reference):
        base = make_twin(base)
        ids = torch.randint(1, 300, (100, 6), generator=generator(0, "contexts"))
        with torch.no_grad():
            states = base(ids, output_hidden_states=True).hidden_states[-1][:, -1]
            mean = states.mean(0)  # EOS gets a logit of 5.5 on average, of a log-sum-exp of 7
            base.get_output_embeddings().weight[0] = 5.5 * mean / mean.square().sum()
        models.append(base)
    return tuple(models)


def make_twin(model: nn.Module) -> nn.Module:
    twin = CAUSAL.from_config(model.config).float().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def prompts_of(lengths: list[int] = PROMPT_LENGTHS, seed: int = 0) -> Batch:
    batch = make_batch(lengths, [[1]] * len(lengths), seed)
    none = torch.zeros(len(lengths), 0, 0, dtype=torch.long)
    return dataclasses.replace(
        batch, responses=[[] for _ in lengths], response_ids=none, response_mask=none
    )


@torch.no_grad()
def plain_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Next-token logits, (V,), float64, from one unpadded forward without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def mixed_logits(run: common.Run, ids: list[int], c: float) -> Tensor:
    return (1 + c) * plain_logits(run.policy, ids) - c * plain_logits(run.ref_model, ids)


def plain_response(next_logits, prompt: list[int], uniforms: Tensor, temperature: float) -> list:
    """Tokens until EOS: the first whose cumulative probability exceeds the uniform number."""
    response = []
    for u in uniforms.tolist():
        chances = (next_logits(prompt + response) / temperature).softmax(-1).cumsum(-1)
        response.append(min(int((chances <= u).sum()), len(chances) - 1))
        if response[-1] == EOS:
            break
    return response


def expected_coefficients(run: common.Run, size: int, number: int) -> list[tuple[float, float]]:
    """By the stream of coins of a round."""
    coins = torch.rand(size, generator=generator(run.config.seed, "coins", number)).tolist()
    beta = run.config.sampler_beta
    return [(beta, -beta) if coin < 0.5 else (0.0, 0.0) for coin in coins]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_pairs_equal_those_of_an_uncached_loop_over_both_models(ending, temperature):
    run = loose_run(*ending, sampler="pilaf", sampler_beta=0.6, temperature=temperature)
    batch = pilaf.sample(run.config, run, prompts_of(), 3)
    c = expected_coefficients(run, len(batch), 3)
    assert 2 <= sum(pair != (0, 0) for pair in c) <= 6, "both sides of the coin are to be seen"
    shape = (len(batch), 2, LENGTH)
    uniforms = torch.rand(shape, generator=generator(0, "round", 3))
    lengths, is_moved = set(), False
    for b, n in itertools.product(range(len(batch)), range(2)):
        prompt, response = real_ids(batch, b, n)
        expected = plain_response(
            partial(mixed_logits, run, c=c[b][n]), prompt, uniforms[b, n], temperature
        )
        assert response == expected
        lengths.add(len(response))
        rest = batch.response_ids[b, n, len(response) :]
        assert (rest == EOS).all() and not batch.response_mask[b, n, len(response) :].any()
        assert batch.responses[b][n] == run.tokenizer.decode(response, skip_special_tokens=True)
        plain = plain_response(
            partial(plain_logits, run.policy), prompt, uniforms[b, n], temperature
        )
        is_moved |= plain != response
    assert len(lengths) > 2 and is_moved, "streams are to finish apart, and the mixture to matter"


def test_next_token_logits_are_those_of_plain_forwards_at_every_step(ending) -> None:
    run = loose_run(*ending, sampler="pilaf", sampler_beta=0.6)
    prompts = prompts_of()
    c = [(0.6, -0.6), (0.0, 0.0), (0.0, 0.0), (0.6, -0.6), (0.6, -0.6), (0.0, 0.0)]
    prompts = prompts.select(torch.arange(6))
    prompts.columns["c"] = [list(pair) for pair in c]
    tokens = torch.randint(1, 300, (6, 2, 4), generator=generator(0, "tokens"))
    decoder = pilaf.InterpolatedDecoder(run, prompts)
    for t in range(5):
        logits = decoder(tokens[..., t - 1] if t else None)
        for b, n in itertools.product(range(6), range(2)):
            length = int(prompts.prompt_mask[b].sum())
            ids = prompts.prompt_ids[b, -length:].tolist() + tokens[b, n, :t].tolist()
            expected = mixed_logits(run, ids, c[b][n])
            # relative to their spread, which is large: these models are far from uniform
            error = (logits[b, n] - expected).abs().max() / expected.std()
            assert error < 1e-5


def test_first_tokens_are_as_frequent_as_the_mixed_distribution_says(model, reference) -> None:
    num = 3000
    run = loose_run(model, reference, sampler="pilaf", sampler_beta=0.9, max_new_tokens=1)
    prompts = prompts_of([4]).select(torch.zeros(num, dtype=torch.long))
    batch = pilaf.sample(run.config, run, prompts, 0)
    coefficients = expected_coefficients(run, num, 0)
    prompt, seen, laws = real_ids(batch, 0, 0)[0], {}, {}
    for b, pair in enumerate(coefficients):
        for n, c in enumerate(pair):
            seen.setdefault(c, []).append(batch.response_ids[b, n, 0].item())
    assert sorted(seen) == [-0.9, 0.0, 0.9]
    for c, tokens in seen.items():
        laws[c] = mixed_logits(run, prompt, c).softmax(-1).tolist()
        size, shares = len(tokens), {}
        for token, p in enumerate(laws[c]):
            name = token if size * p >= 10 else "rare"
            count, share = shares.get(name, (0, 0.0))
            shares[name] = count + tokens.count(token), share + p
        assert len(shares) > 10
        for count, p in shares.values():
            assert abs(count - size * p) <= 4 * math.sqrt(size * p * (1 - p))
    for a, b in itertools.combinations(laws.values(), 2):
        assert sum(abs(x - y) for x, y in zip(a, b)) / 2 > 0.1, "the three are to differ"


def plain_weights(run: common.Run, batch: Batch, c: list[tuple[float, float]]) -> list[float]:
    """exp of the sum over all tokens of log sum_v pi^(1 + c) pi_ref^(-c), by plain forwards."""
    weights = []
    for b, pair in enumerate(c):
        total = 0.0
        for n, k in enumerate(pair):
            prompt, response = real_ids(batch, b, n)
            for t in range(len(response)):
                logps, ref_logps = (
                    plain_logits(model, prompt + response[:t]).log_softmax(-1)
                    for model in (run.policy, run.ref_model)
                )
                total += math.log(((1 + k) * logps - k * ref_logps).exp().sum().item())
        weights.append(math.exp(total))
    return weights


def test_weights_are_those_of_plain_forwards_and_micro_batches_change_nothing(ending) -> None:
    more = dict(sampler="pilaf", beta=0.4, importance_weights=True)
    whole = loose_run(*ending, **more)
    batch = pilaf.sample(whole.config, whole, prompts_of(), 3)
    c = expected_coefficients(whole, len(batch), 3)
    lengths = [sorted(row) for row in batch.response_mask.sum(-1).tolist()]
    assert any(a != b for a, b in lengths)
    expected = plain_weights(whole, batch, c)
    assert batch.columns["weight"] == pytest.approx(expected, rel=1e-3)
    for pair, weight in zip(c, batch.columns["weight"]):
        assert (weight == 1) == (pair == (0, 0))
    for size in (1, 3):
        run = loose_run(*ending, **more, micro_batch_size=size)
        parts = pilaf.sample(run.config, run, prompts_of(), 3)
        assert parts.responses == batch.responses
        assert torch.equal(parts.response_ids, batch.response_ids)
        assert torch.equal(parts.response_mask, batch.response_mask)
        assert parts.columns["weight"] == pytest.approx(expected, rel=1e-3)
        assert run.counts == whole.counts


def test_while_policy_is_reference_pilafs_pairs_are_those_of_vanilla(ending) -> None:
    policy, twin = ending[0], make_twin(ending[0])
    ids = []
    for more in (dict(sampler="vanilla"), dict(sampler="pilaf", sampler_beta=0.8)):
        run = loose_run(policy, twin, **more)
        ids.append(pilaf.sample(run.config, run, prompts_of(), 3).response_ids)
    assert torch.equal(*ids)


def test_hybrids_first_response_is_the_policys_and_its_second_the_references(ending) -> None:
    run = loose_run(*ending, sampler="hybrid")
    batch = pilaf.sample(run.config, run, prompts_of(), 2)
    rng = generator(0, "round", 2)
    for n, model in enumerate((run.policy, run.ref_model)):
        uniforms = torch.rand(len(batch), 1, LENGTH, generator=rng)[:, 0]
        for b in range(len(batch)):
            prompt, response = real_ids(batch, b, n)
            expected = plain_response(partial(plain_logits, model), prompt, uniforms[b], 1.0)
            assert response == expected


@pytest.mark.parametrize("sampler", ["vanilla", "best_of_n", "best_of_n_oracle"])
def test_the_baselines_responses_are_samples_of_the_policy(ending, sampler: str) -> None:
    num = 2 if sampler == "vanilla" else 4
    run = loose_run(*ending, sampler=sampler, num_candidates=num)
    batch = pilaf.sample(run.config, run, prompts_of(), 2)
    uniforms = torch.rand(len(batch), num, LENGTH, generator=generator(0, "round", 2))
    for b, n in itertools.product(range(len(batch)), range(num)):
        prompt, response = real_ids(batch, b, n)
        expected = plain_response(partial(plain_logits, run.policy), prompt, uniforms[b, n], 1.0)
        assert response == expected


# ------------------------------------------------------------------ which pair is labelled

CANDIDATE_LENGTHS = [[4, 1, 6, 3, 2], [2, 6, 5, 1, 3], [6, 3, 1, 1, 4], [1, 2, 2, 5, 6]]


def candidates() -> Batch:
    """Four prompts with five responses, of which some read the same."""
    batch = make_batch([7, 3, 11, 4], CANDIDATE_LENGTHS)
    batch.responses[1][3] = batch.responses[1][0] + " "
    batch.responses[2] = [f"{n // 2}" for n in range(5)]
    return batch


def firsts(texts: list[str]) -> list[int]:
    texts = [text.strip() for text in texts]
    return [n for n, text in enumerate(texts) if text not in texts[:n]]


def test_best_of_n_asks_about_the_largest_and_the_smallest_implicit_reward(model, reference):
    more = dict(sampler="best_of_n", num_candidates=5, micro_batch_size=3, beta=0.3)
    batch, orders = candidates(), set()
    with torch.no_grad():
        ratios = (plain_token_logps(model, batch) - plain_token_logps(reference, batch)).sum(-1)
    for seed in range(4):
        run = loose_run(model, reference, **more, seed=seed)
        run.oracle.table = {text.strip(): 0.0 for row in batch.responses for text in row}
        chosen, rejected = pilaf.label(run.config, run, batch)
        for b in range(4):
            ranked = sorted(firsts(batch.responses[b]), key=lambda n: ratios[b, n].item())
            assert {chosen[b].item(), rejected[b].item()} == {ranked[0], ranked[-1]}
            orders.add(chosen[b].item() == ranked[-1])
        assert run.oracle.queries == 4
        assert run.counts["scoring_passes"] == 2 * 4 * 5
    assert orders == {True, False}, "the oracle decides, and may contradict the implicit rewards"


def test_best_of_n_at_the_reference_labels_two_different_texts(model) -> None:
    run = loose_run(model, make_twin(model), sampler="best_of_n", num_candidates=5)
    batch = candidates()
    chosen, rejected = pilaf.label(run.config, run, batch)
    for b in range(4):
        pair = {chosen[b].item(), rejected[b].item()}
        assert len(pair) == 2 and pair <= set(firsts(batch.responses[b]))


def test_best_of_n_oracle_trains_on_the_largest_and_smallest_score_without_noise(model) -> None:
    more = dict(sampler="best_of_n_oracle", num_candidates=5, labels="bernoulli")
    batch = candidates()
    for seed in range(5):
        run, rng = loose_run(model, model, **more, seed=seed), generator(seed, "scores")
        texts = [text.strip() for row in batch.responses for text in row]
        run.oracle.table = dict(zip(texts, torch.rand(20, generator=rng).tolist()))  # gaps below 1
        chosen, rejected = pilaf.label(run.config, run, batch)
        num_scores = 0
        for b in range(4):
            scores = [run.oracle.table[text.strip()] for text in batch.responses[b]]
            ranked = sorted(firsts(batch.responses[b]), key=lambda n: scores[n])
            assert (chosen[b].item(), rejected[b].item()) == (ranked[-1], ranked[0])
            num_scores += len(ranked)
        assert run.oracle.queries == run.counts["responses_read"] == num_scores == 17
        assert run.counts["labelled_pairs"] == run.counts["pairs"] == 4


def test_the_last_scores_of_the_budget_rank_as_many_responses_as_they_are(model) -> None:
    run = loose_run(
        model, model, sampler="best_of_n_oracle", num_candidates=5, num_queries=7, seed=1
    )
    batch = candidates()
    texts = [text.strip() for row in batch.responses for text in row]
    run.oracle.table = {text: float(i % 7) for i, text in enumerate(texts)}
    chosen, rejected = pilaf.label(run.config, run, batch)
    scores = [[run.oracle.table[text.strip()] for text in row] for row in batch.responses]
    assert run.oracle.queries == run.counts["responses_read"] == 7  # 5 of prompt 0, 2 of prompt 1
    for b, num in enumerate((5, 2)):
        assert chosen[b] == max(range(num), key=lambda n: scores[b][n])
        assert rejected[b] == min(range(num), key=lambda n: scores[b][n])
    assert torch.equal(chosen[2:], rejected[2:]) and run.counts["labelled_pairs"] == 2


def test_the_other_samplers_first_and_second_response_go_to_the_oracle(model) -> None:
    for sampler in ("pilaf", "vanilla", "hybrid"):
        run = loose_run(model, model, sampler=sampler, labels="argmax")
        batch = make_batch([3, 5], [[2, 3], [1, 2]])
        batch.responses = [["a", "b"], ["c", "d"]]
        run.oracle.table = dict(a=1.0, b=0.0, c=0.0, d=1.0)
        chosen, rejected = pilaf.label(run.config, run, batch)
        assert chosen.tolist() == [0, 1] and rejected.tolist() == [1, 0]
        assert run.counts["responses_read"] == 4 and run.counts["labelled_pairs"] == 2


# ------------------------------------------------------------------ costs, as runs count them


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table_of(run: common.Run) -> list[dict]:
    return rows(run.folder / "metrics.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    files = [folder / name for name in FILES] + [folder / "model" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def moved(folder) -> str:
    """A policy that is some way from the reference, as --model."""
    start, other = (make_model(CAUSAL, "gpt_neox", seed) for seed in (1, 5))
    with torch.no_grad():
        for p, q in zip(start.parameters(), other.parameters()):
            p.add_(q - p, alpha=0.15)
    start.save_pretrained(folder / "moved")
    conftest.make_tokenizer().save_pretrained(folder / "moved")
    return str(folder / "moved")


@pytest.fixture
def moved_flags(flags, moved) -> dict:
    return flags | dict(model=moved, ref_model=flags["model"])


class Meter:
    """Counts what the two models compute for decoding outside evaluations: the streams of each
    key/value cache, and the rows of tokens fed to it after the prompt."""

    def __init__(self, monkeypatch) -> None:
        self.is_off, self.caches = False, {}
        evaluate, forward = common.Run.evaluate, transformers.GPTNeoXForCausalLM.forward
        meter = self

        def model_forward(self, input_ids, *args, past_key_values=None, **kwargs):
            if past_key_values is not None and not meter.is_off:
                fed = meter.caches.setdefault(past_key_values, [])
                fed.append((input_ids.shape, self))
            return forward(self, input_ids, *args, past_key_values=past_key_values, **kwargs)

        def silent(run, *args):
            meter.is_off = True
            try:
                return evaluate(run, *args)
            finally:
                meter.is_off = False

        monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "forward", model_forward)
        monkeypatch.setattr(common.Run, "evaluate", silent)

    def streams(self, run: common.Run) -> dict[str, int]:
        """Responses started by each model: the first step after a prompt has a token of each."""
        total = Counter()
        for fed in self.caches.values():
            (_, model), (shape, _), *_ = fed
            assert all(size == shape for size, _ in fed[1:])
            name = {id(run.policy): "policy", id(run.ref_model): "reference"}[id(model)]
            total[name] += shape.numel()
        return total


@pytest.mark.parametrize(
    "sampler, num, sampling, scoring, annotation",
    [
        ("vanilla", 2, 2, 0, 2), ("hybrid", 2, 2, 0, 2), ("best_of_n", 3, 3, 6, 2),
        ("best_of_n_oracle", 3, 3, 0, None), ("pilaf", 2, None, 0, 2),
    ],
)  # fmt: skip
def test_the_costs_of_a_run_are_those_of_its_sampler_as_its_models_computed_them(
    monkeypatch, moved_flags, sampler, num, sampling, scoring, annotation
) -> None:
    meter, read, labelled = Meter(monkeypatch), 0, 0
    rank = common.Run.rank

    def watched(*args, **kwargs):
        nonlocal read, labelled
        found = rank(*args, **kwargs)
        read, labelled = read + int(found[2].sum()), labelled + int(found[2].any(1).sum())
        return found

    monkeypatch.setattr(common.Run, "rank", watched)
    flags = moved_flags | dict(num_queries=40, eval_every=12)
    run = pilaf.train(pilaf.Config(**flags, sampler=sampler, num_candidates=num))
    table, streams = table_of(run), meter.streams(run)
    first, last = table[0], table[-1]
    assert "sampling_cost" not in first and first["decoder_streams"] == 0
    num_pairs = 4 * last["rounds"]
    if sampler == "pilaf":
        rounds = [expected_coefficients(run, 4, i) for i in range(last["rounds"])]
        coins = [c != (0, 0) for pairs in rounds for c in pairs]
        assert 0 < sum(coins) < len(coins) == num_pairs
        sampling = 2 + 2 * sum(coins) / len(coins)
        assert streams == {"policy": 2 * num_pairs, "reference": 2 * sum(coins)}
    elif sampler == "hybrid":
        assert streams == {"policy": num_pairs, "reference": num_pairs}
    else:
        assert streams == {"policy": num * num_pairs}
    if sampler == "best_of_n_oracle":
        annotation = read / labelled
        assert last["queries"] == read == 40
    assert last["sampling_cost"] == sampling == sum(streams.values()) / num_pairs
    assert last["decoder_streams"] == sum(streams.values())
    assert last["scoring_cost"] == scoring
    assert last["annotation_cost"] == annotation
    assert last["candidates"] == num * num_pairs
    assert len(table) > 2, "evaluations between, which count nothing"


@pytest.mark.parametrize("num_iterations", [None, 2])
def test_scores_of_best_of_n_oracle_meet_an_awkward_budget_exactly(flags, num_iterations) -> None:
    flags |= dict(sampler="best_of_n_oracle", num_candidates=4, num_queries=13, batch_size=2)
    run = pilaf.train(pilaf.Config(**flags, num_iterations=num_iterations))
    assert run.oracle.queries == table_of(run)[-1]["queries"] == 13
    assert run.counts["responses_read"] == 13


# ------------------------------------------------------------------ importance weights in training


def watch(monkeypatch) -> dict[str, list]:
    """What `pilaf.sample` returned, and what `common.update` was given, as a run goes."""
    seen = {"sampled": [], "steps": []}
    sample, update = pilaf.sample, common.update

    def watched_sample(config, run, prompts, number):
        state = {k: v.clone() for k, v in run.policy.state_dict().items()}
        batch = sample(config, run, prompts, number)
        seen["sampled"].append((batch, run.counts["gradient_steps"], state))
        return batch

    def watched_update(policy, optimizer, groups, pair_loss, config):
        rng = generator(len(seen["steps"]), "logps")
        checks = []
        for group in groups:
            logps, ref_logps = (-20 * torch.rand(len(group), 2, generator=rng) for _ in range(2))
            checks.append((group, logps, ref_logps, pair_loss(logps, ref_logps, group)))
        values = update(policy, optimizer, groups, pair_loss, config)
        seen["steps"].append(dict(
            checks=checks, rate=optimizer.param_groups[0]["lr"], values=values,
            num_sampled=len(seen["sampled"]),
        ))  # fmt: skip
        return values

    monkeypatch.setattr(pilaf, "sample", watched_sample)
    monkeypatch.setattr(common, "update", watched_update)
    return seen


def loss_by_hand(logps: list[float], ref_logps: list[float], beta: float) -> float:
    gap = (logps[0] - ref_logps[0]) - (logps[1] - ref_logps[1])
    return math.log(1 + math.exp(-beta * gap))


@pytest.mark.parametrize("more", [{}, dict(num_iterations=2, num_epochs=2)])
def test_a_step_weighs_each_pairs_loss_by_its_weight_over_the_mean_of_all_so_far(
    monkeypatch, moved_flags, more
) -> None:
    seen = watch(monkeypatch)
    flags = moved_flags | dict(beta=0.3, importance_weights=True, micro_batch_size=3) | more
    run = pilaf.train(pilaf.Config(**flags))
    weight_of = {}
    for batch, *_ in seen["sampled"]:
        plain = plain_weights(
            run_at(run, seen, batch), batch, [tuple(c) for c in batch.columns["c"]]
        )
        assert batch.columns["weight"] == pytest.approx(plain, rel=1e-3)
        for prompt, weight in zip(batch.columns["prompt"], batch.columns["weight"]):
            weight_of[prompt] = weight
    assert len(set(weight_of.values())) > 3
    assert len(seen["steps"]) >= 3
    for step in seen["steps"]:
        so_far = [
            w
            for batch, *_ in seen["sampled"][: step["num_sampled"]]
            for w in batch.columns["weight"]
        ]
        mean = sum(so_far) / len(so_far)
        for group, logps, ref_logps, losses in step["checks"]:
            for i, prompt in enumerate(group.columns["prompt"]):
                plain = loss_by_hand(logps[i].tolist(), ref_logps[i].tolist(), 0.3)
                assert losses[i].item() == pytest.approx(plain * weight_of[prompt] / mean, rel=1e-4)


def run_at(run: common.Run, seen: dict, batch: Batch) -> common.Run:
    """The run with the policy as it was when a batch was drawn."""
    state = next(state for other, _, state in seen["sampled"] if other is batch)
    policy = make_twin(run.policy)
    policy.load_state_dict(state)
    loose = object.__new__(common.Run)
    loose.policy, loose.ref_model, loose.config = policy, run.ref_model, run.config
    return loose


@pytest.mark.parametrize("sampler", ["pilaf", "vanilla", "hybrid"])
def test_without_importance_weights_a_step_is_plain_dpo(monkeypatch, moved_flags, sampler) -> None:
    seen = watch(monkeypatch)
    more = dict(beta=0.3) | (dict(sampler_beta=0.2) if sampler == "pilaf" else {})
    run = pilaf.train(pilaf.Config(**moved_flags | more, sampler=sampler))
    for step in seen["steps"]:
        for group, logps, ref_logps, losses in step["checks"]:
            assert "weight" not in group.columns
            plain = [loss_by_hand(*pair, 0.3) for pair in zip(logps.tolist(), ref_logps.tolist())]
            assert losses.tolist() == pytest.approx(plain, rel=1e-4)
    assert "effective_sample_size" not in table_of(run)[-1]


def test_each_pairs_first_response_is_the_preferred_one_of_the_file(monkeypatch, flags) -> None:
    seen = watch(monkeypatch)
    run = pilaf.train(pilaf.Config(**flags))
    pairs = rows(run.folder / "preferences.jsonl")
    trained = [
        (prompt, *texts)
        for step in seen["steps"]
        for group, *_ in step["checks"]
        for prompt, texts in zip(group.columns["prompt"], group.responses)
    ]
    assert trained == [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs]
    assert len(pairs) == 12


def test_the_effective_sample_size_is_that_of_the_weights_since_the_last_row(
    monkeypatch, moved_flags, capsys
) -> None:
    seen = watch(monkeypatch)
    flags = moved_flags | dict(num_queries=20, eval_every=8, beta=1.0)
    run = pilaf.train(pilaf.Config(**flags, importance_weights=True))
    table, shares = table_of(run), []
    assert "effective_sample_size" not in table[0] and len(table) == 4
    for before, row in itertools.pairwise(table):
        parts = [batch for batch, *_ in seen["sampled"][before["rounds"] : row["rounds"]]]
        weights = [w for part in parts for w in part.columns["weight"]]
        assert weights
        share = sum(weights) ** 2 / (len(weights) * sum(w**2 for w in weights))
        assert row["effective_sample_size"] == pytest.approx(share, rel=1e-5)
        assert "weight" not in row and "weight_square" not in row
        shares.append(share)
    warnings = capsys.readouterr().out.count("few of them decide")
    assert warnings == sum(share < 0.5 for share in shares) > 0


def test_even_weights_bring_no_warning(flags, capsys) -> None:
    run = pilaf.train(pilaf.Config(**flags, importance_weights=True))
    assert "few of them decide" not in capsys.readouterr().out
    sizes = [row["effective_sample_size"] for row in table_of(run)[1:]]
    assert sizes[0] == pytest.approx(1, abs=1e-6) and min(sizes) > 0.5  # it starts as reference


# ------------------------------------------------------------------ iterations


@pytest.mark.parametrize("eval_every", [4, 100])
def test_an_iteration_collects_with_one_policy_then_trains_on_each_pair_num_epochs_times(
    monkeypatch, flags, eval_every
) -> None:
    seen, referenced, restarts = watch(monkeypatch), [], []
    frozen, update = common.frozen_logps, common.update

    def watched_frozen(model, batch, config):
        if batch.response_ids.shape[1] == 2:  # a pair; evaluations have one response
            referenced.extend((id(model), *row) for row in map(tuple, batch.responses))
        return frozen(model, batch, config)

    def watched_update(policy, optimizer, *rest):
        restarts.append(len(optimizer.state) == 0)
        return update(policy, optimizer, *rest)

    for module in (common, pilaf):
        monkeypatch.setattr(module, "frozen_logps", watched_frozen)
    monkeypatch.setattr(common, "update", watched_update)
    flags |= dict(eval_every=eval_every)
    run = pilaf.train(pilaf.Config(**flags, num_iterations=2, num_epochs=3))
    pairs, table = rows(run.folder / "preferences.jsonl"), table_of(run)
    # Rounds of 4 labels, and each iteration has 6: 4 and 2, twice.
    assert [pair["round"] for pair in pairs] == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2
    states = [state for *_, state in seen["sampled"]]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(states)]
    assert same == [True, False, True]
    assert [steps for _, steps, _ in seen["sampled"]] == [0, 0, 6, 6]
    assert [row["queries"] for row in table] == [0, 6, 12]  # whatever --eval_every is
    assert [row["gradient_steps"] for row in table] == [0, 6, 12]
    assert [row["iteration"] for row in table] == [0, 1, 2]
    # each epoch has every pair of its iteration once; no pair comes back in the next iteration
    trained = [
        [(prompt, *texts) for group, *_ in step["checks"]
         for prompt, texts in zip(group.columns["prompt"], group.responses)]
        for step in seen["steps"]
    ]  # fmt: skip
    written = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
    epochs = [sum(trained[i : i + 2], []) for i in range(0, 12, 2)]
    for epoch, mine in zip(epochs, [written[:6]] * 3 + [written[6:]] * 3, strict=True):
        assert sorted(epoch) == sorted(mine)
    assert len({tuple(epoch) for epoch in epochs[:3]}) == 3, "in another order each time"
    # reference log-probabilities are computed once a pair
    computed = [texts for model, *texts in referenced if model == id(run.ref_model)]
    assert sorted(computed) == sorted([chosen, rejected] for _, chosen, rejected in written)
    # a fresh optimiser and a new warm-up of 5 steps
    assert restarts == [i in (0, 6) for i in range(12)]
    warm = [min(1.0, (i + 1) / 6) for i in (*range(6), *range(6))]
    assert [s["rate"] for s in seen["steps"]] == pytest.approx([3e-4 * w for w in warm])


@pytest.mark.parametrize("more", [{}, dict(sampler="best_of_n_oracle", num_candidates=2)])
def test_every_iteration_has_its_share_of_the_labels_however_large_a_round(flags, more) -> None:
    """A round of 12 prompts could take all 12 labels at once."""
    more = more | dict(num_iterations=3, batch_size=12, eval_every=100)
    table = table_of(pilaf.train(pilaf.Config(**flags | more)))
    assert [row["iteration"] for row in table] == [0, 1, 2, 3]
    assert [row["queries"] for row in table] == [0, 4, 8, 12]


def test_each_iteration_shuffles_its_pairs_in_an_order_of_its_own(monkeypatch, flags) -> None:
    seen = watch(monkeypatch)
    run = pilaf.train(pilaf.Config(**flags | dict(batch_size=3), num_iterations=2))
    written = [pair["prompt"] for pair in rows(run.folder / "preferences.jsonl")]
    steps = [[group.columns["prompt"] for group, *_ in step["checks"]] for step in seen["steps"]]
    trained = [prompt for groups in steps for prompts in groups for prompt in prompts]
    assert len(trained) == len(set(written)) == 12
    orders = [[written[i : i + 6].index(x) for x in trained[i : i + 6]] for i in (0, 6)]
    assert orders[0] != orders[1] and orders[0] != list(range(6))


def test_pairs_of_an_iteration_keep_their_own_reference_log_probabilities(
    monkeypatch, moved_flags
) -> None:
    seen = watch(monkeypatch)
    run = pilaf.train(pilaf.Config(**moved_flags, num_iterations=2, num_epochs=2))
    for step in seen["steps"]:
        for group, *_ in step["checks"]:
            with torch.no_grad():
                plain = plain_token_logps(run.ref_model, group).sum(-1)
            torch.testing.assert_close(group.ref_logps, plain, rtol=1e-4, atol=1e-3)


class Stopped(Exception):
    """An interruption in the middle of a round."""


class Flaky(common.Oracle):
    """Fails once six labels are counted, though not at an evaluation."""

    def score(self, prompts, responses):
        if self.queries >= 6 and len(prompts) != 5:  # --eval_prompts 5
            raise Stopped
        return super().score(prompts, responses)


@pytest.mark.parametrize(
    "more",
    [
        {},
        dict(importance_weights=True, beta=0.3, eval_every=8),
        dict(num_iterations=2, num_epochs=2, batch_size=2),
        dict(num_iterations=2, num_epochs=2, batch_size=2, importance_weights=True),
        dict(sampler="best_of_n_oracle", num_candidates=4, num_queries=13, batch_size=2),
    ],
    ids=["online", "weighted", "iterative", "iterative-weighted", "best-of-n-oracle"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(moved_flags, tmp_path, more: dict) -> None:
    flags = moved_flags | more
    whole = pilaf.train(pilaf.Config(**flags | dict(output_dir=str(tmp_path / "whole"))))
    config = pilaf.Config(**flags | dict(output_dir=str(tmp_path / "halves")))
    with pytest.raises(Stopped):
        pilaf.train(config, Flaky(config))
    checkpoint = torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=True)
    assert checkpoint["counts"]["rounds"] >= 1
    if config.num_iterations:
        assert checkpoint["replay"], "interrupted while it collects"
    pilaf.train(dataclasses.replace(config, resume=True))
    assert contents(whole.folder) == contents(tmp_path / "halves")


# ------------------------------------------------------------------ a start of its own


def test_a_policy_that_has_moved_starts_with_the_kl_of_plain_forwards(flags, tmp_path) -> None:
    more = dict(sampler="vanilla", num_iterations=1, num_queries=8, learning_rate=3e-3)
    start = pilaf.train(pilaf.Config(**flags | more | dict(output_dir=str(tmp_path / "start"))))
    model = str(start.folder / "model")
    flags |= dict(model=model, ref_model=flags["model"], learning_rate=0.0, num_queries=4)
    run = pilaf.train(pilaf.Config(**flags))
    batch = run.eval_responses(1, "evaluation")
    with torch.no_grad():
        logps, ref_logps = (plain_token_logps(m, batch) for m in (run.policy, run.ref_model))
    ratios = (logps - ref_logps).double().sum((1, 2))
    kl = table_of(run)[0]["kl"]
    assert abs(kl) > 1e-3
    assert kl == pytest.approx(ratios.mean().item(), rel=1e-3, abs=1e-4)
    assert table_of(start)[0]["kl"] == 0


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "more, words",
    [
        (dict(beta=1.5), ["beta", "1.5"]),
        (dict(sampler_beta=2.0), ["--sampler_beta", "2.0"]),
        (dict(sampler="vanilla", sampler_beta=0.2), ["--sampler_beta", "vanilla"]),
        (dict(sampler="best_of_n", num_candidates=1), ["--num_candidates 1", "best_of_n"]),
        (dict(sampler="best_of_n_oracle", num_candidates=1), ["--num_candidates 1", "oracle"]),
        (dict(sampler="vanilla", num_candidates=8), ["--num_candidates 8", "vanilla"]),
        (dict(sampler="pilaf", num_candidates=3), ["--num_candidates 3", "pilaf"]),
        (dict(sampler="vanilla", importance_weights=True), ["--importance_weights", "vanilla"]),
        (dict(importance_weights=True, temperature=0.7), ["--importance_weights", "--temperature"]),
        (dict(importance_weights=True, sampler_beta=0.2), ["--importance_weights", "--beta"]),
        (dict(num_epochs=2), ["--num_epochs", "--num_iterations"]),
        (dict(num_queries=3, num_iterations=4), ["--num_iterations", "--num_queries 3"]),
        (dict(sampler="best"), ["--sampler", "best_of_n_oracle"]),
        (dict(num_iterations=0), ["--num_iterations"]),
    ],
)  # fmt: skip
def test_flags_that_contradict_are_refused_in_one_sentence_that_names_them(more, words) -> None:
    with pytest.raises(common.UserError) as error:
        pilaf.Config(**more)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_what_a_flag_left_out_means_depends_on_the_sampler() -> None:
    assert pilaf.Config(beta=0.3).sampler_beta == 0.3
    assert pilaf.Config(beta=1.5, sampler_beta=0.2).sampler_beta == 0.2
    assert pilaf.Config(sampler="vanilla", beta=1.5).sampler_beta is None
    candidates = [
        pilaf.Config(sampler=name).num_candidates
        for name in ("pilaf", "vanilla", "hybrid", "best_of_n", "best_of_n_oracle")
    ]
    assert candidates == [2, 2, 2, 8, 8]
    folders = {
        pilaf.Config(sampler=name, num_iterations=n, seed=seed).output_dir
        for name in ("pilaf", "vanilla") for n in (None, 2) for seed in (0, 1)
    }  # fmt: skip
    folders.add(pilaf.Config(importance_weights=True).output_dir)
    assert len(folders) == 9


def test_a_beta_of_one_is_legal_and_its_pull_is_the_reference(moved_flags) -> None:
    run = pilaf.train(pilaf.Config(**moved_flags | dict(beta=1.0, importance_weights=True)))
    assert run.oracle.queries == 12 and all(math.isfinite(row["kl"]) for row in table_of(run))


def test_a_reference_of_another_vocabulary_is_refused(flags, tmp_path) -> None:
    tokenizer = conftest.make_tokenizer()
    tokenizer.add_tokens(["<cat>"])
    make_model(CAUSAL, "gpt_neox", 1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(common.UserError, match="--ref_model .* has another vocabulary") as error:
        pilaf.train(pilaf.Config(**flags, ref_model=str(tmp_path / "other")))
    assert "\n" not in str(error.value)


def test_the_command_line_ends_a_mistake_with_one_line_and_exit_code_2() -> None:
    command = [sys.executable, str(ROOT / "pilaf.py"), "--beta", "1.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "1.5" in lines[0]
