"""PILAF: policy-interpolated sampling for preference feedback, arXiv:2502.04270v1.

With two samples of the policy as its pair, the gradient of DPO's loss is not that of what is
wanted, reward minus beta times KL: each pair carries a factor sigma'(gap) of implicit rewards.
Sampling pairs in proportion to 1 / sigma' would remove it. PILAF nearly does: half of the pairs as
before, half with one response of the policy pushed away from the reference (optimism) and one
pulled towards it. Algorithm 1 of the paper, each round:

  1. receive B `prompts`
  2. toss a fair coin for each: c = (0, 0), or c = (+beta, -beta) for its two responses
  3. draw both, token by token, from the logits  (1 + c) * h_policy - c * h_reference
  4. ask the oracle which is better
  5. train the policy, one step of DPO

--sampler has the paper's baselines. A pair costs decoder streams (forward passes a token), scoring
passes (not in the paper's table) and responses that the oracle reads:

  pilaf             as above                                    3, 0, 2 on average
  vanilla           two samples of the policy                   2, 0, 2
  best_of_n         of N, largest and smallest implicit reward  N, 2N, 2
  best_of_n_oracle  of N, largest and smallest oracle score     N, 0, N (counted, no label)
  hybrid            a sample of each, policy and reference      2, 0, 2

The coin's 1/2 and the token-wise products are approximations. --importance_weights makes the
gradient that of exact T-PILAF; see effective_sample_size. The theory needs --labels bernoulli.

While policy = reference, pilaf *is* vanilla: compare from a start that has moved:
  python pilaf.py --sampler vanilla --num_queries 1024 --num_iterations 1 --output_dir runs/start
  python pilaf.py --seed 1 --model runs/start/model --ref_model ./tiny/sft  # other prompts

No official code was found. Our choice: learning rate, batch, response length, temperature, KL
estimator, label rule, how a start is overfitted, what an iteration is.

    python pilaf.py      # 1 to 2 minutes on two CPU cores, offline; GPUs: README.md

Shapes: B prompts, N responses a prompt, R response tokens, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import common
import harness
from common import Batch, PackedDecoder, frozen_logps, generator, require, respond, train_step
from harness import evaluate, flag, next_prompts

import torch
from torch import Tensor, nn


@dataclass
class Config(harness.Config):
    """PILAF's flags; a default of None depends on --sampler."""

    sampler: Literal["pilaf", "vanilla", "best_of_n", "best_of_n_oracle", "hybrid"] = flag(
        "pilaf", "where a pair comes from"
    )
    num_candidates: int | None = flag(None, "N of best_of_n and best_of_n_oracle (8)")
    sampler_beta: float | None = flag(None, "c of the interpolation, at most 1 (as --beta)")
    importance_weights: bool = flag(False, "exact T-PILAF by a weight on each pair's loss")
    num_iterations: int | None = flag(None, "collect, then train, so many times (online)")
    num_epochs: int = flag(1, "passes over the pairs of an iteration")

    script, arm = "pilaf", "sampler"
    shown = (*harness.Config.shown, "sampling_cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_pilaf, is_best_of = self.sampler == "pilaf", self.sampler.startswith("best_of_n")
        wrong = f" contradicts --sampler {self.sampler}"
        if self.num_candidates is None:
            self.num_candidates = 8 if is_best_of else 2
        if self.sampler_beta is None and is_pilaf:
            self.sampler_beta = self.beta
        require(self.num_candidates >= 2, "--num_candidates must be 2 or more")
        require(self.num_candidates == 2 or is_best_of, "--num_candidates" + wrong)
        require(is_pilaf or self.sampler_beta is None, "--sampler_beta" + wrong)
        require(is_pilaf or not self.importance_weights, "--importance_weights" + wrong)
        require(not is_pilaf or self.sampler_beta <= 1, "--sampler_beta, or --beta, is above 1")
        if self.importance_weights:
            is_exact = self.temperature == 1 and self.sampler_beta == self.beta
            require(is_exact, "--importance_weights needs --temperature 1, no --sampler_beta")
        require(self.num_epochs == 1 or self.num_iterations, "--num_epochs needs --num_iterations")


# ---------------- the interpolation


def coefficients(num_prompts: int, beta: float, rng: torch.Generator) -> Tensor:
    """Step 2: c of two responses a prompt, (0, 0) or (+beta, -beta) by a fair coin, (B, 2)."""
    is_interpolated = torch.rand(num_prompts, generator=rng) < 0.5
    return is_interpolated[:, None] * torch.tensor([beta, -beta])


def interpolate(logits: Tensor, ref_logits: Tensor, c: Tensor) -> Tensor:
    """Step 3: logits of pi^(1 + c) * pi_ref^(-c): (B, N, V), (B, N) -> (B, N, V). c = 0 is the
    policy, -1 the reference. Temperature comes later, and so must a mask: inf - inf is NaN."""
    c = c[..., None]  # (B, N, 1)
    return (1 + c) * logits - c * ref_logits


def log_normaliser(logits: Tensor, ref_logits: Tensor, c: Tensor) -> Tensor:
    """log z of a prefix: log sum_v pi(v)^(1 + c) * pi_ref(v)^(-c), (B, N, V), (B, N) -> (B, N)."""
    return interpolate(logits.log_softmax(-1), ref_logits.log_softmax(-1), c).logsumexp(-1)


def pair_weights(log_z: Tensor, mask: Tensor) -> Tensor:
    """Weight of a pair's loss that makes the gradient T-PILAF's, exp(L+ + L-), (B, 2, R) -> (B,).

    L = sum_t log z, over the prefixes of a response's tokens: for the token-wise sampler q this is
    pi^(1 + c) pi_ref^(-c) = q exp(L). In the vanilla half log z is 0 and the weight 1. Over both
    halves a weighted pair's expectation is (1 + Z+ Z-) / 2 times that of exact T-PILAF.
    """
    return (log_z * mask).sum((1, 2)).exp()


class InterpolatedDecoder:
    """Next-token logits of two responses a prompt: two packed decoders fed the same tokens, the
    reference's only on the prompts whose coefficients c (B, 2) are not 0."""

    def __init__(self, policy: nn.Module, ref_model: nn.Module, prompts: Batch, c: Tensor) -> None:
        rows = c.any(1).nonzero()[:, 0]  # (b,)
        self.policy = PackedDecoder(policy, prompts)
        self.reference = PackedDecoder(ref_model, prompts.select(rows)) if len(rows) else None
        self.c, self.rows = c.to(policy.device), rows.to(policy.device)
        self.log_z = []  # a (B, 2) a step

    def __call__(self, tokens: Tensor, is_open: Tensor) -> Tensor:
        """The newest tokens (B, 2) and which responses go on (B, 2) -> logits (B, 2, V)."""
        logits, log_z = self.policy(tokens, is_open), torch.zeros_like(self.c)  # (B, 2, V), (B, 2)
        if len(self.rows) and is_open[self.rows].any():
            mine, c = logits[self.rows], self.c[self.rows]  # (b, 2, V), (b, 2)
            ref_logits = self.reference(tokens[self.rows], is_open[self.rows])  # (b, 2, V)
            log_z[self.rows] = log_normaliser(mine, ref_logits, c)
            logits = logits.index_copy(0, self.rows, interpolate(mine, ref_logits, c))
        self.log_z.append(log_z)
        return logits


# ---------------- samplers


def sample(
    config: Config, task: harness.Task, prompts: Batch, counts: "Counts", number: int
) -> Batch:
    """Steps 2 and 3: the responses of --sampler to the prompts of a round."""
    rng, num = generator(config.seed, "round", number), config.num_candidates
    counts.add_samples(len(prompts) * num)
    if config.sampler == "pilaf":
        coins = generator(config.seed, "coins", number)
        c = coefficients(len(prompts), config.sampler_beta, coins)
        counts.decoder_streams += int((c != 0).sum())  # beside the policy's
        batch = interpolated_pairs(config, task, prompts, c, rng)
        counts.weight_sum += sum(batch.columns["weight"])
        counts.weight_squares += sum(weight**2 for weight in batch.columns["weight"])
        return batch
    if config.sampler == "hybrid":
        options = (task.tokenizer, prompts, 1, rng, config)
        models = (task.policy, task.ref_model)
        return common.beside([respond(model, *options) for model in models])
    return respond(task.policy, task.tokenizer, prompts, num, rng, config)


def interpolated_pairs(
    config: Config, task: harness.Task, prompts: Batch, c: Tensor, rng: torch.Generator
) -> Batch:
    """Two responses a prompt, c (B, 2); the column "weight" has their `pair_weights`."""
    uniforms = torch.rand(len(prompts), 2, config.max_new_tokens, generator=rng)
    policy, eos = task.policy, common.eos_ids(task.policy, task.tokenizer)

    def draw(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = prompts.select(rows)
        with common.autocast(policy.device):
            decoder = InterpolatedDecoder(policy, task.ref_model, part, c[rows])
            ids, mask = common.generate(decoder, part, uniforms[rows], eos, config.temperature)
        log_z = torch.stack(decoder.log_z, dim=-1)  # (b, 2, steps)
        weights = pair_weights(log_z, mask[..., : log_z.shape[-1]])
        return ids.cpu(), mask.cpu(), weights.cpu()

    ids, mask, weights = common.in_parts(draw, len(prompts), config.micro_batch_size)
    batch = common.with_responses(prompts, ids, mask, task.tokenizer)
    batch.columns = batch.columns | {"weight": weights.tolist()}
    return batch


def label(config: Config, task: harness.Task, batch: Batch) -> tuple[Batch, dict[str, float]]:
    """Step 4: the prompts with a pair, which is two different texts, with chosen and rejected of
    each (N = 2); and online metrics. Best-of-N takes the pair of widest rewards."""
    is_distinct = common.distinct(batch.responses)  # (B, N)
    rows = (is_distinct.sum(1) >= 2).nonzero()[:, 0]  # (n,)
    batch, is_distinct = batch.select(rows), is_distinct[rows]
    if config.sampler == "best_of_n_oracle":
        costs, no_noise = is_distinct.sum(1).tolist(), torch.zeros(is_distinct.shape)
        rewards = task.oracle.rank(batch.columns["prompt"], batch.responses, no_noise, costs)
        order, online = torch.stack(common.widest_pair(rewards, is_distinct), dim=1), {}
    else:
        if config.sampler == "best_of_n":
            models = (task.policy, task.ref_model)
            logps, ref_logps = (frozen_logps(model, batch, config) for model in models)
            picks = common.widest_pair(config.beta * (logps - ref_logps), is_distinct)
            batch = batch.select(torch.arange(len(batch)), torch.stack(picks, dim=1))
        order, online = task.oracle.label(batch)  # (n, 2)
    return batch.select(torch.arange(len(batch)), order), online


# ---------------- Algorithm 1


@dataclass
class Counts(harness.Counts):
    weight_sum: float = 0.0  # of all sampled pairs' `pair_weights`
    weight_squares: float = 0.0  # the sum of their squares

    def metrics(self, config: Config) -> dict[str, float]:
        """sampling_cost: decoder streams a pair, so far; with weights effective_sample_size:
        (sum w)^2 / (n sum w^2) of n pairs, 1 if all are equal, less at a large beta or KL."""
        if not self.candidates:
            return {}
        num_pairs = self.candidates / config.num_candidates
        metrics = {"sampling_cost": self.decoder_streams / num_pairs}
        if config.importance_weights:
            metrics["effective_sample_size"] = self.weight_sum**2 / self.weight_squares / num_pairs
        return metrics


def pair_loss(
    config: Config, counts: Counts, logps: Tensor, ref_logps: Tensor, part: Batch
) -> Tensor:
    """DPO's, (b, 2) -> (b,); with --importance_weights times the weight over its mean of all pairs
    so far. (Over a mean of the prompt's own it would be biased.)"""
    losses = common.dpo(logps, ref_logps, config.beta)
    if config.importance_weights:
        weights = torch.tensor(part.columns["weight"], device=losses.device)
        losses = losses * weights / (counts.weight_sum / (counts.candidates / 2))
    return losses


def plan(config: Config) -> tuple[int, int, int | None]:
    """Labels a prompt, prompts of an iteration (online: of a round), number of iterations."""
    cost = config.num_candidates if config.sampler == "best_of_n_oracle" else 1
    require(cost <= config.planned_queries, f"a prompt takes {cost} labels: raise --num_queries")
    if not config.num_iterations:
        return cost, config.batch_size, None
    labels = config.planned_queries // config.num_iterations
    num_prompts = labels // cost
    require(num_prompts, f"--num_queries {config.planned_queries} pays for no prompt an iteration")
    num_steps = math.ceil(num_prompts / config.batch_size) * config.num_epochs
    return cost, num_prompts, harness.count_iterations(config, labels, num_steps)


def train(config: Config, oracle: harness.Oracle | None = None) -> harness.Run:
    """PILAF, round by round, into --output_dir; the oracle is --reward_model, unless given."""
    cost, prompts_per_iteration, num_iterations = plan(config)
    task = harness.load(config, oracle)
    policy, oracle, counts = task.policy, task.oracle, Counts()
    rounds_per_iteration = math.ceil(prompts_per_iteration / config.batch_size)
    optimizer, loss = common.start_optimizer(policy, config), partial(pair_loss, config, counts)
    fresh, parts = optimizer.state_dict(), {"policy": policy, "optimizer": optimizer}
    run = harness.Run(config, oracle, parts, counts)

    while True:
        t, step = divmod(run.round, rounds_per_iteration)
        num_left = (config.num_queries - oracle.queries) // cost
        is_last = t == num_iterations or num_left == 0
        if step == 0 and run.evaluation_is_due(is_last or num_iterations is not None):
            run.log(*evaluate(task, config), {"iteration": t} | counts.metrics(config))
        if is_last:
            break
        # 1. Receive prompts; the last round of an iteration may be smaller.
        first, start = t * prompts_per_iteration, step * config.batch_size
        num = min(config.batch_size, prompts_per_iteration - start, num_left)
        prompts = next_prompts(task.prompts, first + start, num, config.seed)
        # 2. Toss the coins. 3. Draw the responses.
        batch = sample(config, task, prompts, counts, run.round)
        # 4. Ask the oracle about those that differ.
        pairs, online = label(config, task, batch)
        run.record(online)
        run.keep(pairs)
        # 5. Train on the round's pairs, or on an iteration's once it is complete.
        pairs.ref_logps = frozen_logps(task.ref_model, pairs, config)  # (n, 2), once
        run.replay.append(pairs)
        if step == rounds_per_iteration - 1:
            if config.num_iterations:
                optimizer.load_state_dict(fresh)
            pairs = common.stacked(run.replay)
            streams = [generator(config.seed, "order", t, n) for n in range(config.num_epochs)]
            orders = [torch.randperm(len(pairs), generator=rng) for rng in streams]
            for rows in [part for order in orders for part in order.split(config.batch_size)]:
                run.record(train_step(policy, optimizer, pairs.select(rows), loss, config))
                counts.gradient_steps += len(rows) > 0
            run.replay.clear()
        run.end_round()
    run.finish(policy, task.tokenizer)
    return run


if __name__ == "__main__":
    harness.main(Config, train, __doc__)
