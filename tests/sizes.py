"""The three scripts at Pythia's real shapes, with random weights: what a round takes and holds.

`python tests/benchmark.py --size 160m 410m 1b` prints these rows. A round is timed from the end of
the one before it, so loading, the first evaluation and the first round are left out.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import common
import harness
import pilaf
import sea
import selm

import memory
import tokenizers
import torch
import transformers

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


# ------------------------------------------------------------------ folders as Hugging Face's


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


# ------------------------------------------------------------------ a few rounds


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
        peak += f", computed {memory.computed_peak(size, *shape, device, num):.2f}"
    cells = (f"{seconds:.3f}", minutes, peak, f"{first:.1f}")
    print_row(f"{size}: {name}, micro-batch {micro_batch}", *cells)
    if checkpoint:
        what = "{:.2f} GiB: written in {:.2f} s, read in {:.2f} s".format(*checkpoint)
        print_row(f"{size}: checkpoint", what, "", "", "")


# ------------------------------------------------------------------ bfloat16


def precision(device: str, is_bfloat16: bool) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_bfloat16)


def difference(one: torch.Tensor, other: torch.Tensor) -> str:
    gaps = (one - other).abs()
    return f"largest {gaps.max():.2g}, mean {gaps.mean():.2g}"


@torch.no_grad()
def precision_rows(size: str, flags: dict) -> None:
    """What bfloat16 does to log-probabilities, in nats, and to packed rows, as `check_model` has
    it: in standard deviations of what a plain row gives."""
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


# ------------------------------------------------------------------ the table


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
