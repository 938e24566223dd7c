"""sea.py with one function changed: the oracle's duels are two arbitrary candidates.

    python notebooks/random_duels.py --num_queries 512

Candidates, ensemble and synthetic pairs stay SEA's, so that a run beside `python sea.py` tells what
the choice of duels is worth, and one beside `python sea.py --explore passive` what the rest is.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402
import sea  # noqa: E402
from common import Batch  # noqa: E402

choose_as_sea_does = sea.choose_duels


class Config(sea.Config):
    script = "random_duels"  # the default folder is named after it


def choose_duels(
    config: sea.Config, batch: Batch, rewards: Tensor, is_synthetic: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """As sea.choose_duels, (B,) each; the first two candidates where the oracle is asked."""
    first, second, _ = choose_as_sea_does(config, batch, rewards, is_synthetic, rng)
    zeros = torch.zeros_like(first)
    return (
        torch.where(is_synthetic, first, zeros),
        torch.where(is_synthetic, second, zeros + 1),
        torch.zeros_like(is_synthetic),
    )


def train(config: sea.Config) -> harness.Run:
    """SEA's loop with random duels."""
    sea.choose_duels = choose_duels
    return sea.train(config)


if __name__ == "__main__":
    harness.main(Config, train, sea.__doc__)
