"""SELM: self-exploring language models, arXiv:2405.19332v3, beside iterative DPO and XPO.

DPO learns from pairs that somebody thought of sampling. SELM adds optimism to its loss: a term
that lowers the likelihood of a response y of the reference, so that mass moves away from what the
model says anyway, to responses whose reward is not known yet. In expectation the term is
-alpha * beta * KL(reference || policy). Algorithm 1, iteration t of --num_iterations:

  1. the reference becomes the policy (`snapshot`), the prompts are slice t of the data set
  2. draw one response y a prompt from the reference
  3. rank y and the data set's two responses; the best is `chosen`, the worst `rejected`
  4. one epoch of  DPO(chosen, rejected) + alpha * beta * (log pi(y) - log pi_ref(y)),  minimised

--bonus none is iterative DPO: alpha 0, the same code, no third sequence.
--bonus xpo (arXiv:2405.21046): y from the policy at the iteration's start against y~ from the
frozen reference, labelled; alpha * log pi(y~) without beta; pairs accumulate: a round adds as many
old pairs a past iteration as it has new ones.

Where the paper (P) and its released code (C) differ, and what is done here:
  coefficient    P alpha * beta (Eq. 4.2), but alpha alone in Algorithm 1; C, here alpha * beta
  log pi_ref(y)  P left out, a constant; C, here subtracted: same gradient, another loss value
  source of y    P sampled (--bonus_response sample); C, here greedy, which is another algorithm: at
                 policy = reference a sampled y's gradient is 0 on average, a greedy one's is not
  when y comes   P, C before the iteration; here round by round, from the same frozen model
  which y        P, C, here y wherever it ranks, as a third sequence beside chosen and rejected
  theory         P accumulates pairs, from policy and reference; not in C; here --bonus xpo
Differences from both:
  1. the oracle ranks, not PairRM, with noise unless --labels argmax
  2. n texts cost ceil(3 n / 2) - 2 labels
  3. beta 0.1, not 0.01; a constant rate after each warm-up, not a cosine
  4. no offline DPO first (Zephyr's recipe)
XPO's alpha and schedule are unconfirmed, ours a choice.

    python selm.py      # 1 to 2 minutes on two CPU cores, offline; GPUs: README.md

Shapes: B prompts, N responses a prompt; common.py has the others.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import common
import harness
from common import Batch, frozen_logps, generator, require, respond, train_step
from harness import evaluate, flag, next_prompts

import torch
from torch import Tensor, nn


@dataclass
class Config(harness.Config):
    """SELM's flags; a default of None depends on --bonus and the data set."""

    bonus: Literal["selm", "xpo", "none"] = flag("selm", "none: iterative DPO")
    alpha: float | None = flag(None, "strength of the bonus (selm 1e-3, as Zephyr's; xpo 1e-5)")
    bonus_response: Literal["greedy", "sample"] = flag("greedy", "y (xpo always samples)")
    num_iterations: int = flag(3, "each with a slice of the prompts and a share of the labels")
    learning_rate_factors: list[float] | None = flag(
        None, "of --learning_rate, one an iteration (evenly from 1 to 0.2; Llama's are 1 0.6 0.2)"
    )
    ranker_candidates: int | None = flag(
        None, "further samples of the reference to rank (0; 1 if the data set has prompts only)"
    )
    other_column: str | None = flag(None, "a second response, ranked too (other, if there)")

    script, arm = "selm", "bonus"
    gpu_micro_batch_size = 4  # it holds one model more
    shown = (*harness.Config.shown, "y_reward", "forward_kl")
    may_be_zero = (*harness.Config.may_be_zero, "alpha", "ranker_candidates")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is None:
            self.alpha = {"selm": 1e-3, "xpo": 1e-5, "none": 0.0}[self.bonus]
        if self.learning_rate_factors is None:
            last = max(1, self.num_iterations - 1)
            self.learning_rate_factors = [1 - 0.8 * t / last for t in range(self.num_iterations)]
        if self.bonus == "none":
            require(self.alpha == 0, "--alpha contradicts --bonus none")
        if self.bonus == "xpo":
            is_left_out = self.ranker_candidates is None
            require(is_left_out, "--ranker_candidates contradicts --bonus xpo, which ranks nothing")
        wrong = f"--learning_rate_factors: {self.num_iterations} numbers above 0 are needed"
        require(len(self.learning_rate_factors) == self.num_iterations, wrong)
        require(all(0 < factor < math.inf for factor in self.learning_rate_factors), wrong)


# ---------------- the loss


def bonus_loss(
    y_logps: Tensor, y_ref_logps: Tensor, alpha: float, beta: float, bonus: str = "selm"
) -> Tensor:
    """SELM's term, Eq. 4.2 of arXiv:2405.19332v3, as it is added to a loss that is minimised:
    alpha * beta * (log pi(y) - log pi_ref(y)); for "xpo" alpha * log pi(y). (B,) -> (B,).

    Log-probabilities are sums over tokens. The sign is plus: the likelihood of y goes down. It is
    unbounded below, so with a large alpha y runs away and the loss turns negative.
    """
    if bonus == "xpo":
        return alpha * y_logps
    return alpha * beta * (y_logps - y_ref_logps)  # Eq. 4.2


def pair_loss(config: Config, logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
    """DPO of columns 0 and 1; with a bonus plus that of column 2, which is y: (b, N) -> (b,)."""
    loss = common.dpo(logps, ref_logps, config.beta)
    if config.bonus == "none":
        return loss
    scales = (config.alpha, config.beta, config.bonus)
    return loss + bonus_loss(logps[:, 2], ref_logps[:, 2], *scales)


# ---------------- candidates and their ranking


def comparisons(num_texts: int) -> int:
    """Labels that best *and* worst of so many texts cost: compare in twos, then the best of the
    winners and the worst of the losers, ceil(3 n / 2) - 2."""
    return max(0, math.ceil(3 * num_texts / 2) - 2)


class GreedyFirst(common.PackedDecoder):
    """A decoder under which the first of N responses is greedy and the others are sampled."""

    def __call__(self, tokens: Tensor, is_open: Tensor) -> Tensor:
        logits = super().__call__(tokens, is_open)  # (B, N, V)
        best = logits[:, :1].argmax(-1, keepdim=True)  # (B, 1, 1)
        logits[:, :1] = torch.full_like(logits[:, :1], -torch.inf).scatter(-1, best, 0.0)
        return logits


def own_responses(prompts: Batch, column: str, tokenizer: Any) -> Batch:
    """The data set's responses to the prompts, as a batch with N = 1; cut at --max_new_tokens."""
    limit, is_chat = prompts.response_ids.shape[-1], bool(tokenizer.chat_template)
    texts = [text.strip() if is_chat else f" {text.strip()}" for text in prompts.columns[column]]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = [(row + [tokenizer.eos_token_id])[:limit] for row in rows]  # no EOS if it was cut
    ids = torch.full((len(rows), 1, limit), tokenizer.eos_token_id)  # (B, 1, R)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, 0, : len(row)], mask[n, 0, : len(row)] = torch.tensor(row), 1
    return common.with_responses(prompts, ids, mask, tokenizer)


def num_samples(config: Config, prompts: Batch) -> int:
    """y and --ranker_candidates more, of which there must be one if there is nothing to rank."""
    is_alone = not {"reference", "other"} & prompts.columns.keys()
    return 1 + (is_alone if config.ranker_candidates is None else config.ranker_candidates)


def candidates(
    config: Config, snapshot: nn.Module, tokenizer: Any, prompts: Batch, rng: torch.Generator
) -> Batch:
    """Step 2: y, as candidate 0, and further samples beside the data set's own responses."""
    decoder = GreedyFirst if config.bonus_response == "greedy" else common.PackedDecoder
    num = num_samples(config, prompts)
    sampled = respond(snapshot, tokenizer, prompts, num, rng, config, decoder=decoder)
    columns = [name for name in ("reference", "other") if name in prompts.columns]
    own = [own_responses(prompts, name, tokenizer) for name in columns]
    return common.beside([sampled, *own])


def rank(
    config: Config, oracle: harness.Oracle, batch: Batch, number: int
) -> tuple[Tensor, Tensor]:
    """Step 3: the prompts with at least two distinct responses (n,), and of each the numbers of the
    best and the worst response and, with a bonus, of y, which is response 0: (n, 2 or 3).

    With --labels bernoulli standard Gumbel noise is added to the oracle's scores: a Plackett-Luce
    ranking, whose pairs have exactly the probabilities of Bradley-Terry.
    """
    is_distinct = common.distinct(batch.responses)  # (B, N)
    rows = (is_distinct.sum(1) >= 2).nonzero()[:, 0]
    asked, is_distinct = batch.select(rows), is_distinct[rows]  # (n, N)
    noise = torch.zeros(is_distinct.shape)
    if config.labels == "bernoulli":
        rng = generator(config.seed, "ranking", number)
        uniforms = torch.rand(noise.shape, generator=rng, dtype=torch.float64)
        noise = -(-uniforms.log()).log()  # Gumbel
    costs = [comparisons(num) for num in is_distinct.sum(1).tolist()]
    scores = oracle.rank(asked.columns["prompt"], asked.responses, noise, costs)  # (n, N)
    best, worst = common.widest_pair(scores, is_distinct)
    y = [] if config.bonus == "none" else [torch.zeros_like(best)]
    return rows, torch.stack([best, worst, *y], dim=1)


def y_ranks(picks: Tensor) -> dict[str, float]:
    """Shares of prompts whose y, response 0, is best, worst, or in no pair; picks (n, 2 or 3)."""
    if not len(picks):
        return {}
    is_best, is_worst = (picks[:, :2] == 0).double().mean(0).tolist()
    return {"y_best": is_best, "y_middle": 1 - is_best - is_worst, "y_worst": is_worst}


def xpo_pairs(
    config: Config, task: harness.Task, snapshot: nn.Module, prompts: Batch, rng: torch.Generator
) -> tuple[Batch, Tensor, Tensor]:
    """XPO's pairs, labelled: a sample of the snapshot against one of the frozen reference, which is
    the y of the bonus and so the third response: batch, rows (n,) and responses (n, 3)."""
    models, options = (snapshot, task.ref_model), (task.tokenizer, prompts, 1, rng, config)
    batch = common.beside([respond(model, *options) for model in models])
    rows = common.distinct(batch.responses)[:, 1].nonzero()[:, 0]
    order, _ = task.oracle.label(batch.select(rows))  # (n, 2)
    return batch, rows, torch.cat([order, torch.ones(len(rows), 1).long()], dim=1)


# ---------------- Algorithm 1


def plan(config: Config, prompts: Batch) -> tuple[int, int]:
    """How many iterations the budget pays for, and how many prompts each has."""
    num_texts = len({"reference", "other"} & prompts.columns.keys()) + num_samples(config, prompts)
    cost = 1 if config.bonus == "xpo" else comparisons(num_texts)
    where, num_iterations = f"--dataset {config.dataset}", config.num_iterations
    require(cost, f"{where} has no responses to rank: --ranker_candidates must be above 0")
    labels = config.planned_queries // num_iterations
    num_prompts, size = labels // cost, len(prompts) // num_iterations
    few = f"--num_queries {config.planned_queries} pays for no prompt in each of {num_iterations}"
    require(num_prompts, f"{few} iterations, at {cost} labels a prompt")
    few = f"{where} has {size} prompts an iteration, and --num_queries needs {num_prompts}"
    require(num_prompts <= size, few)
    num_steps = math.ceil(num_prompts / config.batch_size)
    return harness.count_iterations(config, labels, num_steps), num_prompts


def slice_of(prompts: Batch, t: int, config: Config) -> Batch:
    """The prompts of iteration t, in file order."""
    size = len(prompts) // config.num_iterations
    return prompts.select(torch.arange(size) + t % config.num_iterations * size)


def forward_kl(task: harness.Task, config: Config, reference: nn.Module) -> dict[str, float]:
    """forward_kl: KL(reference of the iteration || policy), in nats a response, on samples for the
    held-out prompts. In expectation the bonus adds -alpha * beta times it to the loss."""
    rng, options = generator(config.seed, "forward kl"), {"temperature": 1.0}
    batch = respond(reference, task.tokenizer, task.held_out, 1, rng, config, **options)
    gaps = frozen_logps(reference, batch, config) - frozen_logps(task.policy, batch, config)
    return {"forward_kl": gaps.double().mean().item()}


def train(config: Config, oracle: harness.Oracle | None = None) -> harness.Run:
    """SELM, round by round, into --output_dir; the oracle is --reward_model unless one is given."""
    task = harness.load(config, oracle)
    policy, oracle, is_xpo = task.policy, task.oracle, config.bonus == "xpo"
    num_iterations, num_prompts = plan(config, task.prompts)
    rounds_per_iteration = math.ceil(num_prompts / config.batch_size)
    snapshot = copy.deepcopy(policy)
    reference = task.ref_model if is_xpo else snapshot
    optimizer, loss = common.start_optimizer(policy, config), partial(pair_loss, config)
    fresh = optimizer.state_dict()
    parts = {"policy": policy, "optimizer": optimizer, "snapshot": snapshot}
    run = harness.Run(config, oracle, parts, harness.Counts())

    while True:
        t, step = divmod(run.round, rounds_per_iteration)
        if run.evaluation_is_due(step == 0):
            run.log(*evaluate(task, config), {"iteration": t} | forward_kl(task, config, reference))
        if t == num_iterations:
            break
        # 1. In a new iteration the reference becomes the policy; the prompts are the next slice.
        if step == 0:
            snapshot.load_state_dict(policy.state_dict())
            factor = config.learning_rate_factors[min(t, config.num_iterations - 1)]
            optimizer.load_state_dict(fresh)
            optimizer.param_groups[0]["peak"] *= factor
        start = step * config.batch_size
        num = min(config.batch_size, num_prompts - start)  # the last round may be smaller
        prompts = next_prompts(slice_of(task.prompts, t, config), start, num, config.seed)
        rng = generator(config.seed, "round", run.round)
        # 2. Draw y from it. 3. Find the chosen and the rejected response.
        if is_xpo:
            batch, rows, picks = xpo_pairs(config, task, snapshot, prompts, rng)
        else:
            batch = candidates(config, snapshot, task.tokenizer, prompts, rng)
            rows, picks = rank(config, oracle, batch, run.round)
            run.record(y_ranks(picks))
        run.counts.add_samples(len(prompts) * (2 if is_xpo else num_samples(config, prompts)))
        pairs = batch.select(rows, picks)
        run.keep(pairs)
        pairs.ref_logps = frozen_logps(reference, pairs, config)  # (n, N), once
        # 4. One step on DPO and the bonus.
        if is_xpo:
            run.replay.append(pairs)  # the pairs of all rounds
            old = [run.replay[i * rounds_per_iteration + step] for i in range(t)]
            pairs = common.stacked([pairs, *old])
        run.record(train_step(policy, optimizer, pairs, loss, config))
        run.counts.gradient_steps += len(pairs) > 0
        run.end_round()
    run.finish(policy, task.tokenizer)
    return run


if __name__ == "__main__":
    harness.main(Config, train, __doc__)
