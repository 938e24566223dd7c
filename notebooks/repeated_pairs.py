"""Passive exploration with as many gradient steps as SEA: is more training all that SEA adds?

    python notebooks/repeated_pairs.py

Once synthetic pairs begin, SEA trains on 1 / gamma pairs for each label, at its default 1 / 0.7.
Here the further pairs are old ones: after a round, with probability 1 / 0.7 - 1, one more step on
as many labelled pairs as a round has, drawn from all rounds before.
"""

import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import harness  # noqa: E402
import sea  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

GAMMA = 0.7  # SEA's


class Config(sea.Config):
    script = "repeated_pairs"  # the default folder is named after it

    def __post_init__(self) -> None:
        self.explore = "passive"
        super().__post_init__()
        common.require(self.resume is None, "--resume: the old pairs are not in the checkpoint")


def train(config: Config, oracle: harness.Oracle | None = None) -> harness.Run:
    """SEA's loop without its heads, and a step on old pairs after some of its steps."""
    counts, rng, old = harness.Counts(), common.generator(config.seed, "old pairs"), []

    def train_step(
        policy: nn.Module, optimizer: torch.optim.Optimizer, pairs: common.Batch, *how: object
    ) -> dict[str, float]:
        values = common.train_step(policy, optimizer, pairs, *how)
        is_due = len(old) * config.batch_size >= max(1, config.burn_in)
        if is_due and torch.rand((), generator=rng) < 1 / GAMMA - 1:
            known = common.stacked(old)
            rows: Tensor = torch.randperm(len(known), generator=rng)[: config.batch_size]
            common.train_step(policy, optimizer, known.select(rows), *how)
            counts.gradient_steps += 1
        old.append(pairs)
        return values

    with patch.object(sea, "train_step", train_step):
        with patch.object(harness, "Counts", lambda: counts):
            return sea.train(config, oracle)


if __name__ == "__main__":
    harness.main(Config, train, __doc__)
