"""How fast is it, next to something? `python tests/benchmark.py` prints a table, one row a ratio.

Both sides of a row run in this process, alternating, on the same models, data, lengths and threads;
a figure is the median of --repeats, behind it the smallest and the largest. What this machine
cannot measure (no GPU, no TRL: `pip install -r tests/benchmark-requirements.txt`) says so.

    python tests/benchmark.py                    # tens of minutes on two CPU cores
    python tests/benchmark.py --only generate    # rows whose name has this in it
    python tests/benchmark.py --only clone --against ../old    # rounds of two commits, in turns
    python tests/benchmark.py --only flops       # matrix products of the experiments' arms
    python tests/benchmark.py --only generate --model 160m     # random weights, Pythia's shape
    python tests/benchmark.py --size 160m 410m 1b              # the scripts at these shapes
    python tests/benchmark.py --memory           # computed: which micro-batch fits which card
    python tests/benchmark.py --memory --check   # that count beside a CPU's memory, minutes
"""

import argparse
import contextlib
import importlib
import inspect
import io
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import harness  # noqa: E402
import pilaf  # noqa: E402
import sea  # noqa: E402
from notebooks import experiments  # noqa: E402

import memory  # noqa: E402
import sizes  # noqa: E402

Seconds = list[float]


def compare(repeats: int, *sides: Callable[[], float]) -> list[Seconds]:
    """Seconds of each side, taken in turns so that a busy moment hits all of them."""
    for side in sides:
        side()  # warm up
    rounds = [[side() for side in sides] for _ in range(repeats)]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def timed(function: Callable, device: str) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        function()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def row(name: str, ours: Seconds, other: Seconds, against: str, target: str = "") -> None:
    """The ratio other / ours (how many times faster), of medians; and the spread of ours."""
    ratio = statistics.median(other) / statistics.median(ours)
    spread = f"{min(ours):.3f}-{max(ours):.3f} s"
    cells = (name, f"{statistics.median(ours):.3f} s ({spread})", against)
    print(
        "|", " | ".join((*cells, f"{statistics.median(other):.3f} s", f"{ratio:.2f}", target)), "|"
    )
    sys.stdout.flush()


# ------------------------------------------------------------------ whole rounds


def train_quietly(script, **flags) -> harness.Run:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with contextlib.redirect_stdout(io.StringIO()):
            flags = {"eval_prompts": 1, "eval_every": 10**6, "checkpoint_every": 10**6} | flags
            return script.train(script.Config(output_dir=f"{folder}/run", **flags))


def seconds_a_round(script, num_queries: int = 320, **flags) -> float:
    """Of what a run takes beyond a run of a quarter of its labels: the start cancels."""
    ends = []
    for labels in (num_queries // 4, num_queries):
        start = time.perf_counter()
        num_rounds = train_quietly(script, num_queries=labels, **flags).round
        ends.append((time.perf_counter() - start, num_rounds))
    return (ends[1][0] - ends[0][0]) / (ends[1][1] - ends[0][1])


def seconds_a_sample(sampler: str, device: str) -> Callable[[], float]:
    """Of the responses of pilaf.py's `sampler` to a round of prompts, drawn ten times."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = dict(device=device, eval_prompts=1, output_dir=f"{folder}/run")
        config = pilaf.Config(sampler=sampler, **options)
        task = harness.load(config, None)
    prompts = harness.next_prompts(task.prompts, 0, config.batch_size, config.seed)

    def draw() -> None:
        for number in range(10):
            pilaf.sample(config, task, prompts, pilaf.Counts(), number)

    return timed(draw, device)


def rounds(args: argparse.Namespace) -> None:
    flags, sides = dict(device=args.device), partial(compare, args.repeats)
    ours = partial(seconds_a_round, sea, burn_in=0, **flags)
    other = partial(seconds_a_round, sea, explore="passive", **flags)
    row("SEA, 20 candidates, 20 heads: a round", *sides(ours, other), "passive", ">= 0.33")
    ours = partial(seconds_a_round, pilaf, **flags)
    other = partial(seconds_a_round, pilaf, sampler="vanilla", **flags)
    row("PILAF: a round", *sides(ours, other), "vanilla")
    draws = (seconds_a_sample(sampler, args.device) for sampler in ("pilaf", "vanilla"))
    row("PILAF: generation, 10 rounds", *sides(*draws), "vanilla", ">= 0.59")


def seconds_of_command(folder: Path, words: str, device: str) -> float:
    """A round's, of a script of the clone in `folder`, as in `seconds_a_round`."""
    ends = []
    for labels in (512, 2048):
        with tempfile.TemporaryDirectory() as output:
            more = f"--num_queries {labels} --eval_prompts 1 --eval_every 1000000 --device {device}"
            command = [sys.executable, *words.split(), *more.split(), "--output_dir", output + "/r"]
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
            seconds = time.perf_counter() - start
            last = Path(output, "r", "metrics.jsonl").read_text().splitlines()[-1]
            counts = json.loads(last)
            ends.append((seconds, counts.get("round", counts.get("rounds"))))
    return (ends[1][0] - ends[0][0]) / (ends[1][1] - ends[0][1])


def against_clone(args: argparse.Namespace) -> None:
    """Rounds of this clone and of another one (another commit), in turns."""
    for words in ("sea.py", "selm.py", "pilaf.py") if args.against else ():
        folders = (ROOT, args.against.resolve())
        sides = [partial(seconds_of_command, here, words, args.device) for here in folders]
        row(
            f"python {words}: a round", *compare(args.repeats, *sides), str(args.against), ">= 0.91"
        )


# By default TRL checkpoints gradients, and so samples without a cache: 3.5 times the products.
TUNED = {"gradient_checkpointing": False, "logging_strategy": "no", "dataloader_pin_memory": False}


def trl_seconds_a_round(flags: dict, tuned: dict, num_rounds: int) -> float:
    """A training step of TRL's OnlineDPOTrainer on the same policy, oracle, batch and lengths."""
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    config = sea.Config(explore="passive", **flags)
    policy, ref_model, tokenizer = harness.load_policies(config)
    oracle, times = harness.RewardModelOracle(config), []
    prompts, _ = harness.load_prompts(config, tokenizer)
    is_cpu = config.device == "cpu"

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        return oracle.score(prompts, [[text.strip()] for text in completions])[:, 0].tolist()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = OnlineDPOConfig(
            output_dir=folder, max_steps=num_rounds + 3, learning_rate=config.learning_rate,
            per_device_train_batch_size=config.batch_size, max_new_tokens=config.max_new_tokens,
            max_length=config.max_prompt_length + config.max_new_tokens, beta=config.beta,
            temperature=1.0, bf16=not is_cpu, use_cpu=is_cpu, save_strategy="no", report_to=[],
            disable_tqdm=True, **tuned,
        )  # fmt: skip
        columns = {"prompt": prompts.columns["prompt"][:1000]}
        OnlineDPOTrainer(
            model=policy, ref_model=ref_model, reward_funcs=reward, args=settings,
            train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()  # fmt: skip
    return (times[-1] - times[2]) / (len(times) - 3)


def gflop_a_round(train: Callable[[int], object]) -> float:
    """Matrix products of a round; loading and evaluation cancel."""
    totals = []
    for num_rounds in (4, 12):
        with FlopCounterMode(display=False) as counter:
            train(num_rounds)
        totals.append(counter.get_total_flops() / 1e9)
    return (totals[1] - totals[0]) / 8


def against_trl(args: argparse.Namespace) -> None:
    try:
        import trl  # noqa: F401
    except ImportError:
        print("| passive online DPO | not measured: no TRL here | | | | |")
        return
    for batch_size in (16, 32):
        flags = {"device": args.device, "batch_size": batch_size}
        ours = partial(seconds_a_round, sea, 20 * batch_size, explore="passive", **flags)
        peers = [partial(trl_seconds_a_round, flags, tuned) for tuned in (TUNED, {})]
        seconds = compare(args.repeats, ours, *(partial(peer, 20) for peer in peers))
        run = partial(train_quietly, sea, explore="passive", **flags)
        count = gflop_a_round(lambda n, run=run, size=batch_size: run(num_queries=n * size))
        for how, peer, other in zip(("tuned", "its defaults"), peers, seconds[1:]):
            name = f"passive online DPO: {batch_size} labels"
            row(name, seconds[0], other, f"TRL OnlineDPOTrainer, {how}")
            theirs = gflop_a_round(lambda n, peer=peer: peer(n - 3))  # it does three more
            words = f"{count:.1f} GFLOP | {how} | {theirs:.1f} GFLOP | {theirs / count:.2f}"
            print(f"| the same: matrix products | {words} | |", flush=True)


# ------------------------------------------------------------------ generation, log-probabilities


def random_prompts(policy, size: int, length: int) -> common.Batch:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, policy.config.vocab_size, (size, length), generator=rng)
    none = torch.zeros(size, 0, 0, dtype=torch.long)
    columns = {"prompt": [""] * size}
    return common.Batch(columns, ids, torch.ones_like(ids), [[]] * size, none, none)


def plainly(policy, input_ids: Tensor, num: int, length: int) -> None:
    """`generate` of transformers, which computes the prompt `num` times."""
    options = dict(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
        max_new_tokens=length, num_return_sequences=num, pad_token_id=0,
    )  # fmt: skip
    mask = torch.ones_like(input_ids)
    with common.autocast(policy.device):
        ids = policy.generate(input_ids=input_ids, attention_mask=mask, **options)
    assert ids.shape[1] == input_ids.shape[1] + length


@torch.no_grad()
def with_repeated_cache(policy, input_ids: Tensor, num: int, length: int) -> None:
    """The prompt is computed once, but its keys and values are kept `num` times."""
    takes = inspect.signature(policy.forward).parameters
    cache = {"cache" if "cache" in takes else "past_key_values": common.Cache()}
    with common.autocast(policy.device):
        logits = policy(input_ids, **cache, use_cache=True, logits_to_keep=1).logits
        (values,) = cache.values()
        values.batch_repeat_interleave(num)
        logits = logits.repeat_interleave(num, dim=0)  # (B N, 1, V)
        for t in range(length):
            tokens = logits[:, -1].float().softmax(-1).multinomial(1)  # (B N, 1)
            if t < length - 1:
                logits = policy(tokens, **cache, use_cache=True).logits


@torch.no_grad()
def packed(policy, prompts: common.Batch, uniforms: Tensor) -> None:
    no_eos = torch.tensor([-5], device=policy.device)
    with common.autocast(policy.device):
        decoder = common.PackedDecoder(policy, prompts)
        common.generate(decoder, prompts, uniforms, no_eos, temperature=1.0)


def generation(args: argparse.Namespace) -> None:
    """All responses run to full length: no EOS on any side."""
    shapes = [(50, 14), (50, 53), (400, 14), (400, 53)]
    with sizes.model_flags(args.model, args.device) as flags:
        config = sea.Config(max_prompt_length=400, max_new_tokens=53, device=args.device, **flags)
        policy, _, _ = harness.load_policies(config)
    for num, (prompt_length, length) in itertools.product((2, 8, 20), shapes):
        name = f"generate: N = {num}, prompts of {prompt_length}, {length} new tokens"
        if args.only not in name:
            continue
        prompts = random_prompts(policy, args.batch_size or 16, prompt_length)
        uniforms = torch.rand(len(prompts), num, length)
        others = policy, prompts.prompt_ids.to(args.device), num, length
        sides = [partial(packed, policy, prompts, uniforms)]
        sides += [partial(plainly, *others), partial(with_repeated_cache, *others)]
        seconds = compare(args.repeats, *(timed(side, args.device) for side in sides))
        target = {(20, 400, 53): ">= 8", (20, 50, 14): ">= 4"}.get((num, prompt_length, length), "")
        row(name, *seconds[:2], "num_return_sequences", target)
        row(name, *seconds[::2], "repeated prefix cache")


def log_probabilities(args: argparse.Namespace) -> None:
    """With gradients, one row a response against packed rows."""
    policy, _, _ = harness.load_policies(sea.Config(device=args.device))
    for num, length in ((2, 28), (20, 14)):
        batch = random_prompts(policy, args.batch_size or 16, 50)
        ids = torch.randint(1, policy.config.vocab_size, (len(batch), num, length))
        batch = replace(batch, response_ids=ids, response_mask=torch.ones_like(ids))
        rows = torch.cat([batch.prompt_ids[:, None].expand(-1, num, -1), ids], -1).flatten(0, 1)
        rows = rows.to(args.device)

        def packed(batch=batch) -> None:
            common.response_logps(policy, batch).sum().backward()

        def plain(rows=rows, length=length) -> None:
            with common.autocast(policy.device):
                logits = policy(rows, logits_to_keep=length + 1).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(2, rows[:, -length:, None])
            logps.sum().backward()

        seconds = compare(args.repeats, *(timed(f, args.device) for f in (packed, plain)))
        row(f"log-probabilities and gradient: N = {num}, {length} tokens", *seconds, "plain rows")


# ------------------------------------------------------------------ matrix products


def flops(args: argparse.Namespace) -> None:
    """GFLOP a label of each arm of notebooks/experiments.py, evaluations and burn-in left out. A
    start that has moved costs what the initial policy does, which stands in for it here."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    for arm, words in experiments.ARMS.items():
        name, *own = words.replace("{start}/model", "./tiny/sft").split()
        script = importlib.import_module(name)
        own += ["--burn_in", "0"] if name in ("sea", "repeated_pairs") else []
        flags = vars(harness.Parser(script.Config, allow_abbrev=False).parse_args(own))
        flags |= dict(device=args.device, warmup_steps=0)
        del flags["output_dir"]
        totals = []
        for num_queries in (96, 288):
            few = {"num_queries": num_queries, "eval_prompts": 1, "eval_every": 10**6}
            with FlopCounterMode(display=False) as counter:
                run = train_quietly(script, **flags | few)
            totals.append((counter.get_total_flops() / 1e9, run.oracle.queries))
        (start, first), (end, last) = totals
        per_label = (end - start) / (last - first)
        print(f"| {arm}: matrix products | {per_label:.2f} GFLOP a label | | | | |", flush=True)


# ------------------------------------------------------------------ resident memory


def resident(args: argparse.Namespace) -> None:
    for name in ("sea", "selm", "pilaf"):
        with tempfile.TemporaryDirectory() as folder:
            words = f"--num_queries 512 --device {args.device} --output_dir {folder}/run".split()
            command = [sys.executable, str(ROOT / f"{name}.py"), *words]
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        is_peak = "" if peak > before else "at most "
        words = f"{is_peak}{peak / 2**20:.2f} GiB"
        print(f"| {name}.py: peak resident memory | {words} | | | | < 1.5 |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, help="prompts (--size: 128; kernels' rows: 16)")
    parser.add_argument("--only", default="", help="groups, or rows, whose name has this in it")
    parser.add_argument("--model", default="./tiny/sft", help="of `generate`: a folder or a size")
    shapes = {"nargs": "+", "choices": list(sizes.SHAPES), "metavar": "SIZE"}
    parser.add_argument("--size", **shapes, help=f"only the scripts at: {', '.join(sizes.SHAPES)}")
    parser.add_argument("--rounds", type=int, default=4, help="of --size, the first is not counted")
    parser.add_argument("--micro_batch", type=int, nargs="+", help="of --size, by the size")
    parser.add_argument("--memory", action="store_true", help="computed: what fits which card")
    parser.add_argument("--check", action="store_true", help="--memory: measure it on this CPU")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of --size, --check")
    parser.add_argument("--against", type=Path, help="another clone: its rounds beside ours")
    args = parser.parse_args()
    os.chdir(ROOT)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    groups = {
        "resident": resident,
        "generate": generation,
        "log-probabilities": log_probabilities,
        "rounds": rounds,
        "flops": flops,
        "trl": against_trl,
        "clone": against_clone,
    }
    cuda = torch.cuda.get_device_name() if args.device.startswith("cuda") else "no GPU"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {cuda}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, medians of {args.repeats}\n")  # fmt: skip
    if args.check:
        sides = args.micro_batch or [1, 4], args.batch_size, args.gradient_checkpointing
        return memory.print_check(*sides)
    if args.memory:
        return memory.print_cards(args.batch_size or 128)
    if args.size:
        return sizes.measure(args)
    print("| what | ours (smallest-largest) | against | theirs | theirs / ours | target |")
    print("|---|---|---|---|---|---|")
    for name, group in groups.items():
        if args.only in name or args.only.startswith(name):
            group(args)
    if not args.device.startswith("cuda"):
        print("| the same on a GPU, and bfloat16 | not measured | | | | |")


if __name__ == "__main__":
    main()
