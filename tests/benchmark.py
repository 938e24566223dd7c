"""How fast is it, next to something? `python tests/benchmark.py` prints a table, one row a ratio.

Both sides of a row run in this process, alternating, on the same models, data, lengths and threads;
a figure is the median of --repeats, behind it the smallest and the largest. What this machine
cannot measure (no GPU, no TRL: `pip install -r tests/benchmark-requirements.txt`) says so.

    python tests/benchmark.py                    # tens of minutes on two CPU cores
    python tests/benchmark.py --only generate    # rows whose name has this in it
    python tests/benchmark.py --only clone --against ../old    # rounds of two commits, in turns
    python tests/benchmark.py --only flops       # matrix products of the experiments' arms
    python tests/benchmark.py --only generate --model 160m     # random weights, Pythia's shape
    python tests/benchmark.py --size 160m 410m 1b    # the scripts at these shapes, random weights
    python tests/benchmark.py --memory           # computed: which micro-batch fits which card
    python tests/benchmark.py --memory --check   # that count beside a CPU's memory, minutes
"""

# ruff: noqa: E402

import argparse
import contextlib
import functools
import gc
import importlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import harness
import pilaf
import sea
import selm
from notebooks import experiments

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Seconds = list[float]
VOCABULARY, PROMPT_LENGTH, RESPONSE_LENGTH = 50_304, 512, 53

# Pythia's hidden size, layers and attention heads; and prompts a forward pass, to begin with.
SHAPES = {
    "14m": (128, 6, 4, 64),
    "160m": (768, 12, 12, 64),
    "410m": (1024, 24, 16, 64),
    "1b": (2048, 16, 8, 32),
    "2.8b": (2560, 32, 32, 4),
}

# What the papers run; SELM has its two further responses from the data set.
PUBLISHED = {
    "max_prompt_length": PROMPT_LENGTH,
    "max_new_tokens": RESPONSE_LENGTH,
    "temperature": 0.7,
    "learning_rate": 5e-7,
    "warmup_steps": 0,
    "eval_prompts": 1,
    "eval_every": 10**9,
    "checkpoint_every": 10**9,
}
RUNS = {
    "SEA, 20 candidates, 20 heads": (sea, {"erm_backbone": "reference", "burn_in": 0}),
    "passive": (sea, {"explore": "passive"}),
    "SELM": (selm, {"num_iterations": 1}),
    "PILAF": (pilaf, {}),
}
GIB, FLOAT = 2**30, 4  # bytes
CARDS = (8, 16, 24, 40, 80)  # GB, taken for GiB; a tenth is left to CUDA and to fragments
MODELS = ("160m", "410m", "1b", "2.8b")


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
        synchronize(device)
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
    with model_flags(args.model, args.device) as flags:
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


# ------------------------------------------------------------------ Pythia's shapes: folders


def model_config(size: str) -> transformers.GPTNeoXConfig:
    hidden, layers, heads, _ = SHAPES[size]
    return transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        rotary_pct=0.25,
        max_position_embeddings=2048,
        classifier_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        num_labels=1,
    )


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word a token, so that a text has as many tokens as the ids that it was decoded from."""
    words = ["<eos>", "<pad>", *(f"w{n}" for n in range(2, VOCABULARY))]
    numbers = {word: n for n, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )


def write_models(folder: Path, size: str, device: str) -> dict[str, str]:
    """A policy in float32 and an oracle in bfloat16, drawn on the device: flags that name them."""
    torch.manual_seed(0)
    tokenizer, config = word_tokenizer(), model_config(size)
    for name, auto_class, dtype in (
        ("model", transformers.AutoModelForCausalLM, torch.float32),
        ("reward_model", transformers.AutoModelForSequenceClassification, torch.bfloat16),
    ):
        with torch.device(device):
            model = auto_class.from_config(config, dtype=dtype)
        model.save_pretrained(folder / size / name)
        tokenizer.save_pretrained(folder / size / name)
    return {name: str(folder / size / name) for name in ("model", "reward_model")}


@contextlib.contextmanager
def model_flags(name: str, device: str) -> Iterator[dict[str, str]]:
    """The flag --model for a folder, or for a size, whose folder is there only within."""
    with tempfile.TemporaryDirectory() as folder:
        is_size = name in SHAPES
        yield {"model": write_models(Path(folder), name, device)["model"] if is_size else name}


def write_prompts(folder: Path, num: int) -> str:
    lengths = {"prompt": PROMPT_LENGTH, "reference": RESPONSE_LENGTH, "other": RESPONSE_LENGTH}
    rng = torch.Generator().manual_seed(0)
    (folder / "prompts").mkdir()
    for split, count in (("train", num), ("test", 2)):
        with open(folder / "prompts" / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                row = {}
                for name, length in lengths.items():
                    ids = torch.randint(2, VOCABULARY, (length,), generator=rng).tolist()
                    row[name] = " ".join(f"w{n}" for n in ids)
                file.write(json.dumps(row) + "\n")
    return str(folder / "prompts")


# ------------------------------------------------------------------ Pythia's shapes: a few rounds


class Done(Exception):
    """Enough rounds were timed."""


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> str:
    if not device.startswith("cuda"):
        return "not measured"
    allocated = torch.cuda.max_memory_allocated() / 2**30
    return f"{allocated:.2f} ({torch.cuda.max_memory_reserved() / 2**30:.2f} reserved)"


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


@contextlib.contextmanager
def clocked(ends: list, num_rounds: int, device: str, checkpoint: list | None) -> Iterator[None]:
    """Within it a run writes no checkpoint, adds (seconds, labels) to `ends` when a round ends, and
    stops after `num_rounds`. `checkpoint`, a list, gets GiB, and seconds to write and read one."""
    end_round, save = harness.Run.end_round, harness.Run.save

    def clocked_end(run: harness.Run) -> None:
        end_round(run)
        synchronize(device)
        ends.append((time.perf_counter(), run.oracle.queries))
        if len(ends) < num_rounds:
            return
        if checkpoint is not None:
            start = time.perf_counter()
            save(run)
            written = time.perf_counter()
            run.load()
            size = (run.folder / "checkpoint.pt").stat().st_size / 2**30
            checkpoint.extend([size, written - start, time.perf_counter() - written])
        raise Done

    stand_ins = {"end_round": clocked_end, "save": lambda run: None}
    with patch.multiple(harness.Run, **stand_ins), contextlib.suppress(Done):
        yield


def time_rounds(script, flags: dict, num_rounds: int, checkpoint: list | None) -> tuple:
    """Seconds until the first round has ended, median seconds of a later one, labels of one."""
    start, ends = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stderr(io.StringIO()):
        with contextlib.redirect_stdout(io.StringIO()):
            with clocked(ends, num_rounds, flags["device"], checkpoint):
                script.train(script.Config(output_dir=f"{output}/run", **flags))
    seconds = [later[0] - earlier[0] for earlier, later in zip(ends, ends[1:])]
    labels = (ends[-1][1] - ends[0][1]) / len(seconds)
    return ends[0][0] - start, statistics.median(seconds), labels


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def rows_of_run(name: str, size: str, flags: dict, num_rounds: int, is_saved: bool) -> None:
    """Print the rows of one script; out of memory, it tries again with half the micro-batch."""
    script, more = RUNS[name]
    micro_batch, device, checkpoint = flags["micro_batch_size"], flags["device"], []
    while micro_batch:
        free_memory(device)
        problem, now = "", flags | more | {"micro_batch_size": micro_batch}
        try:
            times = time_rounds(script, now, num_rounds, checkpoint if is_saved else None)
        except Exception as error:  # whatever it is, the other rows are wanted
            is_full = is_out_of_memory(error)
            words = str(error).strip().splitlines() or [type(error).__name__]
            problem = "out of memory" if is_full else words[0]
        if not problem:
            break
        print_row(f"{size}: {name}", f"{problem} at micro-batch {micro_batch}", "", "", "")
        micro_batch = micro_batch // 2 if is_full else 0
    if not micro_batch:
        return
    first, seconds, labels = times
    minutes = f"{seconds / labels * 1000 / 60:.2f}" if labels else "no label"
    peak = peak_memory(device)
    if script is sea:  # the count knows no other
        num = 2 if name == "passive" else 20
        shape = micro_batch, flags["batch_size"], flags["gradient_checkpointing"]
        peak += f", computed {computed_peak(size, *shape, device, num):.2f}"
    cells = (f"{seconds:.3f}", minutes, peak, f"{first:.1f}")
    print_row(f"{size}: {name}, micro-batch {micro_batch}", *cells)
    if checkpoint:
        what = "{:.2f} GiB: written in {:.2f} s, read in {:.2f} s".format(*checkpoint)
        print_row(f"{size}: checkpoint", what, "", "", "")


# ------------------------------------------------------------------ Pythia's shapes: bfloat16


def precision(device: str, is_bfloat16: bool) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_bfloat16)


def difference(one: torch.Tensor, other: torch.Tensor) -> str:
    gaps = (one - other).abs()
    return f"largest {gaps.max():.2g}, mean {gaps.mean():.2g}"


@torch.no_grad()
def precision_rows(size: str, flags: dict) -> None:
    """What bfloat16 does to log-probabilities, in nats, and to packed rows, in the measure of
    `harness.reads_packed_rows`: standard deviations of what a plain row gives."""
    device, rng = flags["device"], torch.Generator().manual_seed(0)
    free_memory(device)
    torch.set_float32_matmul_precision("highest")  # no TF32
    model = transformers.AutoModelForCausalLM.from_pretrained(flags["model"], dtype=torch.float32)
    model.to(device).eval()
    # Untrained logits are all alike: make their standard deviation about 3.
    model.get_output_embeddings().weight.mul_(3 / (0.02 * model.config.hidden_size**0.5))
    prompt = torch.randint(2, VOCABULARY, (8, PROMPT_LENGTH), generator=rng)
    ids = torch.randint(2, VOCABULARY, (8, 2, RESPONSE_LENGTH), generator=rng)
    masks = torch.ones_like(prompt), torch.ones_like(ids)
    batch = common.Batch({"prompt": [""] * 8}, prompt, masks[0], [["", ""]] * 8, ids, masks[1])
    plain = {"input_ids": torch.cat([prompt, ids[:, 1]], dim=1).to(device)}
    packed = common.packed_row(model, prompt, masks[0], ids, masks[1])
    logps, logits = {}, {}
    for is_bfloat16 in (False, True):
        here = partial(precision, device, is_bfloat16)
        with patch.object(common, "autocast", lambda _, here=here: here()):
            logps[is_bfloat16] = common.token_logps(model, batch)  # (B, N, R)
        with here():
            options = {"logits_to_keep": RESPONSE_LENGTH}
            both = [model(**row, **options).logits.float() for row in (plain, packed)]
        logits[is_bfloat16] = both  # (B, R, V) of each
    what, scale = f"{size}: bfloat16 against float32, nats", logits[False][0].std()
    print_row(f"{what} a token", difference(*logps.values()), "", "", "")
    totals = [values.sum(-1) for values in logps.values()]
    print_row(f"{what} a response", difference(*totals), "", "", "")
    for is_bfloat16, (one, other) in logits.items():
        name = "bfloat16" if is_bfloat16 else "float32"
        words = difference(one / scale, other / scale)
        print_row(f"{size}: packed against plain rows in {name}, std of logits", words, "", "", "")
    words = difference(*(rows[0] / scale for rows in logits.values()))
    print_row(f"{size}: bfloat16 against float32, plain rows, std of logits", words, "", "", "")


# ------------------------------------------------------------------ Pythia's shapes: the table


def measure(args: argparse.Namespace) -> None:
    """All rows of --size; --only picks those whose name has it in it."""
    batch_size = args.batch_size or 128
    num_prompts = 3 * batch_size * (args.rounds + 1)  # SELM's pairs cost three labels each
    how = "with" if args.gradient_checkpointing else "without"
    print(f"{batch_size} prompts of {PROMPT_LENGTH} tokens a round, responses of "
          f"{RESPONSE_LENGTH}, {args.rounds} rounds, {how} gradient checkpointing\n")  # fmt: skip
    print("| what | seconds a round | minutes per 1,000 labels | peak GiB | start and round 1, s |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # read when `datasets` is imported
        dataset = write_prompts(Path(folder), num_prompts)
        for size in args.size:
            start = time.perf_counter()
            models = write_models(Path(folder), size, args.device)
            seconds = time.perf_counter() - start
            print_row(f"{size}: two models drawn and written", f"{seconds:.1f} s", "", "", "")
            flags = PUBLISHED | models | {"dataset": dataset, "device": args.device}
            flags |= {"batch_size": batch_size, "num_queries": num_prompts}
            flags |= {"gradient_checkpointing": args.gradient_checkpointing}
            if args.only in "bfloat16":
                precision_rows(size, flags)
            for micro_batch in args.micro_batch or SHAPES[size][3:]:
                flags["micro_batch_size"] = micro_batch
                for name in [name for name in RUNS if args.only in name]:
                    is_saved = (size, name) == ("160m", "passive")
                    rows_of_run(name, size, flags, args.rounds, is_saved)
            shutil.rmtree(Path(folder, size))
            free_memory(args.device)


# ------------------------------------------------------------------ memory: the count


@functools.cache
def num_weights(size: str) -> dict[str, int]:
    """Of all modules, of the matrices that are cast under autocast, of one layer's matrices, and
    of the head, which is as large as the embedding."""
    with torch.device("meta"):
        config = model_config(size)
        model = transformers.AutoModelForCausalLM.from_config(config)

    def count(module: nn.Module) -> int:
        matrices = [part for part in module.modules() if isinstance(part, nn.Linear)]
        return sum(weight.numel() for part in matrices for weight in part.parameters())

    counts = {"all": model.num_parameters(), "head": model.lm_head.weight.numel()}
    return counts | {"cast": count(model), "layer": count(model.gpt_neox.layers[0])}


def widest_moment(stream: int, width: int) -> int:
    """Bytes that a forward pass without a gradient holds a token and hidden dimension, where it
    holds most. `stream` and `width` are bytes of a value between layers and of one within."""
    casts = 2 * width if width < stream else 0  # rotated queries and keys are float32 again
    attention = 3 * width + 2 * stream + casts + width  # q, k, v; rotated q, k; the output
    mlp = width + 2 * 4 * width  # attention's output; before and after GELU
    return 3 * stream + max(attention, mlp)  # embeddings, the layer's input, normalised


def update_moments(
    size: str, num: int, is_accumulated: bool, checkpointing: bool, width: int
) -> list[int]:
    """Bytes held at moments of the update on a micro-batch of `num` pairs, besides what is held
    all the time: the end of the forward pass, the loss's gradient, the head's, the last layer's,
    the embedding's."""
    hidden, layers, heads, _ = SHAPES[size]
    count, is_cast = num_weights(size), width < FLOAT
    length = 2 * RESPONSE_LENGTH  # L: each response is read behind the prompt's last token
    row = PROMPT_LENGTH - 1 + length  # S
    logits, tokens = num * length * VOCABULARY, num * row
    mask = num * row * (-(-row // 16) * 16 if is_cast else row) * width
    # A layer's input; normalised twice, q, k, v, rotated q, k, attention's output (a CPU: two
    # layouts), before and after GELU; the sums of exponentials of attention.
    values = hidden * (FLOAT + (2 + 3 + 2 + (1 if is_cast else 2) + 8) * width) + heads * FLOAT
    layer = tokens * values + (mask if is_cast else 0)
    saved, casts = layers * layer + (0 if is_cast else mask), count["cast"]
    if checkpointing:
        saved, casts = layers * tokens * hidden * FLOAT + num * row * row * FLOAT, count["head"]
    saved += tokens * hidden * FLOAT  # the last layer's output
    gradient = FLOAT * count["all"] if is_accumulated else 0
    all_casts, casts = (width * n if is_cast else 0 for n in (count["cast"], casts))
    both = FLOAT + (width if is_cast else 0)  # a gradient is cast back
    within = tokens * hidden * (FLOAT + 8 * width) + both * 4 * hidden**2
    again = layer + (width * count["layer"] if is_cast else 0) if checkpointing else 0
    return [
        gradient + saved + all_casts + both * logits,
        gradient + saved + casts + 4 * FLOAT * logits,
        gradient + saved + casts + max(width * (logits + count["head"]), FLOAT * count["head"]),
        max(gradient, FLOAT * count["head"]) + saved + casts + within + again,
        FLOAT * count["all"] + (FLOAT * count["head"] if is_accumulated else 0),
    ]


def phases(
    size: str, micro_batch: int, batch_size: int, checkpointing: bool = False,
    device: str = "cuda", num_candidates: int = 20,
) -> dict[str, float]:  # fmt: skip
    """GiB held at most in each phase of a round of sea.py, all weights and states included.

    All the time: policy, reference and AdamW's two states in float32, and the oracle, in bfloat16
    on a GPU. A round's phases come one after another; each holds besides, for a micro-batch of B
    prompts:

    - generation: the keys and values of prompts and candidates, and four float32 copies of the
      logits (B, N, V): the last step's, packed ones, and what unpacks them;
    - features: one layer's tensors, for packed rows of all candidates, and the mask (B, 1, S, S);
    - oracle: one layer's tensors of packed pairs, in its own width;
    - reference: one layer's tensors of packed pairs; then two copies of the logits (B, L, V);
    - update: the gradient, from the second micro-batch on; what each layer saves for its backward
      pass (with checkpointing its input alone); and the logits' moment, which is four float32
      copies;
    - step: the gradient, and on a CPU two copies of the largest weight.

    Under autocast each holds bfloat16 copies of the weights that it multiplies with, and each
    layer saves its own copy of the mask. Not counted: masks and ids of tokens, cosines, the heads
    (on the CPU), a library's workspaces. A GPU's attention is taken to be the memory-efficient
    one, which needs a mask of rows of a multiple of 16; a CPU's keeps its output in two layouts.
    Neither holds the S x S products.
    """
    hidden, layers, _, _ = SHAPES[size]
    count, num = num_weights(size), min(micro_batch, batch_size)
    is_cast = not device.startswith("cpu")
    width = 2 if is_cast else FLOAT
    casts = width * count["cast"] if is_cast else 0
    prompt, response = PROMPT_LENGTH, RESPONSE_LENGTH
    always = 4 * FLOAT * count["all"] + width * (count["all"] - count["head"])

    def forward(row: int, stream: int = FLOAT) -> int:
        masks = FLOAT + (2 * width if is_cast else 0)  # cast, and padded
        return num * row * (hidden * widest_moment(stream, width) + row * masks)

    def cache(row: int) -> int:
        return num * row * layers * 2 * hidden * width

    row = prompt + num_candidates * response
    logits = num * num_candidates * VOCABULARY * FLOAT
    held = {"generation": casts + cache(row - 1) + 4 * logits}
    held["features"] = max(0, casts - width * count["head"]) + forward(row)
    row = prompt + 2 * response
    held["oracle"] = forward(row, width)
    row = prompt - 1 + 2 * response
    logits = num * 2 * response * VOCABULARY
    inside = max(forward(row), (FLOAT + width if is_cast else FLOAT) * logits)
    held["reference"] = max(casts + inside, FLOAT * (2 * logits + num * row * row))
    is_accumulated = batch_size > micro_batch
    held["update"] = max(update_moments(size, num, is_accumulated, checkpointing, width))
    held["step"] = FLOAT * (count["all"] + (0 if is_cast else 2 * count["head"]))
    return {name: (always + value) / GIB for name, value in held.items()}


def computed_peak(size: str, *args: int, **options: object) -> float:
    """GiB at the peak of a round: `phases`' arguments, and the largest of them."""
    return max(phases(size, *args, **options).values())


# ------------------------------------------------------------------ memory: which micro-batch fits


def print_cards(batch_size: int) -> None:
    """The largest power of two of prompts a forward pass whose count leaves a tenth free."""
    print(f"{batch_size} prompts of {PROMPT_LENGTH} tokens a round, 20 candidates of "
          f"{RESPONSE_LENGTH}; computed: micro-batch (GiB at the peak)\n")  # fmt: skip
    print("| model | checkpointing |", " | ".join(f"{card} GB" for card in CARDS), "|")
    print("|---" * (2 + len(CARDS)) + "|")
    powers = [2**n for n in range(batch_size.bit_length())]
    for size in MODELS:
        for checkpointing in (False, True):
            peaks = {n: computed_peak(size, n, batch_size, checkpointing) for n in powers}
            cells = []
            for card in CARDS:
                fits = [n for n, peak in peaks.items() if peak <= 0.9 * card]
                cells.append(f"{fits[-1]} ({peaks[fits[-1]]:.1f})" if fits else "-")
            print("|", " | ".join((size, "yes" if checkpointing else "no", *cells)), "|")


# ------------------------------------------------------------------ memory: the count beside a CPU


def status_gib(name: str) -> float:
    """GiB of this process now, VmRSS, or at its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(name))


def measured_peak(size: str, micro_batch: int, batch_size: int, checkpointing: bool) -> float:
    """GiB that two rounds take beyond what a process with its imports holds."""
    import datasets  # noqa: F401

    transformers.logging.disable_progress_bar()
    before, (script, more) = status_gib("VmRSS"), RUNS["SEA, 20 candidates, 20 heads"]
    with tempfile.TemporaryDirectory() as folder:
        flags = PUBLISHED | more | write_models(Path(folder), size, "cpu")
        flags |= {"dataset": write_prompts(Path(folder), 2 * batch_size), "device": "cpu"}
        flags |= {"batch_size": batch_size, "num_queries": 8 * batch_size}
        flags |= {"micro_batch_size": micro_batch, "gradient_checkpointing": checkpointing}
        time_rounds(script, flags, 2, None)
    return status_gib("VmHWM") - before


def print_check(micro_batches: list[int], batch_size: int | None, checkpointing: bool) -> None:
    """Each tensor above 64 KiB gets pages of its own, which go back when it is freed: else glibc
    keeps freed memory, and its holes count, too."""
    print("| size, micro-batch | batch | computed GiB | measured GiB | measured / computed |")
    print("|---|---|---|---|---|")
    for num in micro_batches:
        total = batch_size or max(2, num)
        args = "160m", num, total, checkpointing
        with patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                measured = pool.submit(measured_peak, *args).result()
        computed = computed_peak(*args, device="cpu")
        cells = f"{computed:.2f} | {measured:.2f} | {measured / computed:.2f}"
        print(f"| 160m, {num} | {total} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_size", type=int, help="prompts (--size: 128; kernels' rows: 16)")
    parser.add_argument("--only", default="", help="groups, or rows, whose name has this in it")
    parser.add_argument("--model", default="./tiny/sft", help="of `generate`: a folder or a size")
    shapes = {"nargs": "+", "choices": list(SHAPES), "metavar": "SIZE"}
    parser.add_argument("--size", **shapes, help=f"only the scripts at: {', '.join(SHAPES)}")
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
        return print_check(*sides)
    if args.memory:
        return print_cards(args.batch_size or 128)
    if args.size:
        return measure(args)
    print("| what | ours (smallest-largest) | against | theirs | theirs / ours | target |")
    print("|---|---|---|---|---|---|")
    for name, group in groups.items():
        if args.only in name or args.only.startswith(name):
            group(args)
    if not args.device.startswith("cuda"):
        print("| the same on a GPU, and bfloat16 | not measured | | | | |")


if __name__ == "__main__":
    main()
