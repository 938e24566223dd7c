"""SELM: self-exploring language models, arXiv:2405.19332v3, beside iterative DPO and XPO.

DPO learns from pairs that somebody thought of sampling. SELM adds optimism to its loss: a term that
lowers the likelihood of a response y of the reference, so that mass moves away from what the model
says anyway, to responses whose reward is not known yet. In expectation the term is
-alpha * beta * KL(reference || policy). Algorithm 1 of the paper, iteration t of --num_iterations:

  1. the reference becomes the current policy (`snapshot`), the prompts are slice t of the data set
  2. draw one response y a prompt from the reference
  3. rank y and the data set's two responses; the best is `chosen`, the worst `rejected`
  4. one epoch of  DPO(chosen, rejected) + alpha * beta * (log pi(y) - log pi_ref(y)),  minimised

--bonus none is iterative DPO: alpha 0, the same code. --bonus xpo (arXiv:2405.21046): y from the
policy at the iteration's start against y~ from the frozen reference, labelled; alpha * log pi(y~)
without beta; pairs accumulate: a round adds as many old pairs a past iteration as it has new ones.

Where the paper (P) and its released code (C) differ, and what is done here:
  coefficient    P alpha * beta (Eq. 4.2), but alpha alone in Algorithm 1; C, here alpha * beta
  log pi_ref(y)  P left out, a constant; C, here subtracted: same gradient, another loss value
  source of y    P sampled (--bonus_response sample); C, here greedy, which is another algorithm: at
                 policy = reference a sampled y's gradient is 0 on average, a greedy one's is not
  when y comes   P, C before the iteration; here round by round, from the same frozen model
  which y        P, C, here y wherever it ranks; C always runs it again, half as much compute on
                 top; here it costs a third sequence only where it is the middle one, in no pair
  theory         P accumulates pairs, from policy and reference; not in C; here --bonus xpo
Differences from both: the oracle ranks, not PairRM, with noise unless --labels argmax; n texts cost
ceil(3 n / 2) - 2 labels; beta 0.1, not 0.01; a constant rate after each warm-up, not a cosine; with
--first_iteration offline (Zephyr's recipe: --num_iterations 4 --learning_rate_factors 1 1 1 0.2)
the oracle labels the data set's pairs. XPO's alpha and schedule are unconfirmed, ours a choice.

    python selm.py       # 1 minute on two CPU cores, offline. On a GPU: not measured

Shapes: B prompts, N responses a prompt; common.py has the others.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import Batch, flag, frozen_logps, generator, require, response_logps


@dataclass
class Config(common.Config):
    """SELM's flags; a default of None is resolved by --bonus and the data set."""

    bonus: Literal["selm", "xpo", "none"] = flag("selm", "none: iterative DPO")
    alpha: float | None = flag(None, "strength of the bonus (selm 1e-3, as Zephyr's; xpo 1e-5)")
    bonus_response: Literal["greedy", "sample"] = flag("greedy", "y (xpo always samples)")
    bonus_floor: float | None = flag(
        None, "nats that log pi(y) may fall below the reference before the bonus stops (no bound)"
    )
    num_iterations: int = flag(3, "each with a slice of the prompts and a share of the labels")
    learning_rate_factors: list[float] | None = flag(
        None, "of --learning_rate, one an iteration (evenly from 1 to 0.2; Llama's are 1 0.6 0.2)"
    )
    ranker_candidates: int | None = flag(
        None, "further samples of the reference to rank (0; 1 if the data set has prompts only)"
    )
    first_iteration: Literal["online", "offline"] = flag(
        "online", "offline: plain DPO on the data set's own pairs first"
    )
    other_column: str = flag("other", "of the data set: a second response, which is ranked too")

    may_be_zero = (*common.Config.may_be_zero, "alpha", "ranker_candidates")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is None:
            self.alpha = {"selm": 1e-3, "xpo": 1e-5, "none": 0.0}[self.bonus]
        num, factors = self.num_iterations, self.learning_rate_factors
        wrong = f"--num_queries {self.num_queries} is below --num_iterations {num}"
        require(self.num_queries >= num, wrong)
        if factors is None:
            factors = [1 - 0.8 * t / max(1, num - 1) for t in range(num)]
        self.learning_rate_factors = factors
        require(self.bonus != "none" or self.alpha == 0, f"--alpha {self.alpha} needs a --bonus")
        is_right = isinstance(factors, list) and len(factors) == num
        require(is_right, f"--learning_rate_factors needs {num} numbers, one an iteration")
        is_odd = self.ranker_candidates is not None or self.first_iteration == "offline"
        require(not is_odd or self.bonus != "xpo", "--bonus xpo: no ranking, no offline iteration")
        arm = self.bonus + "-sample" * (self.bonus != "xpo" and self.bonus_response == "sample")
        arm += "-offline" * (self.first_iteration == "offline")
        self.output_dir = self.output_dir or f"runs/selm-{arm}-{self.seed}"


# ------------------------------------------------------------------ the loss


def bonus_loss(
    y_logps: Tensor, y_ref_logps: Tensor, alpha: float, beta: float,
    bonus: str = "selm", floor: float | None = None,
) -> Tensor:  # fmt: skip
    """SELM's term, Eq. 4.2 of arXiv:2405.19332v3, as it is added to a loss that is minimised:
    alpha * beta * (log pi(y) - log pi_ref(y)); for "xpo" alpha * log pi(y). (B,) -> (B,).

    Log-probabilities are sums over tokens. The sign is plus: likelihood of y goes down. With
    `floor` nothing is gained, nor any gradient left, once y is `floor` nats below the reference.
    """
    if floor is not None:
        y_logps = torch.maximum(y_logps, y_ref_logps - floor)
    if bonus == "xpo":
        return alpha * y_logps
    return alpha * beta * (y_logps - y_ref_logps)  # Eq. 4.2


def loss_terms(
    logps: Tensor, ref_logps: Tensor, part: Batch, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO loss of columns 0 and 1, bonus of the column that is y, its log-ratio: (B, N) -> (B,)."""
    y = torch.tensor(part.columns["y"], device=logps.device)[:, None]  # (B, 1), a column number
    y_logps, y_ref_logps = logps.gather(1, y)[:, 0], ref_logps.gather(1, y)[:, 0]  # (B,)
    scales = config.alpha, config.beta, config.bonus, config.bonus_floor
    bonus = bonus_loss(y_logps, y_ref_logps, *scales)
    return common.dpo(logps, ref_logps, config.beta), bonus, (y_logps - y_ref_logps).detach()


def comparisons(num_texts: int) -> int:
    """Labels that best *and* worst of so many texts cost: compare in twos, then the best of the
    winners and the worst of the losers, ceil(3 n / 2) - 2."""
    return max(0, -(-3 * num_texts // 2) - 2)


def training_groups(batch: Batch, chosen: Tensor, rejected: Tensor, y: Tensor) -> list[Batch]:
    """What step 4 trains on: chosen, rejected, and y as a third response only where it is neither.

    Candidate numbers (B,) each, of pairs with chosen != rejected. Returns a batch with N = 2 and
    one with N = 3, to be stepped as one; their column "y" says which response is y.
    """
    is_middle = (chosen != y) & (rejected != y)
    rows, middle = (~is_middle).nonzero()[:, 0], is_middle.nonzero()[:, 0]
    duels = batch.select(rows, torch.stack([chosen, rejected], 1)[rows])
    trios = batch.select(middle, torch.stack([chosen, rejected, y], 1)[middle])
    duels.columns["y"] = (rejected == y)[rows].int().tolist()
    trios.columns["y"] = [2] * len(middle)
    return [duels, trios]


def gradient_norms(policy: nn.Module, groups: list[Batch], config: Config) -> dict[str, float]:
    """Norms of the gradient of DPO's part and of the bonus's part of the loss on these pairs."""
    weights, num_pairs = list(policy.parameters()), sum(map(len, groups))
    totals = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    for part in (part for group in groups for _, part in group.split(config.micro_batch_size)):
        logps = response_logps(policy, part)
        terms = loss_terms(logps, part.ref_logps.to(logps.device), part, config)
        for total, term in zip(totals, terms[:2], strict=True):
            gradients = torch.autograd.grad(term.sum() / num_pairs, weights, retain_graph=True)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far += gradient
    norms = [nn.utils.get_total_norm(total).item() for total in totals]
    return {"dpo_grad_norm": norms[0], "bonus_grad_norm": norms[1]}


# ------------------------------------------------------------------ candidates

RANKS = ("y_best", "y_middle", "y_worst")


def greedy_first(next_logits: Callable) -> Callable:
    """Next-token logits under which the first of N responses is greedy and the others sampled."""

    def changed(tokens: Tensor | None) -> Tensor:
        logits = next_logits(tokens).clone()  # (B, N, V)
        best = logits[:, :1].argmax(-1, keepdim=True)
        logits[:, :1] = torch.full_like(logits[:, :1], -torch.inf).scatter(-1, best, 0.0)
        return logits

    return changed


def num_samples(config: Config, prompts: Batch) -> int:
    """y and --ranker_candidates more, of which there must be one if there is nothing to rank."""
    has_texts = bool({"reference", config.other_column} & prompts.columns.keys())
    return 1 + (config.ranker_candidates if config.ranker_candidates is not None else 1 - has_texts)


def own_responses(prompts: Batch, column: str, run: common.Run) -> Batch:
    """The data set's responses to the prompts, as a batch with N = 1; cut at --max_new_tokens."""
    tokenizer, limit = run.tokenizer, run.config.max_new_tokens
    texts = [str(text or "").strip() for text in prompts.columns[column]]
    is_chat = run.config.chat_template != "off" and bool(tokenizer.chat_template)
    texts = texts if is_chat else [f" {text}" if text else "" for text in texts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = [(row + [tokenizer.eos_token_id])[:limit] for row in ids]  # no EOS if it was cut
    cut = [n for n, row in enumerate(ids) if row[-1] != tokenizer.eos_token_id]
    for n in cut:  # the oracle reads what is trained on
        texts[n] = tokenizer.decode(ids[n], skip_special_tokens=True)
    rows = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    ids, mask = rows["input_ids"][:, None], rows["attention_mask"][:, None]  # (B, 1, R)
    return replace(prompts, responses=[[y] for y in texts], response_ids=ids, response_mask=mask)


def ranked_groups(
    config: Config, run: common.Run, prompts: Batch, snapshot: nn.Module, rng: torch.Generator
) -> list[Batch]:
    """Steps 2 and 3: y and further samples from the snapshot, beside the data set's responses."""
    num = num_samples(config, prompts)

    def decoder(part: Batch) -> Callable:
        next_logits = run.decoder(snapshot, num, part)
        return greedy_first(next_logits) if config.bonus_response == "greedy" else next_logits

    sampled = run.respond(decoder, prompts, num, rng, config.temperature)
    run.counts["candidates"] += len(prompts) * num
    columns = [name for name in ("reference", config.other_column) if name in prompts.columns]
    batch = common.beside([sampled, *(own_responses(prompts, name, run) for name in columns)])
    run.lap("generate")
    best, worst, _ = run.rank(batch, comparisons, is_noisy=True)  # y is candidate 0
    kept = run.keep(batch, best, worst)
    best, worst = best[kept], worst[kept]
    is_middle = (best != 0) & (worst != 0)
    for name, rows in zip(RANKS, (best == 0, is_middle, worst == 0), strict=True):
        run.counts[name] += int(rows.sum())
    return training_groups(batch.select(kept), best, worst, torch.zeros_like(best))


def labelled_groups(
    config: Config, run: common.Run, prompts: Batch, snapshot: nn.Module, rng: torch.Generator
) -> list[Batch]:
    """XPO's pairs, a sample of the snapshot against one of the frozen reference (which is y), and
    those of an offline iteration, the data set's own: labelled by the oracle."""
    if config.bonus == "xpo":
        samplers = [partial(run.decoder, model, 1) for model in (snapshot, run.ref_model)]
        sampled = [run.respond(s, prompts, 1, rng, config.temperature) for s in samplers]
        batch = common.beside(sampled)
        run.counts["candidates"] += len(prompts) * 2
    else:
        columns = ("reference", config.other_column)
        batch = common.beside([own_responses(prompts, name, run) for name in columns])
    run.lap("generate")
    first = torch.zeros(len(prompts), dtype=torch.long)
    _, chosen, rejected = run.ask(batch, first, first + 1, first == 0)
    kept = run.keep(batch, chosen, rejected)
    return training_groups(batch.select(kept), chosen[kept], rejected[kept], first[kept] + 1)


# ------------------------------------------------------------------ Algorithm 1


def own_metrics(
    config: Config, run: common.Run, snapshot: nn.Module, groups: list[Batch], evaluated: tuple
) -> dict[str, float]:
    """Of the iteration so far: shares of prompts whose y was best, middle, worst of the ranking,
    and steps of negative loss. Now: KL to and from the iteration's reference on the held-out
    prompts, in nats a response; the gradients' norms on the last step's pairs. `evaluated`: the
    policy's responses and their log-probabilities (B, 1)."""
    batch, logps = evaluated
    reference = run.ref_model if config.bonus == "xpo" else snapshot
    metrics = {name: run.counts[name] for name in ("iteration", "negative_losses")}
    metrics["kl_iteration"] = (logps - frozen_logps(reference, batch, config)).mean().item()
    batch = run.eval_responses(1, "forward kl", reference)
    gaps = frozen_logps(reference, batch, config) - frozen_logps(run.policy, batch, config)
    metrics["forward_kl"] = gaps.mean().item()
    num_ranked = sum(run.counts[name] for name in RANKS)
    metrics |= {name: run.counts[name] / num_ranked for name in RANKS if num_ranked}
    return metrics | (gradient_norms(run.policy, groups, config) if groups else {})


def labels_a_prompt(config: Config, prompts: Batch, t: int) -> int:
    """Of iteration t, from 0, where no two texts are equal."""
    if config.bonus == "xpo" or (config.first_iteration == "offline" and t == 0):
        return 1
    has = [name in prompts.columns for name in ("reference", config.other_column)]
    return comparisons(num_samples(config, prompts) + sum(has))


def slices(config: Config, run: common.Run) -> list[Batch]:
    """The prompts of each iteration, in file order; UserError where the data set cannot serve."""
    size, where = len(run.prompts) // config.num_iterations, f"--dataset {config.dataset}"
    has_pairs = {"reference", config.other_column} <= run.prompts.columns.keys()
    wrong = f"{where}: an offline iteration needs two responses, see --other_column"
    require(has_pairs or config.first_iteration == "online", wrong)
    for t in range(config.num_iterations):
        cost = labels_a_prompt(config, run.prompts, t)
        require(cost, f"{where} has no responses to rank: --ranker_candidates must be above 0")
        needed = math.ceil(config.num_queries / config.num_iterations / cost)
        wrong = f"{where} has {size} prompts an iteration, not the {needed} that the labels need"
        require(needed <= size, f"{wrong}: fewer --num_queries?")
    rows = torch.arange(size * config.num_iterations)
    return [run.prompts.select(part) for part in rows.split(size)]


def train(config: Config, oracle: common.Oracle | None = None) -> common.Run:
    """SELM, round by round; `common.Run` says what is written where."""
    run, replay, groups = common.Run(config, oracle), common.Replay(), []
    prompts_of, num_iterations, counts = slices(config, run), config.num_iterations, run.counts
    snapshot = copy.deepcopy(run.policy)  # the policy at the start of the iteration
    reference = run.ref_model if config.bonus == "xpo" else snapshot
    run.parts |= {"snapshot": snapshot, "replay": replay}
    run.table = ("iteration", *run.table)

    def pair_loss(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
        losses, bonus, log_ratios = loss_terms(logps, ref_logps, part, config)
        if is_offline:
            return losses
        run.record(len(part), {"y_log_ratio": log_ratios.mean().item()})
        return losses + bonus

    for number in run.rounds(lambda *now: own_metrics(config, run, snapshot, groups, now)):
        rng, t = generator(config.seed, "round", number), run.iteration(num_iterations)
        # 1. In a new iteration the reference becomes the policy; the prompts are the next slice.
        if counts["iteration"] == t + 1 and counts["prompts"] == len(prompts_of[t]):
            t += 1  # its prompts are used up before its labels: equal texts cost none
            run.save()
            used_up = f"no prompt is left: --resume with --num_queries {run.oracle.queries}"
            require(t < num_iterations, used_up)
        run.prompts = prompts_of[t]
        if counts["iteration"] < t + 1:
            snapshot.load_state_dict(run.policy.state_dict())
            run.restart_optimizer()
            counts["iteration"], counts["old_pairs"] = t + 1, sum(map(len, replay.parts))
            for name in ("prompts", "negative_losses", *RANKS):
                counts[name] = 0
        labels_left = (t + 1) * config.num_queries / num_iterations - run.oracle.queries
        num_needed = math.ceil(labels_left / labels_a_prompt(config, run.prompts, t))
        num_left = len(run.prompts) - counts["prompts"]
        prompts = run.next_prompts(min(config.batch_size, num_needed, num_left))
        # 2. Draw y from it. 3. Find the chosen and the rejected response.
        is_offline = config.first_iteration == "offline" and t == 0
        collect = labelled_groups if is_offline or config.bonus == "xpo" else ranked_groups
        groups[:] = [group for group in collect(config, run, prompts, snapshot, rng) if len(group)]
        for group in groups:
            group.ref_logps = frozen_logps(reference, group, config)  # (b, N), once
        if config.bonus == "xpo" and groups:
            replay.parts = [common.stacked(replay.parts + groups)]
            old = torch.randperm(counts["old_pairs"], generator=rng)[: t * len(groups[0])]
            groups.extend([replay.parts[0].select(old)] if len(old) else [])
        # 4. One step on DPO and the bonus.
        seen = run.learn(groups, pair_loss, config.learning_rate_factors[t])
        if seen.get("loss", 0.0) < 0:
            counts["negative_losses"] += 1
            if counts["negative_losses"] == 1:
                why = "below zero, the bonus is being exploited (--bonus_floor bounds it)"
                tqdm.write(f"round {number}: the loss is {why}")
        if is_offline:
            groups.clear()  # the metrics show no bonus
        run.is_milestone = run.iteration(num_iterations) > t
    return run


if __name__ == "__main__":
    common.main(Config, train, __doc__)
