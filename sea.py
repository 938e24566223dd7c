"""SEA: sample-efficient alignment by Thompson sampling, arXiv:2411.01493v2.

Labels are dear, so which two responses should the annotator compare next? SEA treats this as a
dueling bandit. It keeps an ensemble of reward heads, the *epistemic reward model* (ERM): where its
heads disagree, a label teaches most. A random head picks one response, the heads' disagreement the
other; the oracle's answer trains the heads and, through a DPO-like loss, the policy. The heads also
label pairs of their own, which cost nothing. Algorithm 2 of the paper, each round:

  1. receive B `prompts`
  2. draw M candidates (--num_candidates) to each from the policy
  3. `first`: the best candidate under a random head, one drawn per prompt
  4. `second`: bai, the candidate on whose duel with `first` the heads disagree most;
               ee, the best candidate under a redrawn head, until it differs from `first`
  5. with probability gamma ask the oracle and add the duel to D; else a random head takes and
     labels its own best and worst candidate (`is_synthetic`), which never enters D
  6. train the heads on D, 5 minibatches
  7. train the policy on all pairs of the round, 1 step

Differences from the paper and its experiments: 1. a constant learning rate, not a cosine; 2.
temperature 1 and sampled evaluation, not 0.7 and greedy; 3. noisy labels (its experiments: --labels
argmax); 4. a burn-in of 256 labels, not 1,000; 5. Eq. 8's anchor squared, with a plus sign, and
scaled so that it acts; 6. features are means over a response's tokens, not states of PairRM.
Differences from the released code (sail-sg/oat v0.0.4): it 1. has the oracle label synthetic pairs,
uncounted, and trains the heads on them; 2. takes the variance of raw reward gaps (--bai_variance
logit); 3. draws one head for 32 prompts; 4. has an anchor at least 280 times weaker than its weight
decay, so that heads overfit instead of disagreeing where there is no data; 5. counts duels of equal
texts; 6. ranks APL's prompts by lowest entropy.

The paper's variants 1-7: 1 --explore passive; 2 --gamma 1; 3 the default; 4 --explore passive
--best_of_n 10; 5 --gamma 1 --best_of_n 10; 6 --best_of_n 10; 7 --explore ee --gamma 1 --offline
--best_of_n 10 --learning_rate 0. Baselines: --explore passive (--offline; --loss ipo, slic), apl.

    python sea.py      # 2 to 4 minutes on two CPU cores, offline; GPUs: README.md

Shapes: B prompts, N candidates a prompt, E heads, D features; common.py has the others.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import common
import harness
from common import Batch, frozen_logps, generator, require, train_step
from harness import evaluate, flag, next_prompts

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn


@dataclass
class Config(harness.Config):
    """SEA's flags; a default of None depends on --explore."""

    explore: Literal["bai", "ee", "uncertainty", "best_two", "random", "passive", "apl"] = flag(
        "bai", "how duels are chosen: SEA for paid labels, SEA for users, a control or a baseline"
    )
    num_candidates: int | None = flag(None, "M, responses a prompt (20; apl 8; passive 2)")
    num_heads: int | None = flag(None, "K, heads of the ensemble (20; baselines 0)")
    gamma: float | None = flag(None, "share of prompts that go to the oracle (0.7; baselines 1)")
    burn_in: int = flag(256, "labels before the first synthetic pair (paper: 1000)")
    prior_std: float = flag(1.0, "disagreement of the untrained heads, in logits")
    anchor: float = flag(1.0, "lambda, strength of the pull to each head's own start")
    bai_variance: Literal["sigmoid", "logit"] = flag("sigmoid", "logit: as in the released code")
    erm_backbone: str = flag("./tiny/erm_backbone", "frozen encoder, or 'reference': the reference")
    loss: Literal["dpo", "ipo", "slic"] = flag("dpo", "of the policy")
    offline: bool = flag(False, "responses always come from the reference")
    best_of_n: int = flag(0, "also evaluate the mean head's best of so many samples")

    script, arm = "sea", "explore"
    shown = (*harness.Config.shown, "online_win_rate", "ensemble_disagreement")
    may_be_zero = (*harness.Config.may_be_zero, "num_heads", "burn_in", "anchor", "best_of_n")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_baseline = self.explore in ("passive", "apl")
        has_heads = not is_baseline or self.best_of_n > 0
        wrong = f" contradicts --explore {self.explore}"
        if self.num_candidates is None:
            self.num_candidates = {"passive": 2, "apl": 8}.get(self.explore, 20)
        if self.num_heads is None:
            self.num_heads = 20 if has_heads else 0
        if self.gamma is None:
            self.gamma = 1.0 if is_baseline else 0.7
        require(self.gamma <= 1, "--gamma is a share, at most 1")
        require(self.num_candidates >= 2, "--num_candidates must be 2 or more")
        require(self.num_heads >= 2 or not has_heads, "--num_heads must be 2 or more")
        require(self.num_heads == 0 or has_heads, "--num_heads" + wrong + ": it has no use")
        require(self.gamma == 1 or not is_baseline, "--gamma" + wrong)
        require(self.num_candidates == 2 or self.explore != "passive", "--num_candidates" + wrong)
        require(self.loss == "dpo" or self.explore != "apl", "--loss" + wrong)


# ---------------- the epistemic reward model


class EpistemicRewardModel(nn.Module):
    """E reward heads, MLPs with two hidden ReLU layers, on frozen features of D dimensions.

    The heads start apart, and an anchor holds each near its own start while labels are few, so they
    disagree where there is no data: their spread stands for the posterior of Algorithm 1.
    """

    num_steps, minibatch_size = 5, 128  # a round

    def __init__(self, num_features: int, config: Config, hidden: int = 128) -> None:
        super().__init__()
        self.prior_std, self.strength = config.prior_std, config.anchor  # lambda
        sizes, rng = [num_features, hidden, hidden, 1], generator(config.seed, "ensemble")
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            weight = torch.randn(config.num_heads, fan_in, fan_out, generator=rng)
            self.weights.append(weight * fan_in**-0.5)
            self.biases.append(torch.zeros(config.num_heads, 1, fan_out))
        self.start = nn.ParameterList(p.detach().clone() for p in (*self.weights, *self.biases))
        self.start.requires_grad_(False)
        self.register_buffer("sigmas", torch.tensor([fan_in**-0.5 for fan_in in sizes[:-1]]))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.register_buffer("is_calibrated", torch.tensor(False))
        self.pairs = torch.zeros(0, 2, num_features)  # D
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=1e-3)

    def forward(self, features: Tensor) -> Tensor:
        """Rewards (E, B, N) of features (B, N, D): one batched product a layer for all heads."""
        hidden = ((features - self.mean) / self.std).flatten(0, 1)  # (B N, D)
        hidden = hidden.expand(len(self.weights[0]), -1, -1)  # (E, B N, D)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            hidden = torch.baddbmm(bias, hidden.relu() if layer else hidden, weight)
        return hidden.view(-1, *features.shape[:2])  # (E, B N, 1) -> (E, B, N)

    @torch.no_grad()
    def calibrate(self, features: Tensor, is_distinct: Tensor) -> None:
        """On the first features (B, N, D) with two distinct candidates (B, N) side by side:
        standardise each dimension, and scale the last layer so that the gaps of such neighbours
        have a standard deviation over heads of `prior_std` logits (root mean square)."""
        flat = features[is_distinct]  # (n, D)
        is_pair = is_distinct[:, 1:] & is_distinct[:, :-1]  # (B, N - 1)
        if self.is_calibrated or not features.diff(dim=1)[is_pair].any():
            return
        self.mean.copy_(flat.mean(0))
        std = flat.std(0)  # a dimension that does not vary yet gets the usual scale
        self.std.copy_(torch.where(std > 1e-3 * std.mean(), std, std.mean()))
        gaps = self(features).diff()[:, is_pair]  # (E, n)
        scale = self.prior_std / gaps.var(0).mean().sqrt()
        for tensor in (self.weights[-1], self.start[len(self.weights) - 1], self.sigmas[-1]):
            tensor.mul_(scale)
        self.is_calibrated.fill_(True)

    def loss(self, pairs: Tensor, num_labels: int) -> Tensor:
        """Eq. 8, summed over heads, on features (n, 2, D) of chosen and rejected:
        mean_i softplus(-gap_i) + lambda / (2 N) * sum_j ((phi_j - phi0_j) / sigma_j)^2.
        N labels so far, sigma_j the initial standard deviation in j's layer: the weight decay of a
        Bayesian prior, but towards each head's own start."""
        rewards = self(pairs)  # (E, n, 2)
        fit = F.softplus(rewards[..., 1] - rewards[..., 0])  # (E, n)
        sigmas = (*self.sigmas, *self.sigmas)  # biases use their layer's
        trios = zip((*self.weights, *self.biases), self.start, sigmas)
        anchor = sum(((now - start) / sigma).square().sum() for now, start, sigma in trios)
        return fit.mean(1).sum() + self.strength / (2 * num_labels) * anchor  # Eq. 8

    def fit(self, new_pairs: Tensor, rng: torch.Generator) -> None:
        """Add labelled pairs' features (n, 2, D) to D, then Adam steps on random minibatches."""
        self.pairs = torch.cat([self.pairs, new_pairs])  # (N, 2, D)
        for _ in range(self.num_steps if len(self.pairs) else 0):
            rows = torch.randperm(len(self.pairs), generator=rng)[: self.minibatch_size]
            self.optimizer.zero_grad()
            self.loss(self.pairs[rows], len(self.pairs)).backward()
            self.optimizer.step()

    def get_extra_state(self) -> dict[str, Any]:
        """D and the optimiser's state go into the checkpoint with the heads."""
        return {"pairs": self.pairs, "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.pairs = state["pairs"]
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def read_features(backbone: nn.Module, batch: Batch, config: Config) -> Tensor:
    """Mean of the backbone's last hidden states over each response's tokens, (B, N, D)."""

    def features(rows: Tensor) -> Tensor:
        part = batch.select(rows)
        mask = part.response_mask.to(backbone.device)  # (b, N, R)
        tensors = (part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
        row = common.packed_row(backbone, *tensors)
        length = common.packed_mask(mask).shape[1]  # L
        with common.autocast(backbone.device):
            states = backbone(**row)[0][:, -length:].float()  # (b, L, D)
        sums = common.unpack(states, mask).sum(2)  # (b, N, R, D) -> (b, N, D)
        return (sums / mask.sum(2, keepdim=True)).cpu()

    return common.in_parts(features, len(batch), config.micro_batch_size)


# ---------------- which pair to compare


def thompson_first(rewards: Tensor, heads: Tensor, is_distinct: Tensor) -> Tensor:
    """Step 3: the best distinct candidate under each prompt's own head: rewards (E, B, N), heads
    (B,), is_distinct (B, N) -> candidate numbers (B,)."""
    own = rewards[heads, torch.arange(len(heads))]  # (B, N)
    return own.masked_fill(~is_distinct, -math.inf).argmax(-1)


def second_bai(rewards: Tensor, first: Tensor, is_distinct: Tensor, variance: str) -> Tensor:
    """Step 4, best-arm identification: argmax_b Var_heads[sigmoid(r(first) - r(b))], (B,).
    `variance` "logit" leaves the sigmoid out, as the released code does."""
    gaps = rewards.gather(2, first.expand(len(rewards), -1)[..., None]) - rewards  # (E, B, N)
    spread = (gaps.sigmoid() if variance == "sigmoid" else gaps).var(0)  # (E, B, N) -> (B, N)
    others = is_distinct.scatter(1, first[:, None], False)
    return spread.masked_fill(~others, -1).argmax(-1)


def second_ee(
    rewards: Tensor, first: Tensor, heads: Tensor, redraws: Tensor, is_distinct: Tensor
) -> Tensor:
    """Step 4, explore and exploit: the best candidate of the first redrawn head (tries, B) that
    disagrees with `first`; after the last try the second best of the head that chose it, (B,)."""
    best = rewards.masked_fill(~is_distinct, -math.inf).argmax(-1)  # (E, B)
    others = is_distinct.scatter(1, first[:, None], False)
    last = thompson_first(rewards, heads, others)  # (B,)
    tries = torch.cat([best.gather(0, redraws), last[None]])  # (tries + 1, B)
    return tries.gather(0, (tries != first).int().argmax(0, keepdim=True))[0]


def most_uncertain_pair(rewards: Tensor, is_distinct: Tensor) -> tuple[Tensor, Tensor]:
    """The pair with the largest variance over heads of its reward gap, (E, B, N) -> (B,), (B,)."""
    spread = (rewards[..., :, None] - rewards[..., None, :]).var(0)  # (E, B, N, N) -> (B, N, N)
    is_allowed = is_distinct[:, :, None] & is_distinct[:, None, :]
    flat = spread.masked_fill(~is_allowed, -1).flatten(1).argmax(1)  # (B,)
    return torch.unravel_index(flat, spread.shape[1:])


def choose_duels(
    config: Config, batch: Batch, rewards: Tensor | None, is_synthetic: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Steps 3 to 5: two candidate numbers a prompt, (B,) each, by the heads' rewards (E, B, N) or,
    with E = 1, APL's implicit ones; passive exploration takes the first two candidates. A synthetic
    pair is a random head's best and worst."""
    rows = torch.arange(len(batch))
    if config.explore == "passive":
        return torch.zeros_like(rows), torch.ones_like(rows)
    is_distinct = common.distinct(batch.responses)
    heads = torch.randint(len(rewards), (len(batch),), generator=rng)  # one per prompt
    best, worst = common.widest_pair(rewards[heads, rows], is_distinct)
    if config.explore == "apl":
        return best, worst
    if config.explore == "uncertainty":
        first, second = most_uncertain_pair(rewards, is_distinct)
    elif config.explore == "best_two":  # of the mean head, as if it were certain: a control
        mean = rewards.mean(0).masked_fill(~is_distinct, -math.inf)  # (E, B, N) -> (B, N)
        first, second = mean.topk(2).indices.T
    elif config.explore == "random":  # the first two distinct ones, which come in no order
        first, second = 0 * rows, is_distinct[:, 1:].int().argmax(1) + 1
    else:
        first = thompson_first(rewards, heads, is_distinct)
    if config.explore == "bai":
        second = second_bai(rewards, first, is_distinct, config.bai_variance)
    if config.explore == "ee":
        redraws = torch.randint(len(rewards), (len(rewards), len(batch)), generator=rng)
        second = second_ee(rewards, first, heads, redraws, is_distinct)
    return torch.where(is_synthetic, best, first), torch.where(is_synthetic, worst, second)


def keep_uncertain(
    batch: Batch, policy: nn.Module, ref_model: nn.Module, config: Config
) -> tuple[Batch, Tensor]:
    """APL (arXiv:2402.08114): the --batch_size prompts of highest predictive entropy, estimated as
    minus the mean over candidates of log pi(y | x), and their implicit rewards (1, B, N)."""
    logps = frozen_logps(policy, batch, config)  # (B, N)
    kept = (-logps.mean(1)).topk(config.batch_size).indices
    batch = batch.select(kept)
    ref_logps = frozen_logps(ref_model, batch, config)
    return batch, config.beta * (logps[kept] - ref_logps)[None]


def head_metrics(rewards: Tensor) -> dict[str, float]:
    """ensemble_disagreement: mean over prompts of the standard deviation over heads of
    sigmoid(r(first sample) - r(second sample)), two arbitrary samples of the policy, (E, B, N)."""
    spread = (rewards[..., 0] - rewards[..., 1]).sigmoid().std(0)  # (E, B, N) -> (B,)
    return {"ensemble_disagreement": spread.mean().item()}


def best_of_n_metrics(
    task: harness.Task, config: Config, backbone: nn.Module, ensemble: EpistemicRewardModel
) -> dict[str, float]:
    """best_of_n_*: win_metrics and reward of the mean head's best of N policy samples."""
    rng, models = generator(config.seed, "best of n"), (task.policy, task.tokenizer)
    batch = common.respond(*models, task.held_out, config.best_of_n, rng, config, temperature=1.0)
    best = ensemble(read_features(backbone, batch, config)).mean(0).argmax(-1)  # (E, B, N) -> (B,)
    texts = [[row[n]] for row, n in zip(batch.responses, best)]
    rewards = task.oracle.score(batch.columns["prompt"], texts)  # (B, 1)
    require(rewards is not None, "--best_of_n needs an oracle with `score`")
    metrics = harness.win_metrics(rewards[:, 0], torch.tensor(batch.columns["reference_reward"]))
    metrics["reward"] = rewards.double().mean().item()
    return {f"best_of_n_{name}": value for name, value in metrics.items()}


# ---------------- Algorithm 2


def load_ensemble(
    config: Config, ref_model: nn.Module, tokenizer: Any
) -> tuple[nn.Module, EpistemicRewardModel]:
    """The frozen encoder of --erm_backbone, which reads the policy's tokens, and the heads."""
    backbone, auto_class = ref_model.base_model, transformers.AutoModel
    if config.erm_backbone != "reference":
        backbone, _ = harness.load_pretrained(auto_class, "erm_backbone", config, tokenizer)
        backbone.to(torch.bfloat16 if config.device.startswith("cuda") else torch.float32)
    print(f"backbone   {config.erm_backbone}, {config.num_heads} heads")
    return backbone, EpistemicRewardModel(backbone.config.hidden_size, config)


def pair_loss(config: Config, logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
    """--loss of log-probabilities, (b, 2) -> (b,); IPO's are means over tokens."""
    loss = {"dpo": common.dpo, "ipo": common.ipo, "slic": common.slic}[config.loss]
    per = part.response_mask.sum(-1).to(logps.device) if config.loss == "ipo" else 1  # (b, 2)
    return loss(logps / per, ref_logps / per, config.beta)


def train(config: Config, oracle: harness.Oracle | None = None) -> harness.Run:
    """SEA, round by round, into --output_dir; the oracle is --reward_model unless one is given."""
    task = harness.load(config, oracle)
    policy, ref_model, tokenizer, oracle = task.policy, task.ref_model, task.tokenizer, task.oracle
    optimizer, loss = common.start_optimizer(policy, config), partial(pair_loss, config)
    parts = {"policy": policy, "optimizer": optimizer}
    ensemble = rewards = None
    if config.num_heads:
        backbone, ensemble = load_ensemble(config, ref_model, tokenizer)
        parts["ensemble"] = ensemble
    run = harness.Run(config, oracle, parts, harness.Counts())
    num_prompts = config.batch_size * (4 if config.explore == "apl" else 1)

    while True:
        is_last = oracle.queries >= config.num_queries
        if run.evaluation_is_due(is_last):
            own = best_of_n_metrics(task, config, backbone, ensemble) if config.best_of_n else {}
            run.log(*evaluate(task, config), own)
        if is_last:
            break
        rng = generator(config.seed, "round", run.round)
        # 1. Receive prompts, and 2. draw M candidates a prompt.
        batch = next_prompts(task.prompts, run.round * num_prompts, num_prompts, config.seed)
        sampler = ref_model if config.offline else policy
        batch = common.respond(sampler, tokenizer, batch, config.num_candidates, rng, config)
        run.counts.add_samples(num_prompts * config.num_candidates)
        # 3, 4. Choose a duel a prompt; the heads choose some pairs for themselves.
        if config.explore == "apl":
            batch, rewards = keep_uncertain(batch, policy, ref_model, config)
        if ensemble:
            features = read_features(backbone, batch, config)  # (B, N, D)
            ensemble.calibrate(features, common.distinct(batch.responses))
            head_rewards = ensemble(features).detach()  # (E, B, N)
            rewards = rewards if config.explore == "apl" else head_rewards
        gamma = config.gamma if oracle.queries >= config.burn_in else 1.0
        is_synthetic = torch.rand(len(batch), generator=rng) >= gamma  # (B,)
        first, second = choose_duels(config, batch, rewards, is_synthetic, rng)
        # 5. Ask the oracle, where the texts differ and the budget allows.
        picks = torch.stack([first, second], dim=1)  # (B, 2)
        duels = batch.select(torch.arange(len(batch)), picks)
        is_pair = common.distinct(duels.responses)[:, 1]
        asked = (is_pair & ~is_synthetic).nonzero()[: config.num_queries - oracle.queries, 0]
        order, online = oracle.label(duels.select(asked))
        winners = picks[asked].gather(1, order)  # (n, 2): chosen and rejected candidates
        run.record(online)
        # 6. Train the heads on D, to which the labelled duels are added, and no others.
        if ensemble:
            run.record(head_metrics(head_rewards))
            ensemble.fit(features[asked[:, None], winners], rng)
        # 7. Train the policy on all pairs of the round.
        synthetic = (is_pair & is_synthetic).nonzero()[:, 0]
        pairs = batch.select(torch.cat([asked, synthetic]), torch.cat([winners, picks[synthetic]]))
        run.keep(pairs, len(synthetic))
        pairs.ref_logps = frozen_logps(ref_model, pairs, config)  # (n, 2)
        run.record(train_step(policy, optimizer, pairs, loss, config))
        run.counts.gradient_steps += len(pairs) > 0
        run.end_round()
    run.finish(policy, tokenizer)
    return run


if __name__ == "__main__":
    harness.main(Config, train, __doc__)
