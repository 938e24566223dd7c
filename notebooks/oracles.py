"""Train with another annotator of duels: a script, its own flags, and an oracle of one line.

    python notebooks/oracles.py flips 0.2 sea.py --labels argmax
    python notebooks/oracles.py temperature 2 sea.py --explore passive
    python notebooks/oracles.py shift FOLDER sea.py

flips P        each label is turned round with probability P
temperature T  P(first is better) = sigmoid((r1 - r2) / T): the larger, the more random
shift FOLDER   the first half of the labels is another reward model's, the second half and the
               metrics are by --reward_model
               (`python tiny/make.py --seed 1 --output_dir other` makes other/reward_model, by
               the taste of other people; tiny/erm_backbone is a reader and no reward model)

They change the answers to duels, never the scores of the metrics, nor a ranking, which is made of
scores (so not for SELM without --bonus xpo, nor best_of_n_oracle). A run is resumed as any other.
"""

import copy
import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402
from common import generator, require  # noqa: E402


def number(text: str) -> float:
    """Not a number is one that no comparison holds for."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


class Flips(harness.RewardModelOracle):
    """Labels turned round with a probability, by a stream of their own."""

    def __init__(self, config: harness.Config, probability: str) -> None:
        super().__init__(config)
        self.probability = number(probability)
        is_right = 0 <= self.probability <= 1
        require(is_right, f"flips needs a probability, not {probability}")

    def prefer(self, prompts: list[str], duels: list[list[str]], rewards: Tensor) -> Tensor:
        rng = generator(self.config.seed, "flips", self.queries)
        is_flipped = torch.rand(len(prompts), generator=rng) < self.probability
        return super().prefer(prompts, duels, rewards) ^ is_flipped


class Temperature(harness.RewardModelOracle):
    """Bernoulli labels of rewards divided by a temperature."""

    def __init__(self, config: harness.Config, temperature: str) -> None:
        super().__init__(config)
        self.temperature = number(temperature)
        is_right = self.temperature > 0 and config.labels == "bernoulli"
        require(is_right, "temperature needs a number above 0 and --labels bernoulli")

    def prefer(self, prompts: list[str], duels: list[list[str]], rewards: Tensor) -> Tensor:
        return super().prefer(prompts, duels, rewards / self.temperature)


class Shift(harness.RewardModelOracle):
    """Another reward model's labels until half of the budget is spent."""

    def __init__(self, config: harness.Config, folder: str) -> None:
        super().__init__(config)
        before = copy.copy(config)
        before.reward_model = folder
        self.before = harness.RewardModelOracle(before)

    def prefer(self, prompts: list[str], duels: list[list[str]], rewards: Tensor) -> Tensor:
        if self.queries < self.config.num_queries / 2:
            rewards = self.before.score(prompts, duels)
        return super().prefer(prompts, duels, rewards)


ORACLES = {"flips": Flips, "temperature": Temperature, "shift": Shift}


def main() -> None:
    if len(sys.argv) < 4 or sys.argv[1] not in ORACLES:
        sys.exit(__doc__)
    kind, value, name = sys.argv[1:4]
    module = importlib.import_module(Path(name).stem)
    del sys.argv[1:4]  # what is left is the script's own

    class Config(module.Config):  # its default folder is named after the oracle, too
        script = f"{module.Config.script}-{kind}-{Path(value).name}"

    def train(config: harness.Config) -> harness.Run:
        is_ranking = getattr(config, "sampler", "") == "best_of_n_oracle"
        is_ranking |= getattr(config, "bonus", "xpo") != "xpo"
        require(not is_ranking, f"{kind} changes duels, and this arm asks for rankings")
        return module.train(config, ORACLES[kind](config, value))

    harness.main(Config, train, module.__doc__)


if __name__ == "__main__":
    main()
