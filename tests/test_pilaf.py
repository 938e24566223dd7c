"""Is PILAF's theory right, and are its pairs drawn, weighed, counted and trained on as it says?"""

import copy
import itertools
import math

import common
import harness
import pilaf
from common import Batch, generator

import pytest
import torch
import transformers
from conftest import make_batch, make_model, make_tokenizer, plain_token_logps, real_ids, rows, save
from torch import Tensor, nn

CAUSAL = transformers.AutoModelForCausalLM
BETA, EOS, VOCABULARY, WIDTH, DOUBLE = 0.5, 0, 4, 12, torch.float64


class World:
    """A world that can be enumerated: log-linear policies over all complete sequences of at most
    `length` tokens, in float64. The logits after a prefix p are Phi(p) theta. Y complete sequences,
    S prefixes, V tokens."""

    def __init__(self, seed: int, length: int = 3, is_at_reference: bool = False) -> None:
        token = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=length)))
        is_over = (token == EOS).cumsum(1) - (token == EOS).long() > 0  # an EOS came before
        is_kept = (~is_over | (token == EOS)).all(1)
        self.token, self.mask = token[is_kept], (~is_over[is_kept]).long()  # (Y, R), (Y, R)
        self.place = torch.zeros_like(self.token)  # the prefix p v has number V * p + v + 1
        for t in range(1, length):
            self.place[:, t] = VOCABULARY * self.place[:, t - 1] + self.token[:, t - 1] + 1
        self.pairs = torch.cartesian_prod(*[torch.arange(len(self.token))] * 2)  # (Y * Y, 2)
        options = dict(generator=generator(seed, "world"), dtype=DOUBLE)
        self.features = torch.randn(int(self.place.max()) + 1, VOCABULARY, WIDTH, **options)
        self.noise = torch.randn(len(self.token), **options)  # (Y,)
        options["generator"] = generator(0, "theta")  # the same in all worlds
        self.ref_theta, theta = 0.3 * torch.randn(2, WIDTH, **options)
        self.theta = self.ref_theta if is_at_reference else theta
        logps, self.ref_logps = self.logps(self.theta), self.logps(self.ref_theta)
        self.pi, self.implicit = logps.exp(), BETA * (logps - self.ref_logps)  # (Y,), (Y,)
        self.gap = self.implicit[:, None] - self.implicit  # (Y, Y)
        self.slope = self.gap.sigmoid() * (-self.gap).sigmoid()  # of the sigmoid at the gap
        tilted = {sign: self.pi * (sign * self.implicit).exp() for sign in (1, -1)}
        self.z = {sign: values.sum() for sign, values in tilted.items()}
        self.exact = {sign: values / self.z[sign] for sign, values in tilted.items()}
        self.zz, self.vanilla = self.z[1] * self.z[-1], torch.outer(self.pi, self.pi)
        both = self.vanilla + self.zz * torch.outer(self.exact[1], self.exact[-1])
        self.tpilaf = both / (1 + self.zz)  # by its definition on whole sequences, (Y, Y)

    def of_sequences(self, values: Tensor) -> Tensor:
        """Sums over each sequence's tokens of values (S, V) -> (Y,)."""
        return (values[self.place, self.token] * self.mask).sum(1)

    def logps(self, theta: Tensor) -> Tensor:
        return self.of_sequences((self.features @ theta).log_softmax(-1))

    def shipped(self, c: float) -> tuple[Tensor, Tensor]:
        """Of the shipped token-wise sampler the law (Y,), and log z of each token (Y, R)."""
        logits = [(self.features @ theta)[None] for theta in (self.theta, self.ref_theta)]
        c = torch.full(logits[0].shape[:2], c, dtype=DOUBLE)
        law = self.of_sequences(pilaf.interpolate(*logits, c)[0].log_softmax(-1)).exp()
        return law, pilaf.log_normaliser(*logits, c)[0][self.place]

    def coin(self, is_weighted: bool = True) -> Tensor:
        """The law (Y, Y) of the shipped coin's pairs, each times its shipped weight."""
        total, coefficients = 0.0, pilaf.coefficients(64, BETA, generator(0, "coin"))
        for c in coefficients.unique(dim=0).tolist():
            (law, log_z), (other_law, other_log_z) = map(self.shipped, c)
            log_z = torch.stack([log_z[self.pairs[:, 0]], other_log_z[self.pairs[:, 1]]], dim=1)
            weights = pilaf.pair_weights(log_z, self.mask[self.pairs]).view_as(self.vanilla)
            total = total + 0.5 * torch.outer(law, other_law) * (weights if is_weighted else 1.0)
        return total

    def descent(self, law: Tensor, win: Tensor) -> Tensor:
        """Minus the gradient (d,) of the mean DPO loss over a law of pairs (Y, Y), held fixed."""
        theta = self.theta.clone().requires_grad_()
        duels = [x[self.pairs] for x in (self.logps(theta), self.ref_logps)]  # (Y * Y, 2) each
        win_loss = common.dpo(*duels, BETA).view_as(law)
        lose_loss = common.dpo(*(x.flip(1) for x in duels), BETA).view_as(law)
        loss = (law * (win * win_loss + (1 - win) * lose_loss)).sum()
        return -torch.autograd.grad(loss, theta)[0]

    def labels(self, eps: float, is_linear: bool = False) -> tuple[Tensor, Tensor]:
        """Chances (Y, Y) that the first wins, or linearised; and the objective's gradient (d,)."""
        residual, theta = eps * self.noise, self.theta.clone().requires_grad_()
        logps = self.logps(theta)
        values = self.implicit + residual - BETA * (logps - self.ref_logps)
        ascent = torch.autograd.grad(logps.exp() @ values, theta)[0]
        off = residual[:, None] - residual  # D* - D
        win = self.gap.sigmoid() + self.slope * off if is_linear else (self.gap + off).sigmoid()
        return win, ascent


def error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=range(3))
def world(request) -> World:
    return World(request.param)


@pytest.mark.parametrize("sign", [1, -1])
def test_token_wise_samplers_miss_the_exact_geometric_mixtures_by_log_z_alone(world, sign):
    exact, z, (token_wise, log_z) = world.exact[sign], world.z[sign], world.shipped(sign * BETA)
    mixture = (1 + sign * BETA) * world.pi.log() - sign * BETA * world.ref_logps
    log_sum = (log_z * world.mask).sum(1)
    assert len(world.token) == 40 and (mixture.softmax(-1) - exact).abs().max() < 1e-14
    assert token_wise.sum().item() == pytest.approx(1, abs=1e-13)
    assert (exact.log() - token_wise.log() - (log_sum - z.log())).abs().max() < 1e-12
    assert (token_wise @ log_sum.exp()).item() == pytest.approx(z.item(), abs=1e-12)
    assert (exact - token_wise).abs().sum() / 2 > 0.01, "the two are to differ"
    short = World(0, length=1)
    assert (short.shipped(sign * BETA)[0] - short.exact[sign]).abs().max() < 1e-14, "of one token"


def test_tpilafs_pairs_are_vanilla_ones_in_proportion_to_one_over_the_sigmoids_slope(world):
    law, expected = world.tpilaf, world.vanilla / world.slope
    assert ((law + law.T) / 2 - expected / expected.sum()).abs().max() < 1e-15
    assert expected.sum().item() == pytest.approx(2 * (1 + world.zz.item()), rel=1e-13)


@pytest.mark.parametrize("eps", [0.1, 3.0])
def test_with_linearised_labels_the_gradient_of_dpo_is_that_of_the_objective(world, eps):
    win, ascent = world.labels(eps, is_linear=True)
    assert error(world.descent(world.tpilaf, win), BETA / (1 + world.zz) * ascent) < 1e-12
    assert error(world.descent(world.coin(), win), BETA / 2 * ascent) < 1e-12, "as shipped"


def test_with_bradley_terry_labels_the_gradients_error_halves_with_the_residual(world):
    errors = []
    for eps in (0.5, 0.25, 0.125, 0.0625, 0.03125):
        win, ascent = world.labels(eps)
        errors.append(error(world.descent(world.tpilaf, win) * (1 + world.zz) / BETA, ascent))
    assert errors[-1] > 1e-6
    assert all(0.45 < b / a < 0.56 for a, b in itertools.pairwise(errors))


def test_at_the_reference_tpilaf_and_the_shipped_law_are_vanillas_and_right_to_second_order():
    world, errors = World(0, is_at_reference=True), []
    for law in (world.tpilaf, world.coin(), world.coin(False)):
        assert (law - world.vanilla).abs().max() < 1e-15
    for eps in (0.2, 0.1, 0.05):
        win, ascent = world.labels(eps)
        errors.append(error(world.descent(world.coin(), win), BETA / 2 * ascent))
    assert errors[0] < 0.2**2
    assert all(0.24 < b / a < 0.26 for a, b in itertools.pairwise(errors))


def test_over_two_prompts_only_weighted_gradients_add_up_to_that_of_the_objective():
    worlds = [World(0), World(1)]  # two prompts of one theta
    labels = [world.labels(0.1, is_linear=True) for world in worlds]
    expected = BETA * sum(ascent for _, ascent in labels)
    exact = [world.descent(world.tpilaf, win) for world, (win, _) in zip(worlds, labels)]
    shipped = [world.descent(world.coin(), win) for world, (win, _) in zip(worlds, labels)]
    assert torch.cosine_similarity(sum(exact), expected, dim=0) < 0.9999, "not parallel"
    assert error(sum((1 + w.zz) * x for w, x in zip(worlds, exact)), expected) < 1e-12
    assert error(2 * sum(shipped), expected) < 1e-12, "no prompt's Z is needed"


def test_the_weighted_gradient_is_tpilafs_and_that_of_vanilla_over_twice_the_slope(world):
    win = world.labels(2.0)[0]
    expected = (1 + world.zz) * world.descent(world.tpilaf, win)
    assert error(2 * world.descent(world.coin(), win), expected) < 1e-12
    assert error(world.descent(world.vanilla / (2 * world.slope), win), expected) < 1e-12
    assert error(2 * world.descent(world.coin(False), win), expected) > 0.01, "unweighted"


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_fair_coin_decides_for_both_responses_of_a_prompt(beta):
    c = pilaf.coefficients(10_000, beta, generator(3, "coins"))
    is_mixed = (c == torch.tensor([beta, -beta])).all(1)
    assert c.shape == (10_000, 2) and ((c == 0).all(1) ^ is_mixed).all()
    assert is_mixed.sum().item() == pytest.approx(5000, abs=200)  # 4 standard deviations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_response_gets_the_mixture_and_log_z_of_its_own_coefficient_in_float32(dtype):
    logits, ref_logits = 4 * torch.randn(2, 3, 2, 7, generator=generator(1, "logits")).to(dtype)
    c = torch.tensor([[0.0, 0.0], [0.3, -0.3], [1.0, -1.0]])
    mixed = pilaf.interpolate(logits, ref_logits, c)
    log_z = pilaf.log_normaliser(logits.float(), ref_logits.float(), c)
    assert mixed.dtype == torch.float32
    for b, n in itertools.product(range(3), range(2)):
        k, p, q = c[b, n].item(), *(h[b, n].double().exp().tolist() for h in (logits, ref_logits))
        products = [(x / sum(p)) ** (1 + k) * (y / sum(q)) ** -k for x, y in zip(p, q)]
        assert log_z[b, n].item() == pytest.approx(math.log(sum(products)), abs=1e-5)
        expected = [x / sum(products) for x in products]
        assert mixed[b, n].softmax(-1).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


LENGTHS, NEW = [5, 2, 9, 3, 7, 4, 6, 8], 6
PROMPTS = make_batch(LENGTHS, [[1]] * 8)


class Counted(nn.Module):
    """A model that keeps the ids that each of its calls reads, by what the call is for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.device, self.dtype = model, model.device, model.dtype
        self.generation_config = model.generation_config
        self.calls = {"decode": [], "score": []}

    def forward(self, input_ids: Tensor, use_cache=False, **options):
        self.calls["decode" if use_cache else "score"].append(input_ids)
        return self.inner(input_ids, use_cache=use_cache, **options)


class Hashed(harness.Oracle):
    """Rewards between 0 and 1 by a hash of the text: labels drawn from them are noisy."""

    def score(self, prompts, responses):
        texts = [[generator(0, y.strip()) for y in row] for row in responses]
        return torch.tensor([[torch.rand(1, generator=rng).item() for rng in row] for row in texts])


@pytest.fixture(scope="module")
def ending(model) -> list[nn.Module]:
    """Models whose next token is often EOS: its logit is 5.5, the others' log-sum-exp near 7."""
    models = [copy.deepcopy(model), make_model(CAUSAL, model.config.model_type, seed=7)]
    ids = torch.randint(1, 300, (100, 6), generator=generator(0, "contexts"))
    for m in models:
        with torch.no_grad():
            mean = m(ids, output_hidden_states=True).hidden_states[-1][:, -1].mean(0)
            m.get_output_embeddings().weight[0] = 5.5 * mean / mean.square().sum()
    return models


def setting(models, **flags) -> tuple[pilaf.Config, harness.Task, pilaf.Counts]:
    config = pilaf.Config(**{"max_new_tokens": NEW, "device": "cpu"} | flags)
    task = harness.Task(*models, make_tokenizer(), None, None, Hashed(config))
    return config, task, pilaf.Counts()


@torch.no_grad()
def plain_mixture(models, prompt: list[int], c: float, uniforms: Tensor, temperature: float):
    """Tokens until EOS from (1 + c) log pi - c log pi_ref, without a cache; the sum of log z."""
    response, total = [], 0.0
    while len(response) < len(uniforms) and response[-1:] != [EOS]:
        ids = torch.tensor([prompt + response])
        logps, ref_logps = (model(ids).logits[0, -1].double().log_softmax(-1) for model in models)
        mixed = (1 + c) * logps - c * ref_logps  # (V,)
        total += mixed.exp().sum().log().item()
        chances = (mixed / temperature).softmax(-1).cumsum(-1)
        response.append(int((chances <= uniforms[len(response)].item()).sum()))
    return response, total


@pytest.mark.parametrize("sampler, c, flags, streams, passes", [
    ("pilaf", (0.6, -0.6), dict(sampler_beta=0.6), None, 0),
    ("pilaf", (0.1, -0.1), dict(temperature=0.7), None, 0),
    ("vanilla", (0, 0), {}, 2, 0), ("hybrid", (0, -1), {}, 2, 0),
    ("best_of_n", (0, 0, 0), dict(num_candidates=3), 3, 6),
    ("best_of_n_oracle", (0, 0, 0), dict(num_candidates=3), 3, 0),
])  # fmt: skip
@pytest.mark.parametrize("seed, number", [(0, 3), (5, 2)])
def test_samples_weights_and_costs_are_those_of_uncached_loops(
    ending, sampler, c, flags, streams, passes, seed, number
):
    models = [Counted(model) for model in ending]
    config, task, counts = setting(models, sampler=sampler, seed=seed, micro_batch_size=1, **flags)
    batch = pilaf.sample(config, task, PROMPTS, counts, number)
    rng, coins = generator(seed, "round", number), generator(seed, "coins", number)
    is_mixed = (torch.rand(8, generator=coins) < 0.5) | (sampler != "pilaf")
    sizes = [1, 1] if sampler == "hybrid" else [len(c)]  # each model has a stretch of its own
    uniforms = torch.cat([torch.rand(8, size, NEW, generator=rng) for size in sizes], dim=1)
    log_weights, own = torch.zeros(8), [0, 0]  # own: tokens that policy and reference must read
    for b, lengths in enumerate(batch.response_mask.sum(-1).tolist()):
        coefficients = c if is_mixed[b] else (0, 0)
        for n, k in enumerate(coefficients):
            prompt, response = real_ids(batch, b, n)
            expected, total = plain_mixture(ending, prompt, k, uniforms[b, n], config.temperature)
            assert response == expected
            log_weights[b] += total
        for m, unused in enumerate((-1, 0)):  # c of a response in which that model has no part
            sizes = [size for size, k in zip(lengths, coefficients) if k != unused]
            own[m] += sum(sizes) + (LENGTHS[b] - 1 if sizes else 0)
    weights = torch.tensor(batch.columns.get("weight", [1.0] * 8))
    assert weights.log().tolist() == pytest.approx(log_weights.tolist(), abs=1e-3)
    assert [sum(ids.numel() for ids in model.calls["decode"]) for model in models] == own
    pilaf.label(config, task, batch)
    num_asked = len([row for row in batch.responses if len({y.strip() for y in row}) > 1])
    assert counts.metrics(config) == {"sampling_cost": streams or 2 + 2 * is_mixed.float().mean()}
    assert sum(len(model.calls["score"]) for model in models) * len(c) == num_asked * passes


@pytest.mark.parametrize("sampler", ["vanilla", "best_of_n", "best_of_n_oracle"])
def test_the_widest_distinct_texts_are_the_pair_and_one_text_costs_nothing(ending, sampler):
    batch, orders = make_batch([7, 3, 11, 4], [[4, 1, 6, 3, 2]] * 4), set()
    batch.responses[1:3] = ["a", "b", "a ", "c", "d"], ["same"] * 5
    num = 2 if sampler == "vanilla" else 5
    batch = batch.select(torch.arange(4), torch.arange(num).expand(4, -1))
    with torch.no_grad():
        logps, ref_logps = (plain_token_logps(model, batch).sum(-1) for model in ending)
    for seed in range(4):
        config, task, _ = setting(ending, sampler=sampler, seed=seed, micro_batch_size=3)
        pairs, _ = pilaf.label(config, task, batch)
        values = {"best_of_n": logps - ref_logps, "vanilla": torch.tensor([[1, 0]] * 4)}
        values["best_of_n_oracle"] = task.oracle.score([], batch.responses)
        for i, b in enumerate((0, 1, 3)):
            texts, rewards = [y.strip() for y in batch.responses[b]], values[sampler][b].tolist()
            distinct = sorted({texts.index(y) for y in texts}, key=lambda n: rewards[n])
            found = [batch.responses[b].index(y) for y in pairs.responses[i]]
            assert sorted(found) == sorted([distinct[0], distinct[-1]])
            assert torch.equal(pairs.response_ids[i], batch.response_ids[b, found])
            orders.add(found == [distinct[-1], distinct[0]])
        num_labels = 14 if sampler == "best_of_n_oracle" else 3
        assert (task.oracle.queries, len(pairs)) == (num_labels, 3)
    assert orders == ({True} if sampler == "best_of_n_oracle" else {True, False}), "who decides"


@pytest.mark.parametrize(
    "flags, raised, expected",
    [({}, 0, (1, 16, None)), (dict(num_iterations=3), 25, (1, 10, 5)),
     (dict(num_iterations=3, num_epochs=2, warmup_steps=1), 0, (1, 10, 3)),  # 2 steps each
     (dict(num_iterations=2, sampler="best_of_n_oracle", num_candidates=5), 0, (5, 3, 2))],
)  # fmt: skip
def test_iterations_share_the_labels_and_a_raised_budget_adds_equal_ones(flags, raised, expected):
    config = pilaf.Config(**dict(num_queries=32, warmup_steps=0) | flags)
    config.num_queries += raised
    assert pilaf.plan(config) == expected


def test_each_epoch_has_every_pair_once_in_an_order_of_seed_iteration_and_epoch(flags, tokenizer):
    flags |= dict(num_queries=12, num_iterations=2, num_epochs=3, batch_size=4, overwrite=True)
    steps, orders = [], []  # a step's token ids, (n, S)

    def see(module: nn.Module, ids: tuple[Tensor]) -> None:
        if isinstance(module, nn.Embedding) and module.training:
            steps.append(ids[0].tolist())

    for seed in (0, 1):
        with nn.modules.module.register_module_forward_pre_hook(see):
            run = pilaf.train(pilaf.Config(**flags | dict(seed=seed)))
        assert run.parts["optimizer"].param_groups[0]["num_steps"] == 6, "a warm-up an iteration"
        assert list(map(len, steps)) == [4, 2] * 6 and run.counts.gradient_steps == 12
        prompts = [tokenizer(pair["prompt"])["input_ids"] for pair in run.rows["preferences"]]
        texts = [[i for i in row if i != EOS] for row in sum(steps, [])]
        order = [next(n for n, x in enumerate(prompts) if y[: len(x)] == x) for y in texts]
        for n in range(0, 36, 6):
            assert sorted(order[n : n + 6]) == list(range(n // 18 * 6, n // 18 * 6 + 6))
            orders.append(tuple(i % 6 for i in order[n : n + 6]))
        steps.clear()
    assert len(set(orders)) == 12


def run_and_replay(flags: dict, sizes: list[int], **more) -> tuple[list, list, list[Batch]]:
    """Rows of metrics and pairs of a run; and what its initial policy answers in each round."""
    config, batches = pilaf.Config(**flags | more), []
    folder = pilaf.train(config).folder
    task = harness.Task(*harness.load_policies(config), None, None, None)
    prompts, _ = harness.load_prompts(config, task.tokenizer)
    for number, size in enumerate(sizes):
        own = harness.next_prompts(prompts, sum(sizes[:number]), size, config.seed)
        batches.append(pilaf.sample(config, task, own, pilaf.Counts(), number))
    return rows(folder / "metrics.jsonl"), rows(folder / "preferences.jsonl"), batches


@pytest.mark.parametrize("more, sizes, steps, num_initial", [
    ({}, [4, 4, 4], [0, 1, 2, 3], 1),
    (dict(num_iterations=2, num_epochs=3, eval_every=99, num_queries=13),
     [4, 2, 4, 2], [0, 6, 12], 2),
    (dict(sampler="best_of_n_oracle", num_candidates=4, num_queries=23), [4, 1], [0, 1, 2], 1),
])  # fmt: skip
def test_training_waits_for_the_iterations_last_pair(flags, more, sizes, steps, num_initial):
    metrics, pairs, batches = run_and_replay(flags | dict(learning_rate=0.01), sizes, **more)
    assert [row["gradient_steps"] for row in metrics] == steps
    assert [row["iteration"] for row in metrics] == list(range(len(steps)))
    assert len(pairs) == sum(sizes)
    for number, batch in enumerate(batches):
        own = [pair for pair in pairs if pair["round"] == number]
        assert [pair["prompt"] for pair in own] == batch.columns["prompt"]
        texts = [{pair["chosen"], pair["rejected"]} for pair in own]
        is_initial = all(y <= set(z) for y, z in zip(texts, batch.responses, strict=True))
        assert is_initial == (number < num_initial), "which policy answered"


@pytest.mark.parametrize("is_weighted", [True, False])
def test_a_loss_is_dpos_times_its_weight_over_the_mean_of_all_so_far(flags, tmp_path, is_weighted):
    other = make_model(CAUSAL, "gpt_neox", 7)
    more = dict(learning_rate=0.0, importance_weights=is_weighted)
    more["ref_model"] = save(other, tmp_path / "other")
    metrics, pairs, batches = run_and_replay(flags, [4, 4, 4], **more)
    policy, weights = CAUSAL.from_pretrained(flags["model"]), []
    for number, batch in enumerate(batches):
        with torch.no_grad():
            gaps = (plain_token_logps(policy, batch) - plain_token_logps(other, batch)).sum(-1)
        own, total = batch.columns["weight"] if is_weighted else [1.0] * 4, 0.0
        for b, pair in enumerate(pairs[4 * number : 4 * number + 4]):
            y, z = (gaps[b, batch.responses[b].index(pair[k])] for k in ("chosen", "rejected"))
            total += own[b] * math.log(1 + math.exp(-0.1 * (y - z)))
        weights, row = weights + own, metrics[number + 1]
        assert row["loss"] == pytest.approx(total / 4 / sum(weights) * len(weights), rel=1e-3)
        share = sum(weights) ** 2 / len(weights) / sum(w**2 for w in weights)
        assert row.get("effective_sample_size", 1.0) == pytest.approx(share, rel=1e-3)
    assert (share < 0.97) == is_weighted


def test_what_a_flag_left_out_means_depends_on_the_sampler():
    assert pilaf.Config(beta=0.3).sampler_beta == 0.3 and pilaf.Config(beta=1.0).sampler_beta == 1
    assert pilaf.Config(beta=1.5, sampler_beta=0.2).sampler_beta == 0.2
    assert pilaf.Config(sampler="vanilla", beta=1.5).sampler_beta is None
    assert [pilaf.Config(sampler=s).num_candidates for s in ("pilaf", "best_of_n")] == [2, 8]
