"""SEA: sample-efficient alignment by Thompson sampling, arXiv:2411.01493v2.

Labels are dear, so which two responses should the annotator compare next? SEA keeps an ensemble of
reward heads, the *epistemic reward model* (ERM): where its heads disagree, a label teaches most. A
random head picks one response, the heads' disagreement the other; the oracle's answer trains the
heads and, through a DPO-like loss, the policy. The heads also label pairs of their own, which cost
nothing. Algorithm 2 of the paper, each round:

  1. receive B `prompts`
  2. draw M candidates (--num_candidates) to each from the policy
  3. `first`: the best candidate under a random head, one drawn per prompt
  4. `second`: bai, the candidate on whose duel with `first` the heads disagree most;
               ee, the best candidate under a redrawn head, until it differs from `first`
  5. with probability gamma ask the oracle and add the duel to D; else a random head takes and
     labels its own best and worst candidate (`is_synthetic`), which never enters D
  6. train the heads on D, 5 minibatches
  7. train the policy on all pairs of the round, 1 step

Differences from the paper: 1. a constant learning rate, not a cosine; 2. temperature 1 and sampled
evaluation, not 0.7 and greedy; 3. noisy labels (its experiments: --labels argmax); 4. a burn-in of
256 labels, not 1,000; 5. Eq. 8's anchor squared, with a plus sign, and scaled so that it acts.
Differences from the released code (sail-sg/oat v0.0.4): it 1. has the oracle label synthetic pairs,
uncounted, and trains the heads on them (--synthetic_labels oracle, counted here); 2. takes the
variance of raw reward gaps (--bai_variance logit); 3. draws one head for 32 prompts; 4. has an
anchor 280 times weaker than its weight decay, so that heads overfit instead of disagreeing where
there is no data (--anchor released); 5. counts duels of equal texts; 6. ranks APL's prompts by
lowest entropy.

The paper's variants 1-7: 1 --explore passive; 2 --gamma 1; 3 the default; 4 --explore passive
--best_of_n 10; 5 --gamma 1 --best_of_n 10; 6 --best_of_n 10; 7 --gamma 1 --offline --best_of_n 10
--learning_rate 0. Its baselines: --explore passive (--offline; --loss ipo or slic), --explore apl.

    python sea.py        # under 3 minutes on two CPU cores, offline. On a GPU: README, not measured

Shapes: B prompts, N candidates a prompt, E heads, D features; common.py has the others.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import common
from common import Batch, flag, generator, packed_inputs, require


@dataclass
class Config(common.Config):
    """SEA's flags; a default of None is resolved by --explore."""

    explore: Literal["bai", "ee", "uncertainty", "passive", "apl"] = flag(
        "bai", "how duels are chosen: SEA for paid labels, SEA for users, or a baseline"
    )
    num_candidates: int | None = flag(None, "M, responses a prompt (20; apl 8; passive 2)")
    num_heads: int | None = flag(None, "K, heads of the ensemble (20; baselines 0)")
    gamma: float | None = flag(None, "share of prompts that go to the oracle (0.7; baselines 1)")
    burn_in: int = flag(256, "labels before the first synthetic pair (paper: 1000)")
    prior_std: float = flag(1.0, "disagreement of the untrained heads, in logits")
    anchor: str = flag("1", "strength lambda of the pull to each head's own start, or 'released'")
    bai_variance: Literal["sigmoid", "logit"] = flag("sigmoid", "logit: as in the released code")
    synthetic_labels: Literal["model", "oracle"] = flag("model", "oracle: as in the released code")
    erm_backbone: str = flag("./tiny/erm_backbone", "frozen encoder, or 'reference': the reference")
    loss: Literal["dpo", "ipo", "slic"] = flag("dpo", "of the policy")
    offline: bool = flag(False, "responses always come from the reference")
    best_of_n: int = flag(0, "also evaluate the mean head's best of so many samples")

    may_be_zero = (*common.Config.may_be_zero, "num_heads", "burn_in", "best_of_n")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_baseline = self.explore in ("passive", "apl")
        has_ensemble = not is_baseline or self.best_of_n > 0
        defaults = {
            "num_candidates": {"passive": 2, "apl": 8}.get(self.explore, 20),
            "num_heads": 20 if has_ensemble else 0,
            "gamma": 1.0 if is_baseline else 0.7,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        why = f"contradicts --explore {self.explore}"
        require(self.gamma <= 1, f"--gamma must be at most 1, not {self.gamma}")
        require(self.gamma == 1 or not is_baseline, f"--gamma {self.gamma} {why}")
        is_pair = self.num_candidates == 2
        is_right = is_pair if self.explore == "passive" else self.num_candidates >= 2
        require(is_right, f"--num_candidates {self.num_candidates} {why}")
        is_right = self.num_heads >= 2 if has_ensemble else self.num_heads == 0
        require(is_right, f"--num_heads {self.num_heads} {why} --best_of_n {self.best_of_n}")
        require(self.best_of_n != 1, "--best_of_n must be 0 or at least 2")
        is_right = re.fullmatch(r"released|\d*\.?\d+(e[-+]?\d)?", self.anchor)
        require(is_right, f"--anchor must be a number from 0 or 'released', not {self.anchor!r}")
        require(self.explore != "apl" or self.loss == "dpo", "--explore apl needs --loss dpo")
        arm = self.explore + "-offline" * self.offline + f"-{self.loss}" * (self.loss != "dpo")
        self.output_dir = self.output_dir or f"runs/sea-{arm}-{self.seed}"


# ------------------------------------------------------------------ the epistemic reward model


class EpistemicRewardModel(nn.Module):
    """E reward heads, MLPs with two hidden ReLU layers, on frozen features of D dimensions.

    The heads start apart, and an anchor holds each near its own start while labels are few, so they
    disagree where there is no data: their spread stands for the posterior of Algorithm 1. LeCun
    initialisation, zero biases; `calibrate` sets the scales from the first round.
    """

    num_steps, minibatch_size = 5, 128  # a round

    def __init__(self, num_features: int, config: "Config", hidden: int = 128) -> None:
        super().__init__()
        self.prior_std, self.is_released = config.prior_std, config.anchor == "released"
        self.strength = 0.5 if self.is_released else float(config.anchor)  # lambda
        sizes, rng = [num_features, hidden, hidden, 1], generator(config.seed, "ensemble")
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            weight = torch.randn(config.num_heads, fan_in, fan_out, generator=rng)
            self.weights.append(weight * fan_in**-0.5 / (2 if self.is_released else 1))
            self.biases.append(torch.zeros(config.num_heads, 1, fan_out))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.register_buffer("sigmas", torch.tensor([fan_in**-0.5 for fan_in in sizes[:-1]]))
        self.start = nn.ParameterList(p.detach().clone() for p in (*self.weights, *self.biases))
        self.start.requires_grad_(False)
        self.pairs = torch.zeros(0, 2, num_features, device=config.device)  # D
        self.to(config.device)
        decay = 5e-5 if self.is_released else 0.0
        trained = (*self.weights, *self.biases)
        self.optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=decay)

    def forward(self, features: Tensor) -> Tensor:
        """Rewards (E, B, N) of features (B, N, D): one batched product a layer for all heads."""
        hidden = ((features - self.mean) / self.std).flatten(0, 1)  # (B N, D)
        hidden = hidden.expand(len(self.weights[0]), -1, -1)  # (E, B N, D)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden.relu() if layer else hidden, weight)
        return hidden.view(-1, *features.shape[:2])  # (E, B N, 1) -> (E, B, N)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """On the first round's features (B, N, D): standardise each dimension, and scale the last
        layer so that neighbouring candidates' reward gaps have a standard deviation over heads of
        `prior_std` logits (root mean square over pairs). The released code does neither."""
        if not self.is_released:
            flat = features.flatten(0, 1)
            self.mean.copy_(flat.mean(0))
            std = flat.std(0)  # a dimension that does not vary yet gets the usual scale
            self.std.copy_(torch.where(std > 1e-3 * std.mean(), std, std.mean()))
            gaps = self(features).diff(dim=-1)  # (E, B, N - 1)
            scale = self.prior_std / gaps.var(0).mean().sqrt().clamp(min=1e-6)
            for tensor in (self.weights[-1], self.start[len(self.weights) - 1], self.sigmas[-1]):
                tensor.mul_(scale)

    def loss(self, pairs: Tensor, num_labels: int) -> Tensor:
        """Eq. 8, summed over heads, on features (n, 2, D) of chosen and rejected:
        mean_i softplus(-gap_i) + lambda / (2 N) * sum_j ((phi_j - phi0_j) / sigma_j)^2.

        N labels so far, sigma_j the initial standard deviation in j's layer: the weight decay of a
        Bayesian prior, but towards each head's own start. Released: means over heads and
        parameters, and lambda * n / N; Adam's own decay towards zero is then 280 times stronger.
        """
        rewards = self(pairs)  # (E, n, 2)
        fit = F.softplus(rewards[..., 1] - rewards[..., 0])  # (E, n)
        moves = [p - p0 for p, p0 in zip((*self.weights, *self.biases), self.start, strict=True)]
        if self.is_released:
            squares = torch.cat([move.flatten() for move in moves]).square()
            return fit.mean() + self.strength * len(pairs) / num_labels * squares.mean()
        sigmas = self.sigmas.repeat(2)  # biases use their layer's
        anchor = sum((m / sigma).square().sum() for m, sigma in zip(moves, sigmas, strict=True))
        return fit.mean(1).sum() + self.strength / (2 * num_labels) * anchor  # Eq. 8

    def fit(self, new_pairs: Tensor, rng: torch.Generator) -> None:
        """Add labelled pairs' features (n, 2, D) to D, then Adam steps on random minibatches."""
        self.pairs = torch.cat([self.pairs, new_pairs])  # (N, 2, D)
        if self.is_released and len(self.pairs) < self.minibatch_size:
            return
        for _ in range(self.num_steps if len(self.pairs) else 0):
            rows = torch.randperm(len(self.pairs), generator=rng)[: self.minibatch_size]
            self.optimizer.zero_grad()
            self.loss(self.pairs[rows], len(self.pairs)).backward()
            self.optimizer.step()

    def get_extra_state(self) -> Tensor:
        return self.pairs  # D goes into the checkpoint with the heads

    def set_extra_state(self, state: Tensor) -> None:
        self.pairs = state.to(self.mean.device)


def packed_features(backbone: nn.Module, batch: Batch) -> Tensor:
    """Last hidden state at each response's last token, (B, N, D), read from packed rows."""
    mask = batch.response_mask
    inputs, order = packed_inputs(
        backbone, batch.prompt_ids, batch.prompt_mask, batch.response_ids, mask
    )
    states = backbone(**inputs)[0][:, -order.shape[1] :]  # (B, L, D)
    last = mask.sum(-1).cumsum(1) - 1  # (B, N), of the real tokens in order
    return states[torch.arange(len(batch))[:, None], last].float()


def plain_features(backbone: nn.Module, tokenizer: Any, batch: Batch) -> Tensor:
    """The same from one plain row a response, for encoders that cannot read packed ones."""
    pairs = zip(batch.columns["prompt"], batch.responses, strict=True)
    texts = [common.plain_text(prompt, y) for prompt, row in pairs for y in row]
    rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    last = rows["attention_mask"].sum(1) - 1  # (B N,)
    states = backbone(**rows.to(backbone.device))[0]  # (B N, S, D)
    return states[torch.arange(len(last)), last].view(len(batch), -1, states.shape[-1]).float()


def retokenise(batch: Batch, tokenizer: Any) -> Batch:
    """The batch's texts in the tokens of another model; an empty response is read as one EOS."""
    options = dict(padding=True, return_tensors="pt")
    prompts = tokenizer(batch.columns["prompt"], padding_side="left", **options)
    texts = [y.strip() for row in batch.responses for y in row]
    texts = [f" {text}" if text else tokenizer.eos_token for text in texts]
    responses = tokenizer(texts, padding_side="right", add_special_tokens=False, **options)
    shape = (len(batch), -1, responses["input_ids"].shape[1])  # (B, N, R)
    return dataclasses.replace(
        batch,
        prompt_ids=prompts["input_ids"],
        prompt_mask=prompts["attention_mask"],
        response_ids=responses["input_ids"].view(shape),
        response_mask=responses["attention_mask"].view(shape),
    )


# ------------------------------------------------------------------ which pair to compare


def thompson_first(rewards: Tensor, heads: Tensor, is_distinct: Tensor) -> Tensor:
    """Step 3: the best distinct candidate under each prompt's own head.

    Rewards (E, B, N), heads (B,), is_distinct (B, N) -> candidate numbers (B,).
    """
    own = rewards[heads, torch.arange(len(heads))]  # (B, N)
    return own.masked_fill(~is_distinct, -math.inf).argmax(-1)


def second_bai(rewards: Tensor, first: Tensor, is_distinct: Tensor, variance: str) -> Tensor:
    """Step 4, best-arm identification: argmax_b Var_heads[sigmoid(r(first) - r(b))], (B,).

    `variance` "logit" leaves the sigmoid out, as the released code does.
    """
    gaps = rewards.gather(2, first.expand(len(rewards), -1)[..., None]) - rewards  # (E, B, N)
    spread = (gaps.sigmoid() if variance == "sigmoid" else gaps).var(0)  # (E, B, N) -> (B, N)
    spread = spread.scatter(1, first[:, None], -0.5)  # itself only if nothing else is distinct
    return spread.masked_fill(~is_distinct, -1).argmax(-1)


def second_ee(
    rewards: Tensor, first: Tensor, heads: Tensor, redraws: Tensor, is_distinct: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 4, explore and exploit: the best candidate of the first redrawn head (tries, B) that
    disagrees with `first`; after the last try the second best of the head that chose `first`.

    Returns candidate numbers and whether that fallback was needed (a clash), each (B,).
    """
    best = rewards.masked_fill(~is_distinct, -math.inf).argmax(-1)  # (E, B)
    tries = best.gather(0, redraws)  # (tries, B)
    differs = tries != first
    second = tries.gather(0, differs.int().argmax(0, keepdim=True))[0]  # (B,)
    is_clash = ~differs.any(0)
    others = is_distinct.scatter(1, first[:, None], False)
    runner_up = thompson_first(rewards, heads, others)  # itself, no duel, if it is the only text
    return torch.where(is_clash, runner_up, second), is_clash


def most_uncertain_pair(rewards: Tensor, is_distinct: Tensor) -> tuple[Tensor, Tensor]:
    """The pair with the largest variance over heads of its reward gap, (E, B, N) -> (B,), (B,)."""
    num = rewards.shape[-1]
    spread = (rewards[..., :, None] - rewards[..., None, :]).var(0)  # (E, B, N, N) -> (B, N, N)
    allowed = is_distinct[:, :, None] & is_distinct[:, None, :]
    flat = spread.masked_fill(~allowed, -1).flatten(1).argmax(1)  # (B,)
    return flat // num, flat % num


def keep_uncertain(batch: Batch, run: common.Run, num_kept: int) -> tuple[Batch, Tensor]:
    """APL (arXiv:2402.08114): keep the prompts of highest predictive entropy, estimated as minus
    the mean over candidates of log pi(y | x); with their implicit rewards (1, num_kept, N)."""
    logps = common.frozen_logps(run.policy, batch, run.config)  # (B, N)
    kept = (-logps.mean(1)).topk(num_kept).indices
    batch = batch.select(kept)
    ref_logps = common.frozen_logps(run.ref_model, batch, run.config)
    return batch, run.config.beta * (logps[kept] - ref_logps)[None]


def choose_duels(
    config: Config, batch: Batch, rewards: Tensor | None, is_synthetic: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 3 and 4: two candidate numbers a prompt and whether the draw clashed, each (B,).

    Rewards (E, B, N) are the ensemble's (apl: implicit rewards, E = 1; passive: not looked at).
    A synthetic pair is a random head's best and worst candidate, in this order.
    """
    rows, is_clash = torch.arange(len(batch)), torch.zeros(len(batch), dtype=torch.bool)
    if config.explore == "passive":
        return torch.zeros_like(rows), torch.ones_like(rows), is_clash
    num_heads, is_distinct = len(rewards), common.distinct(batch.responses)
    heads = torch.randint(num_heads, (len(batch),), generator=rng)  # one per prompt
    redraws = torch.randint(num_heads, (num_heads, len(batch)), generator=rng)
    best, worst = common.widest_pair(rewards[heads, rows], is_distinct)
    if config.explore == "apl":
        return best, worst, is_clash
    if config.explore == "uncertainty":
        first, second = most_uncertain_pair(rewards, is_distinct)
    else:
        first = thompson_first(rewards, heads, is_distinct)
    if config.explore == "bai":
        second = second_bai(rewards, first, is_distinct, config.bai_variance)
    if config.explore == "ee":
        second, is_clash = second_ee(rewards, first, heads, redraws, is_distinct)
    first, second = torch.where(is_synthetic, best, first), torch.where(is_synthetic, worst, second)
    return first, second, is_clash & ~is_synthetic


def head_metrics(
    rewards: Tensor, asked: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[int, dict[str, float]]:
    """ensemble_accuracy: the mean head's on the new labels, before it learns them;
    ensemble_disagreement: mean over prompts of the standard deviation over heads of
    sigmoid(r(first sample) - r(second sample)), two arbitrary samples of the policy."""
    gaps = rewards.gather(2, torch.stack([chosen, rejected], 1).expand(len(rewards), -1, -1))
    is_right = gaps.diff(dim=-1)[:, asked, 0].mean(0) < 0  # (E, B, 2) -> (n,)
    spread = (rewards[..., 0] - rewards[..., 1]).sigmoid().std(0)  # (E, B) -> (B,)
    accuracy, disagreement = is_right.double().mean().item(), spread.mean().item()
    return len(asked), {"ensemble_accuracy": accuracy, "ensemble_disagreement": disagreement}


# ------------------------------------------------------------------ Algorithm 2


def load_ensemble(config: Config, run: common.Run) -> tuple[EpistemicRewardModel, Callable]:
    """The heads, and the function from a `Batch` to the features (B, N, D) that they read."""
    tokenizer, is_packed = None, True
    backbone = run.ref_model.base_model  # "reference": it shares the policy's tokens
    if config.erm_backbone != "reference":
        name, flag_name, dtype = config.erm_backbone, "erm_backbone", torch.float32
        tokenizer = common.load_pretrained(transformers.AutoTokenizer, name, flag_name)
        backbone = common.load_pretrained(transformers.AutoModel, name, flag_name, dtype=dtype)
        lengths = (config.max_prompt_length, config.max_new_tokens)
        is_packed = common.packing_error(backbone, *lengths) < 1e-3
        if not is_packed:
            print(f"--erm_backbone {name} is read one row a response: it cannot read packed rows")
        dtype = torch.bfloat16 if config.device.startswith("cuda") else dtype
        backbone.to(config.device, dtype)

    @torch.no_grad()
    def read(batch: Batch) -> Tensor:
        features = []
        with common.autocast(backbone.device):
            for _, part in batch.split(config.micro_batch_size):
                if not is_packed:
                    features.append(plain_features(backbone, tokenizer, part))
                else:
                    part = retokenise(part, tokenizer) if tokenizer else part
                    features.append(packed_features(backbone, part))
        return torch.cat(features)

    ensemble = EpistemicRewardModel(backbone.config.hidden_size, config)
    run.parts |= {"ensemble": ensemble, "ensemble_optimizer": ensemble.optimizer}
    return ensemble, read


@torch.no_grad()
def own_metrics(config: Config, run: common.Run, ensemble: Any, read: Callable) -> dict[str, float]:
    """clashes: `ee` duels so far for which no redrawn head wanted another candidate; and of the
    mean head's best of N policy samples, win_metrics and reward on the held-out prompts."""
    clashes = {"clashes": run.counts["clashes"]}
    if not config.best_of_n:
        return clashes
    batch = run.eval_responses(config.best_of_n, "best of n")
    mean_rewards = ensemble(read(batch)).mean(0).cpu()  # (E, B, N) -> (B, N)
    texts = [[row[n]] for row, n in zip(batch.responses, mean_rewards.argmax(-1), strict=True)]
    rewards = run.oracle.score(batch.columns["prompt"], texts)[:, 0]
    metrics = common.win_metrics(rewards, run.baseline_rewards) | {"reward": rewards.mean().item()}
    return clashes | {f"best_of_n_{name}": value for name, value in metrics.items()}


def train(config: Config, oracle: common.Oracle | None = None) -> common.Run:
    """SEA, round by round; `common.Run` says what is written where."""
    run = common.Run(config, oracle)
    ensemble, read_features = load_ensemble(config, run) if config.num_heads else (None, None)
    sampler = run.ref_model if config.offline else run.policy
    decoder = partial(run.decoder, sampler, config.num_candidates)
    num_prompts = config.batch_size * (4 if config.explore == "apl" else 1)

    def pair_loss(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
        lengths = part.response_mask.sum(-1).to(logps.device)  # (b, 2)
        per = lengths if config.loss == "ipo" else 1  # IPO is on means over tokens
        loss = {"dpo": common.dpo, "ipo": common.ipo, "slic": common.slic}[config.loss]
        return loss(logps / per, ref_logps / per, config.beta)

    for number in run.rounds(lambda *_: own_metrics(config, run, ensemble, read_features)):
        rng = generator(config.seed, "round", number)
        # 1. Receive prompts, and 2. draw M candidates a prompt.
        prompts = run.next_prompts(num_prompts)
        batch = run.respond(decoder, prompts, config.num_candidates, rng, config.temperature)
        run.counts["candidates"] += len(prompts) * config.num_candidates
        run.lap("generate")
        # 3, 4. Choose a duel a prompt; the heads choose some pairs for themselves.
        if config.explore == "apl":
            batch, implicit_rewards = keep_uncertain(batch, run, config.batch_size)
        if ensemble:
            features = read_features(batch)
            if number == 0:
                ensemble.calibrate(features)
            rewards = ensemble(features).detach().cpu()  # (E, B, N)
        judges = implicit_rewards if config.explore == "apl" else rewards if ensemble else None
        is_mixed = run.oracle.queries >= config.burn_in
        is_synthetic = is_mixed & (torch.rand(len(batch), generator=rng) >= config.gamma)
        first, second, is_clash = choose_duels(config, batch, judges, is_synthetic, rng)
        run.counts["clashes"] += int(is_clash.sum())
        run.lap("select")
        # 5. Ask the oracle about the duels of distinct texts; synthetic pairs are labelled already.
        is_model = is_synthetic & (config.synthetic_labels == "model")
        asked, chosen, rejected = run.ask(batch, first, second, ~is_model)
        # 6. Train the heads on D, to which duels that the oracle labelled are added, and no others.
        if ensemble:
            run.record(*head_metrics(rewards, asked, chosen, rejected))
            ensemble.fit(features[asked[:, None], torch.stack([chosen, rejected], 1)[asked]], rng)
            run.lap("ensemble")
        # 7. Train the policy on all pairs of the round.
        kept = run.keep(batch, chosen, rejected, is_model)
        run.learn([batch.select(kept, torch.stack([chosen, rejected], 1)[kept])], pair_loss)
    return run


if __name__ == "__main__":
    common.main(Config, train, __doc__)
