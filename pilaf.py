"""PILAF: policy-interpolated sampling for preference feedback, arXiv:2502.04270v1.

DPO's pairs are usually two samples of the current policy. The gradient of its loss then is not the
gradient of what is wanted, reward minus beta times KL: a pair's weight carries a factor sigma'(gap)
of the implicit rewards. Sampling pairs in proportion to 1 / sigma' removes it, and that is: half of
the pairs as before, half with one response of the policy pushed away from the reference (optimism)
and one of the policy pulled towards it. Algorithm 1 of the paper, each round:

  1. receive B `prompts`
  2. toss a fair coin for each: c = (0, 0), or c = (+beta, -beta) for its two responses
  3. draw both, token by token, from the logits  (1 + c) * h_policy - c * h_reference
  4. ask the oracle which is better
  5. train the policy, one step of DPO

--sampler has the paper's baselines. Cost of a pair in decoder streams (forward passes a token),
scoring passes (teacher-forced, not in the paper's table), and responses that the oracle reads:

  pilaf             as above                                                    3, 0, 2 on average
  vanilla           two samples of the policy                                   2, 0, 2
  best_of_n         of N: largest and smallest implicit reward, then a label    N, 2N, 2
  best_of_n_oracle  of N: largest and smallest oracle score, no label           N, 0, N (counted)
  hybrid            one sample of the policy, one of the reference              2, 0, 2

The coin's 1/2 and the token-wise products are approximations. --importance_weights makes the
gradient that of exact T-PILAF, for free: a pair's loss is weighted by exp(L+ + L-), the normalisers
of its own tokens, and by 1 in the vanilla half; a large beta * KL makes the weights uneven (see
effective_sample_size). It needs temperature 1 and c = --beta; the theory, --labels bernoulli.

While policy = reference, pilaf *is* vanilla, so compare samplers from a common start that has
moved, with the reference where it was:
  python pilaf.py --sampler vanilla --num_queries 1024 --num_iterations 1 --output_dir runs/start
  python pilaf.py --seed 1 --model runs/start/model --ref_model ./tiny/sft
(another seed, to see other prompts). An overfitted start goes through few labels often:
--num_queries 256 --num_epochs 10 in the first.

No code of the authors was found. Not known, hence our choice: learning rate, batch, response
length, temperature, KL estimator, Bernoulli or argmax labels, how their start was overfitted, what
an iteration is. A difference: a reward model of 1M weights, not 8B.

    python pilaf.py      # 1 minute on two CPU cores, offline. On a GPU: not measured

Shapes: B prompts, N responses a prompt, R response tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
from common import Batch, flag, frozen_logps, generator, require


@dataclass
class Config(common.Config):
    """PILAF's flags; a default of None is resolved by --sampler."""

    sampler: Literal["pilaf", "vanilla", "best_of_n", "best_of_n_oracle", "hybrid"] = flag(
        "pilaf", "where a pair's two responses come from"
    )
    num_candidates: int | None = flag(None, "N of best_of_n and best_of_n_oracle (8)")
    sampler_beta: float | None = flag(None, "c of the interpolation, at most 1 (--beta)")
    importance_weights: bool = flag(False, "exact T-PILAF by a weight on each pair's loss")
    num_iterations: int | None = flag(None, "collect, then train, so many times (online)")
    num_epochs: int = flag(1, "passes over the pairs of an iteration")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_best_of, is_pilaf = self.sampler.startswith("best_of_n"), self.sampler == "pilaf"
        why = f"contradicts --sampler {self.sampler}"
        if self.num_candidates is None:
            self.num_candidates = 8 if is_best_of else 2
        is_right = self.num_candidates >= 2 if is_best_of else self.num_candidates == 2
        require(is_right, f"--num_candidates {self.num_candidates} {why}")
        require(is_pilaf or self.sampler_beta is None, f"--sampler_beta {why}")
        require(is_pilaf or not self.importance_weights, f"--importance_weights {why}")
        if is_pilaf and self.sampler_beta is None:
            self.sampler_beta = self.beta
        is_right = not is_pilaf or self.sampler_beta <= 1
        wrong = f"the interpolation needs a beta of at most 1, not {self.sampler_beta}"
        require(is_right, f"{wrong}: --sampler_beta, or --beta")
        is_exact = self.temperature == 1 and self.sampler_beta == self.beta
        wrong = "--importance_weights needs --temperature 1 and no --sampler_beta but --beta's"
        require(is_exact or not self.importance_weights, wrong)
        is_right = self.num_iterations or self.num_epochs == 1
        require(is_right, "--num_epochs needs --num_iterations: online pairs are used once")
        is_right = (self.num_iterations or 1) <= self.num_queries
        require(is_right, f"--num_iterations must be at most --num_queries {self.num_queries}")
        arm = self.sampler + "-weighted" * self.importance_weights
        arm += "-iterative" * bool(self.num_iterations)
        self.output_dir = self.output_dir or f"runs/pilaf-{arm}-{self.seed}"


# ------------------------------------------------------------------ the interpolation


def coefficients(num_prompts: int, beta: float, rng: torch.Generator) -> Tensor:
    """Step 2: c of each prompt's two responses, (0, 0) or (+beta, -beta) by a fair coin, (B, 2)."""
    is_interpolated = torch.rand(num_prompts, generator=rng) < 0.5
    return is_interpolated[:, None] * torch.tensor([beta, -beta])


def interpolate(logits: Tensor, ref_logits: Tensor, c: Tensor) -> Tensor:
    """Step 3: logits of pi^(1 + c) * pi_ref^(-c), normalised token by token. In float32.

    c = 0 is the policy, -1 the reference, c > 0 moves away from it. (B, N, V), (B, N) -> (B, N, V).
    Temperature is applied, and tokens are masked, after this: -inf - -inf is not a number.
    """
    wide, c = torch.promote_types(logits.dtype, torch.float32), c[..., None]  # (B, N, 1)
    mixed = (1 + c) * logits.to(wide) - c * ref_logits.to(wide)
    return torch.where(c == -1, ref_logits.to(wide), mixed)


def log_normaliser(logits: Tensor, ref_logits: Tensor, c: Tensor) -> Tensor:
    """log z of a prefix: log sum_v pi(v)^(1 + c) * pi_ref(v)^(-c), (B, N, V), (B, N) -> (B, N)."""
    return interpolate(logits.log_softmax(-1), ref_logits.log_softmax(-1), c).logsumexp(-1)


def pair_weights(log_z: Tensor, mask: Tensor) -> Tensor:
    """Weight of a pair's loss that makes the gradient T-PILAF's, exp(L+ + L-), (B, 2, R) -> (B,).

    L = sum_t log z, over the prefixes of a response's tokens: pi^(1 + c) pi_ref^(-c) = q exp(L) for
    the token-wise sampler q. So weighted, the fair coin's pairs are in expectation half of
    1 + Z+ Z- times T-PILAF's; in the vanilla half log z is 0.
    """
    return (log_z * mask).sum((1, 2)).exp()


class InterpolatedDecoder:
    """Next-token logits of two responses a prompt: two packed decoders fed the same tokens, the
    reference's only on the prompts whose coefficients, the column "c", are not 0."""

    def __init__(self, run: common.Run, part: Batch) -> None:
        self.c = torch.tensor(part.columns["c"])  # (B, 2)
        self.rows = self.c.any(1).nonzero()[:, 0]  # (b,)
        self.policy = run.decoder(run.policy, 2, part)
        self.reference = run.decoder(run.ref_model, 2, part.select(self.rows))
        self.is_weighted, self.log_z = run.config.importance_weights, []
        self.c, self.rows = self.c.to(run.policy.device), self.rows.to(run.policy.device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor | None) -> Tensor:
        """The newest tokens (B, 2), or None at the start -> logits (B, 2, V)."""
        logits, c = self.policy(tokens), self.c[self.rows]  # (B, 2, V), (b, 2)
        log_z = torch.zeros_like(self.c)  # (B, 2)
        if len(self.rows):
            mine = logits[self.rows]  # (b, 2, V)
            ref_logits = self.reference(None if tokens is None else tokens[self.rows])
            if self.is_weighted:
                log_z[self.rows] = log_normaliser(mine, ref_logits, c)
            logits = logits.index_copy(0, self.rows, interpolate(mine, ref_logits, c))
        self.log_z.append(log_z)
        return logits


# ------------------------------------------------------------------ samplers


def sample(config: Config, run: common.Run, prompts: Batch, number: int) -> Batch:
    """Steps 2 and 3: the responses of --sampler to the prompts of a round; with
    --importance_weights the column "weight"."""
    num, temperature = config.num_candidates, config.temperature
    rng, coins = (generator(config.seed, name, number) for name in ("round", "coins"))
    run.counts["candidates"] += num * len(prompts)
    if config.sampler == "hybrid":
        decoders = [partial(run.decoder, model, 1) for model in (run.policy, run.ref_model)]
        return common.beside([run.respond(d, prompts, 1, rng, temperature) for d in decoders])
    if config.sampler != "pilaf":
        return run.respond(partial(run.decoder, run.policy, num), prompts, num, rng, temperature)
    prompts.columns["c"] = coefficients(len(prompts), config.sampler_beta, coins).tolist()
    decoders = []

    def decoder(part: Batch) -> InterpolatedDecoder:
        decoders.append(InterpolatedDecoder(run, part))
        return decoders[-1]

    batch = run.respond(decoder, prompts, num, rng, temperature)
    if config.importance_weights:
        length = batch.response_mask.shape[-1]
        log_z = [torch.stack(d.log_z, -1).cpu() for d in decoders]  # (b, 2, R) of its own R
        log_z = torch.cat([F.pad(z, (0, length - z.shape[-1])) for z in log_z])  # (B, 2, R)
        batch.columns["weight"] = pair_weights(log_z, batch.response_mask).tolist()
    return batch


def label(config: Config, run: common.Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Step 4: chosen and rejected response of each prompt, (B,), (B,)."""
    first, second = torch.zeros(len(batch), dtype=torch.long), torch.ones(len(batch)).long()
    run.counts["pairs"] += len(batch)
    if config.sampler == "best_of_n_oracle":
        chosen, rejected, is_ranked = run.rank(batch, cost=lambda n: n, is_noisy=False)
        run.counts["responses_read"] += int(is_ranked.sum())
        run.counts["labelled_pairs"] += int(is_ranked.any(1).sum())
        return chosen, rejected
    if config.sampler == "best_of_n":
        logps, ref_logps = (frozen_logps(m, batch, config) for m in (run.policy, run.ref_model))
        run.counts["scoring_passes"] += 2 * logps.numel()
        implicit_rewards = config.beta * (logps - ref_logps)  # (B, N)
        first, second = common.widest_pair(implicit_rewards, common.distinct(batch.responses))
    asked, chosen, rejected = run.ask(batch, first, second, torch.ones(len(batch)).bool())
    run.counts["responses_read"] += 2 * len(asked)
    run.counts["labelled_pairs"] += len(asked)
    return chosen, rejected


# ------------------------------------------------------------------ Algorithm 1


def own_metrics(config: Config, run: common.Run) -> dict[str, float]:
    """Costs of a pair so far, as counted while they arose: decoder streams, teacher-forced scoring
    passes, responses that the oracle read. effective_sample_size: (sum w)^2 / (n sum w^2) of the
    weights since the last row, 1 if all are equal."""
    counts, metrics = run.counts, {}
    if counts["pairs"]:
        metrics["sampling_cost"] = counts["decoder_streams"] / counts["pairs"]
        metrics["scoring_cost"] = counts["scoring_passes"] / counts["pairs"]
        metrics["annotation_cost"] = counts["responses_read"] / max(1, counts["labelled_pairs"])
    if config.num_iterations:
        metrics["iteration"] = counts["iteration"]
    if "weight" in run.means:
        mean, square = (total / n for total, n in map(run.means.pop, ("weight", "weight_square")))
        metrics["effective_sample_size"] = share = mean**2 / square
        if share < 0.5:
            tqdm.write(f"--importance_weights: the pairs weigh as {share:.0%} of their number: "
                       "few of them decide; a smaller --beta helps")  # fmt: skip
    return metrics


def train_iteration(
    config: Config, run: common.Run, replay: common.Replay, pair_loss: Callable
) -> None:
    """--num_epochs passes over the pairs of an iteration, which are then forgotten."""
    run.restart_optimizer()
    if not replay.parts:
        return
    pairs, number = common.stacked(replay.parts), run.counts["rounds"]
    for epoch in range(config.num_epochs):
        order = torch.randperm(len(pairs), generator=generator(config.seed, "order", number, epoch))
        steps = order.split(config.batch_size)
        for rows in tqdm(steps, desc=f"epoch {epoch + 1}", unit="step", leave=False):
            run.learn([pairs.select(rows)], pair_loss)
    replay.parts.clear()


def train(config: Config, oracle: common.Oracle | None = None) -> common.Run:
    """PILAF, round by round; `common.Run` says what is written where."""
    run, replay = common.Run(config, oracle), common.Replay()
    run.parts["replay"] = replay
    counts, num_iterations = run.counts, config.num_iterations

    def pair_loss(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
        losses = common.dpo(logps, ref_logps, config.beta)
        if config.importance_weights:  # over the mean of all so far: never of one prompt's
            weights = torch.tensor(part.columns["weight"], device=losses.device)
            losses = losses * weights * counts["weighted_pairs"] / counts["weight_sum"]
        return losses

    for number in run.rounds(lambda *_: own_metrics(config, run)):
        # 1. Receive prompts. 2. Toss the coins. 3. Draw the responses.
        num_prompts, t = config.batch_size, run.iteration(num_iterations or 1)
        if num_iterations:  # no round goes beyond its iteration's share of the labels
            left = (t + 1) * config.num_queries / num_iterations - run.oracle.queries
            cost = config.num_candidates if config.sampler == "best_of_n_oracle" else 1
            num_prompts = min(num_prompts, math.ceil(left / cost))
        batch = sample(config, run, run.next_prompts(num_prompts), number)
        if config.importance_weights:
            weights = torch.tensor(batch.columns["weight"], dtype=torch.float64)  # (B,)
            counts["weight_sum"] += weights.sum().item()
            counts["weighted_pairs"] += len(weights)
            means = {"weight": weights.mean(), "weight_square": weights.square().mean()}
            run.record(len(weights), {name: mean.item() for name, mean in means.items()})
        run.lap("generate")
        # 4. Ask the oracle.
        num_queries = run.oracle.queries
        chosen, rejected = label(config, run, batch)
        kept = run.keep(batch, chosen, rejected)
        pairs = batch.select(kept, torch.stack([chosen, rejected], 1)[kept])
        # 5. Train the policy: now, or when the iteration has its share of the labels.
        if not num_iterations:
            run.learn([pairs], pair_loss)
            continue
        counts["iteration"] = t + 1
        counts["untrained"] += run.oracle.queries - num_queries
        if len(pairs):
            pairs.ref_logps = frozen_logps(run.ref_model, pairs, config)  # (b, 2), once
            replay.parts.append(pairs)
        if run.iteration(num_iterations) > t or run.oracle.queries == config.num_queries:
            train_iteration(config, run, replay, pair_loss)
            counts["untrained"], run.is_milestone = 0, True
    return run


if __name__ == "__main__":
    common.main(Config, train, __doc__)
