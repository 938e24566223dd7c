"""Mutation test: does some test fail for each small error put into a formula?

    python tests/mutants.py            # all
    python tests/mutants.py 3 17 90    # those numbers

All take half an hour on one core of a busy machine. A mutant is one replacement in a copy of the
working tree. It is killed if the quick half of its test files fails, or takes more than 300 s; the
tests that killed the mutants before it run first. The list holds errors only, no change that cannot
be told from the original. Exits 1 if fewer than 95 % are killed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT, TIMEOUT = Path(__file__).resolve().parent.parent, 300

# After "@ file: tests of it", lines of "old => new", where `old` occurs once in the file.
LIST = """
@ selm.py: selm mutants_gaps
torch.maximum(y_logps, y_ref_logps - floor) => torch.maximum(y_logps, y_ref_logps + floor)
return alpha * beta * (y_logps - y_ref_logps) => return alpha * (y_logps - y_ref_logps)
return alpha * beta * (y_logps - y_ref_logps) => return alpha * beta * (y_ref_logps - y_logps)
config.bonus, config.bonus_floor => config.bonus, None
return max(0, -(-3 * num_texts // 2) - 2) => return max(0, 3 * num_texts // 2 - 2)
is_middle = (chosen != y) & (rejected != y) => is_middle = (chosen != y) | (rejected != y)
(rejected == y)[rows].int() => (chosen == y)[rows].int()
so_far += gradient => so_far.copy_(gradient)
logits = next_logits(tokens).clone() => logits = next_logits(tokens)
(row + [tokenizer.eos_token_id])[:limit] => row[: limit - 1] + [tokenizer.eos_token_id]
texts[n] = tokenizer.decode(ids[n], skip_special_tokens=True) => pass
if config.bonus_response == "greedy" else => if config.bonus_response != "greedy" else
run.rank(batch, comparisons, is_noisy=True) => run.rank(batch, comparisons, is_noisy=False)
is_middle = (best != 0) & (worst != 0) => is_middle = best != 0
(best == 0, is_middle, worst == 0) => (worst == 0, is_middle, best == 0)
for model in (snapshot, run.ref_model)] => for model in (run.policy, run.ref_model)]
rejected[kept], first[kept] + 1) => rejected[kept], first[kept])
if config.bonus == "xpo" else snapshot\\n    m => if False else snapshot\\n    m
(logps - frozen_logps(reference, batch, config)) => (frozen_logps(reference, batch, config) - logps)
run.counts[name] / num_ranked for => run.counts[name] / run.counts["prompts"] for
if config.bonus == "xpo" else snapshot\\n    run => if True else snapshot\\n    run
{"snapshot": snapshot, "replay": replay} => {"replay": replay}
if is_offline:\\n            return losses => if is_offline:\\n            return losses + bonus
return losses + bonus => return losses - bonus
and counts["prompts"] == len(prompts_of[t]): => and False:
snapshot.load_state_dict(run.policy.state_dict()) => pass
run.restart_optimizer() => pass
labels_left = (t + 1) * => labels_left = num_iterations *
min(config.batch_size, num_needed, num_left) => min(config.batch_size, num_needed)
= config.first_iteration == "offline" and t == 0 => = config.first_iteration == "offline"
group.ref_logps = frozen_logps(reference, => group.ref_logps = frozen_logps(run.policy,
common.stacked(replay.parts + groups) => common.stacked(groups)
[: t * len(groups[0])] => [: len(groups[0])]
config.learning_rate_factors[t] => 1.0
seen.get("loss", 0.0) < 0 => seen.get("loss", 0.0) < -1
run.is_milestone = run.iteration(num_iterations) > t => pass
1 - 0.8 * t / max(1, num - 1) => 1 - 0.8 * t / num
@ sea.py: sea run mutants_gaps
((features - self.mean) / self.std) => (features / self.std)
std > 1e-3 * std.mean(), std, => std > 0, std,
self.prior_std / gaps.var(0).mean().sqrt() => self.prior_std / gaps.std(0).mean()
F.softplus(rewards[..., 1] - rewards[..., 0]) => F.softplus(rewards[..., 0] - rewards[..., 1])
fit.mean(1).sum() + self.strength => fit.mean() + self.strength
self.strength / (2 * num_labels) * anchor => self.strength / num_labels * anchor
self.pairs = torch.cat([self.pairs, new_pairs]) => self.pairs = new_pairs
last = mask.sum(-1).cumsum(1) - 1 => last = mask.sum(-1).cumsum(1)
last = mask.sum(-1).cumsum(1) - 1 => last = mask.sum(-1) - 1
own = rewards[heads, torch.arange(len(heads))] => own = rewards[heads[:1], torch.arange(len(heads))]
(gaps.sigmoid() if variance == "sigmoid" else gaps).var(0) => gaps.var(0)
spread = spread.scatter(1, first[:, None], -0.5) => pass
differs = tries != first => differs = tries == first
is_clash = ~differs.any(0) => is_clash = ~differs.all(0)
kept = (-logps.mean(1)).topk => kept = logps.mean(1).topk
torch.randint(num_heads, (len(batch),), generator=rng) => torch.zeros(len(batch)).long()
widest_pair(rewards[heads, rows], is_distinct) => widest_pair(rewards.mean(0), is_distinct)
[:, asked, 0].mean(0) < 0 => [:, asked, 0].mean(0) > 0
mean_rewards.argmax(-1), strict => mean_rewards.argmin(-1), strict
per = lengths if config.loss == "ipo" => per = lengths if config.loss != "ipo"
sampler = run.ref_model if config.offline else run.policy => sampler = run.policy
(4 if config.explore == "apl" else 1) => 1
if number == 0: => if number >= 0:
run.oracle.queries >= config.burn_in => run.oracle.queries > config.burn_in
generator=rng) >= config.gamma => generator=rng) < config.gamma
run.counts["clashes"] += int => run.counts["clashes"] = int
first, second, ~is_model) => first, second, ~is_synthetic)
features[asked[:, None], torch.stack([chosen, => features[asked[:, None], torch.stack([first,
@ common.py: formulas packing run selm pilaf mutants_gaps
is_mine = (owner == -1) | => is_mine = (owner == -2) |
is_mine = (owner == -1) | => is_mine = (owner >= -1) |
is_past = place <= place[..., queries].mT => is_past = place <= place[..., queries].mT + 1
(is_mine & is_past & is_real) => (is_mine & is_past)
& is_real) | itself => & is_real)
descending=True, stable=True)  # real => descending=True, stable=True).flip(1)  # real
order // ids.shape[-1], order % ids.shape[-1] => order // ids.shape[-1], order * 0
targets = ids[..., 1:].flatten(1) => targets = ids[..., :-1].flatten(1)
.scatter(1, order, later) => .scatter(1, order, later.detach())
fed[:, : max(1, int(is_open.sum(1).max()))] => fed[:, : max(1, int(is_open.sum(1).min()))]
torch.full_like(fed, self.num_steps) => torch.full_like(fed, 0)
full.scatter(1, fed[..., None] => full.scatter(1, fed.sort(1)[0][..., None]
tokens = torch.where(is_open, tokens, -1) => pass
[..., None])[..., 0] - normaliser[:, 1:] => [..., None])[..., 0] - normaliser[:, :-1]
token_logps(model, batch).sum(-1) => token_logps(model, batch).mean(-1)
(logits.float() / temperature) => (logits.float() * temperature)
target = uniforms[..., None] * cumulative[..., -1:] => target = uniforms[..., None]
log_ratios[:, 0] - log_ratios[:, 1] => log_ratios[:, 1] - log_ratios[:, 0]
log_ratios = logps - ref_logps => log_ratios = logps
-F.logsigmoid(beta * margin => -F.logsigmoid(margin
1 / (2 * beta)).square() => 1 / beta).square()
F.relu(1 - beta * margin => F.relu(1 / beta - margin
(losses.sum() / num_pairs).backward() => losses.mean().backward()
num_pairs = [], sum(map(len, groups)) => num_pairs = [], len(groups)
rewards = config.beta * (logps - ref_logps)[:, :2] => rewards = (logps - ref_logps)[:, :2]
policy.parameters(), config.max_grad_norm) => policy.parameters(), 1e9)
optimizer.zero_grad()\\n    means => means
@ common.py: mutants_gaps packing sea selm run pilaf
length = int(mask.sum(-1).max()) if => length = mask.shape[-1] if
else self.ref_logps[rows[:, None], picks] => else self.ref_logps[rows]
length - p.response_mask.shape[-1])) => length - p.response_mask.shape[-1]), value=1)
F.pad(tensor, (0, length - tensor.shape[-1])) => F.pad(tensor, (length - tensor.shape[-1], 0))
masked_fill(~is_distinct, -math.inf).argmax(-1)\\n => argmax(-1)\\n
masked_fill(~others, math.inf).argmin(-1) => masked_fill(~others, math.inf).argmax(-1)
@ common.py: run formulas selm sea pilaf packing mutants_gaps
gap = rewards[:, 0] - rewards[:, 1] => gap = rewards[:, 1] - rewards[:, 0]
else (gap.sign() + 1) / 2 => else (gap.sign() + 1)
self.queries += len(prompts) => self.queries += len(duels) * 2
return num_right - num_wrong - 0.1 => return num_right + num_wrong - 0.1
(rewards == baseline).double() / 2 => (rewards == baseline).double()
wins.std(correction=0) => wins.std(correction=1)
(total + weight * value, weights + weight) => (total + value, weights + 1)
(start + count - 1) // size + 1) => start // size + 1)
+= num_responses * len(part) => += num_responses
model or self.policy, num_responses=num => self.policy, num_responses=num
[texts[a].strip(), texts[b].strip()] for => [texts[a], texts[b]] for
is_sent.cumsum(0) <= self => is_sent.cumsum(0) < self
~differs | (is_asked & ~is_sent) => ~differs
torch.where(is_first, first[sent], second[sent]) => torch.where(is_first, second[sent], first[sent])
self.record(len(sent), {f"online => self.record(1, {f"online
while cost(int(row.sum())) > budget: => while cost(int(row.sum())) >= budget + 2:
budget -= cost(int(row.sum())) => budget -= int(row.sum())
if is_noisy and self.config.labels == "bernoulli": => if self.config.labels == "bernoulli":
rewards = rewards - (-uniforms.log()).log() => rewards = rewards + (-uniforms.log()).log()
widest_pair(rewards, is_ranked) => widest_pair(rewards, distinct(batch.responses))
is_model[kept]] => is_model[: len(kept)]]
+= sources.count("model") => += len(sources)
max(self.counts["iteration"] - 1, min => max(0, min
self.optimizer.state.clear() => pass
num_steps / (config.warmup_steps + 1) => num_steps / max(1, config.warmup_steps)
frozen_logps(self.ref_model, group, config) => frozen_logps(self.policy, group, config)
self.record(sum(map(len, groups)), seen) => self.record(1, seen)
(logps - ref_logps).double().mean().item() => (ref_logps - logps).double().mean().item()
batch.response_mask.sum(-1).double().mean().item() => float(batch.response_mask.shape[-1])
0 if oracle.queries > before else counts["idle_rounds"] + 1 => counts["idle_rounds"] + 1
trained = oracle.queries - counts["untrained"] => trained = oracle.queries
trained // config.eval_every > before // config.eval_every => trained > before
self.means.clear() => pass
@ pilaf.py: pilaf mutants_gaps
generator=rng) < 0.5\\n => generator=rng) < 0.6\\n
torch.tensor([beta, -beta]) => torch.tensor([-beta, beta])
(1 + c) * logits.to(wide) - c * ref_logits => (1 + c) * logits.to(wide) + c * ref_logits
torch.where(c == -1, ref_logits.to(wide), mixed) => mixed
logits.log_softmax(-1), ref_logits.log_softmax(-1), c => logits, ref_logits, c
(log_z * mask).sum((1, 2)).exp() => log_z.sum((1, 2)).exp()
run.decoder(run.ref_model, 2, part => run.decoder(run.policy, 2, part
interpolate(mine, ref_logits, c)) => interpolate(ref_logits, mine, c))
model in (run.policy, run.ref_model)]\\n => model in (run.ref_model, run.policy)]\\n
run.counts["candidates"] += num * len => run.counts["candidates"] += len
len(prompts), config.sampler_beta, coins) => len(prompts), config.beta, coins)
cost=lambda n: n, is_noisy=False => cost=lambda n: n, is_noisy=True
+= 2 * logps.numel() => += logps.numel()
config.beta * (logps - ref_logps)  # (B, N) => config.beta * logps  # (B, N)
counts["decoder_streams"] / counts["pairs"] => counts["decoder_streams"] / counts["labelled_pairs"]
= mean**2 / square => = mean / square
range(config.num_epochs) => range(1)
run.restart_optimizer() => pass
losses * weights * counts["weighted_pairs"] / counts["weight_sum"] => losses * weights
weights * counts["weighted_pairs"] / counts["weight_sum"] => weights / weights.mean()
counts["untrained"] += run.oracle.queries - num_queries => pass
pairs.ref_logps = frozen_logps(run.ref_model, => pairs.ref_logps = frozen_logps(run.policy,
counts["untrained"], run.is_milestone = 0, True => counts["untrained"], run.is_milestone = 0, False
"""
MUTANTS: list[tuple[str, str, str, list[str]]] = []  # file, old, new, test files
for line in LIST.strip().splitlines():
    if line.startswith("@ "):
        target, names = line[2:].split(": ")
        tests = [f"tests/test_{name}.py" for name in names.split()]
    else:
        MUTANTS.append((target, *line.replace("\\n", "\n").split(" => "), tests))


def outcome(folder: Path, tests: Iterable[str]) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--ff", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    try:
        run = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return "killed: timeout"
    assert run.returncode in (0, 1, 2), run.stdout + run.stderr  # 2: a module raises
    said = [s.split(" - ")[0] for s in run.stdout.splitlines() if s.startswith(("FAILED", "ERROR"))]
    return f"killed: {said[0]}" if run.returncode else "SURVIVED"


def main() -> int:
    numbers = [int(number) for number in sys.argv[1:]] or range(len(MUTANTS))
    sources = {file: (ROOT / file).read_text() for file, *_ in MUTANTS}
    wrong = [(file, old) for file, old, *_ in MUTANTS if sources[file].count(old) != 1]
    assert not wrong, f"not exactly once in the file: {wrong}"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    num_killed, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in files.strip("\0").split("\0"):
            if (ROOT / file).exists():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, folder / file)
        for tests in {tuple(MUTANTS[number][-1]) for number in numbers}:
            said = outcome(folder, tests)  # or every mutant would seem to be killed
            assert said == "SURVIVED", f"without a mutant: {said}"
        for number in numbers:
            file, old, new, tests = MUTANTS[number]
            before = time.perf_counter()
            (folder / file).write_text(sources[file].replace(old, new))
            said = outcome(folder, tests)
            (folder / file).write_text(sources[file])
            num_killed += said != "SURVIVED"
            seconds = time.perf_counter() - before
            print(f"{number} {file}: {old!r} -> {new!r}: {said} ({seconds:.0f} s)", flush=True)
    share, minutes = num_killed / len(numbers), (time.perf_counter() - start) / 60
    print(f"{num_killed} of {len(numbers)} killed, {share:.1%}, in {minutes:.0f} minutes")
    return int(share < 0.95)


if __name__ == "__main__":
    sys.exit(main())
