"""What can be had without a label, and the most that choosing among samples can give.

    python notebooks/controls.py        # minutes; writes results/controls.jsonl

Of 20 samples of the initial policy to each test post the best is taken, by
length, by heads that have learned nothing, by the reader's own marks, by the oracle (the
ceiling). `kl` is what taking the best of n samples costs at most, log n - (n - 1) / n nats.
Shapes: B prompts, N candidates a prompt, R response tokens.
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import harness  # noqa: E402
import sea  # noqa: E402
from notebooks import simulator  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402


@torch.no_grad()
def marks(batch: common.Batch, reader: str) -> torch.Tensor:
    """The reader's P(right) - P(wrong), summed over a response's tokens but its EOS, (B, N)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(reader)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reader)
    right, wrong = (tokenizer(sign)["input_ids"][0] for sign in "+-")

    def sums(rows: torch.Tensor) -> torch.Tensor:
        part = batch.select(rows)
        ids, mask = part.response_ids, part.response_mask
        row = common.packed_row(model, part.prompt_ids, part.prompt_mask, ids, mask)
        next_token = model(**row).logits[:, -int(mask.sum((1, 2)).max()) :].softmax(-1)
        signs = common.unpack(next_token[..., right] - next_token[..., wrong], mask)
        return (signs * (ids != tokenizer.eos_token_id)).sum(-1)  # (b, N, R) -> (b, N)

    return common.in_parts(sums, len(batch), 64)


def main() -> None:
    config = sea.Config(eval_prompts=1000)
    posts = simulator.prepare(True, 1000, config)
    batch, columns = posts.batch, posts.batch.columns
    ensemble = sea.EpistemicRewardModel(posts.features.shape[-1], config)
    ensemble.calibrate(posts.features, common.distinct(batch.responses))
    num = config.num_candidates
    judges = {  # scores (B, N)
        "zero labels: shortest": -batch.response_mask.sum(-1),
        "zero labels: untrained heads": ensemble(posts.features).mean(0),
        "zero labels: reader's marks": marks(batch, config.erm_backbone),
        "ceiling: oracle": posts.rewards,
    }
    picks = {name: scores.argmax(1, keepdim=True) for name, scores in judges.items()}  # (B, n)
    picks = {"initial policy": torch.arange(num).expand(len(batch), -1)} | picks
    oracle, rows = harness.RewardModelOracle(config), []
    references = oracle.score(columns["prompt"], [[text] for text in columns["reference"]])
    for name, picked in picks.items():
        rewards = posts.rewards.gather(1, picked)  # (B, n)
        kinds = zip(columns["wanted"], columns["wrong"], columns["clutter"])
        known = zip(batch.responses, picked, kinds)
        golds = [harness.gold_score(y[n], *kind) for y, pick, kind in known for n in pick]
        row = {"arm": name, "gold": sum(golds) / len(golds), "reward": rewards.mean().item()}
        row["kl"] = math.log(num) - (num - 1) / num if name in judges else 0.0
        row["objective"] = row["reward"] - config.beta * row["kl"]
        baseline = references.expand_as(rewards)
        row["win_rate"] = harness.win_metrics(rewards.flatten(), baseline.flatten())["win_rate"]
        rows.append(row)
        print(*(f"{k} {v:.3f}" if k != "arm" else v for k, v in row.items()), sep="  ")
    lines = [json.dumps(row) + "\n" for row in rows]
    (ROOT / "notebooks" / "results" / "controls.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
