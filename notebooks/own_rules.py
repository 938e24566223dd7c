"""Five rules of our own for choosing duels: does one save labels against `bai` and `best_two`?

    python notebooks/own_rules.py --rules bai best_two disputed_four information information_six \
        gain best_and_any --against bai best_two --seeds 10 --first_seed 100 [--taste 1]

The simulator with further rules. What was asked of them, and in which order, stands in protocol.md;
what came out, in results.ipynb. A rule takes what my_rule.py's takes: rewards (E, B, N).
"""

import simulator
import torch
from simulator import common, sea
from torch import Tensor


def best_few(batch: common.Batch, rewards: Tensor, num: int) -> Tensor:
    """True, (B, N), at the mean head's best distinct candidates."""
    is_distinct = common.distinct(batch.responses)
    mean = rewards.mean(0).masked_fill(~is_distinct, -torch.inf)  # (B, N)
    return is_distinct & torch.zeros_like(is_distinct).scatter(1, mean.topk(num).indices, True)


def pair_of_most(value: Tensor, is_allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of allowed candidates (B, N) with the largest value (B, N, N), (B,) and (B,)."""
    is_pair = is_allowed[:, :, None] & is_allowed[:, None, :]
    is_pair = is_pair & ~torch.eye(value.shape[1], dtype=torch.bool)
    flat = value.masked_fill(~is_pair, -torch.inf).flatten(1).argmax(1)
    return torch.unravel_index(flat, value.shape[1:])


def answers(rewards: Tensor) -> Tensor:
    """What each head expects of each duel: P(i wins against j), (E, B, N) -> (E, B, N, N)."""
    return (rewards[..., :, None] - rewards[..., None, :]).sigmoid()


def entropy(p: Tensor) -> Tensor:
    """Of an answer that is yes with probability p, in nats."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


def most_informative(rewards: Tensor, is_allowed: Tensor) -> tuple:
    """The pair whose answer says most about which head is right, in nats. Other than the variance
    of gaps it takes the answer's own noise off."""
    p = answers(rewards)
    return pair_of_most(entropy(p.mean(0)) - entropy(p).mean(0), is_allowed)


def disputed_four(batch: common.Batch, rewards: Tensor, rng: torch.Generator) -> tuple:
    """The example of my_rule.py."""
    return sea.most_uncertain_pair(rewards, best_few(batch, rewards, 4))


def information(batch: common.Batch, rewards: Tensor, rng: torch.Generator) -> tuple:
    return most_informative(rewards, common.distinct(batch.responses))


def information_six(batch: common.Batch, rewards: Tensor, rng: torch.Generator) -> tuple:
    return most_informative(rewards, best_few(batch, rewards, 6))


def gain(batch: common.Batch, rewards: Tensor, rng: torch.Generator) -> tuple:
    """The knowledge gradient: the pair after whose answer the best candidate is expected to be best
    by most, if each head counts by the probability that it gave to the answer. What a head adds to
    all candidates adds the same to every pair."""
    p, num = answers(rewards), len(rewards)
    after = [torch.einsum("ebij,ebn->bijn", answer, rewards) / num for answer in (p, 1 - p)]
    value = sum(mean.max(-1).values for mean in after)  # (B, N, N)
    return pair_of_most(value, common.distinct(batch.responses))


def best_and_any(batch: common.Batch, rewards: Tensor, rng: torch.Generator) -> tuple:
    """The mean head's best against an arbitrary other: near the best, and with a contrast."""
    is_distinct = common.distinct(batch.responses)
    first = rewards.mean(0).masked_fill(~is_distinct, -torch.inf).argmax(1)
    others = is_distinct.scatter(1, first[:, None], False)
    chance = torch.rand(others.shape, generator=rng)
    return first, chance.masked_fill(~others, -1).argmax(1)


RULES = {
    rule.__name__: rule
    for rule in (disputed_four, information, information_six, gain, best_and_any)
}

if __name__ == "__main__":
    simulator.RULES |= RULES
    simulator.main()
