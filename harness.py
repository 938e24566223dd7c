"""The plumbing that SEA, SELM and PILAF share. A reader of a paper may skip this file.

Shapes: B prompts, N responses a prompt; common.py has the others.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import common
from common import Batch, UserError, frozen_logps, generator, in_parts, require
from tiny.gold import gold_score

import torch
import transformers
from torch import Tensor, distributed, nn
from tqdm import tqdm

# ---------------- flags


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field of `Config`, of which `HfArgumentParser` makes a command-line flag."""
    help += "" if default is None else " (default: %(default)s)"
    return field(default=default, metadata={"help": help, **options})


@dataclass
class Config:
    """The flags that all scripts share."""

    model: str = flag("./tiny/sft", "policy at the start: a folder or a hub id")
    ref_model: str | None = flag(None, "a model that is never trained (as --model)")
    dataset: str = flag("./tiny", "prompts: a folder, a json(l), csv or parquet file, a hub id")
    reward_model: str = flag("./tiny/reward_model", "the oracle: a folder or a hub id")
    output_dir: str | None = flag(None, "folder of the run (runs/SCRIPT-ARM-CHANGED_FLAGS-SEED)")
    seed: int = flag(0, "of every random stream")
    num_queries: int | None = flag(None, "labels to ask of the oracle, at most (2048)")
    batch_size: int = flag(16, "prompts a round (SEA: 128; SELM: 128 or 256)")
    max_prompt_length: int = flag(128, "tokens; longer prompts are dropped")
    max_new_tokens: int = flag(28, "tokens of a response, EOS included")
    temperature: float = flag(1.0, "of sampling")
    beta: float = flag(0.1, "strength of the KL penalty")
    learning_rate: float = flag(3e-4, "of AdamW, constant after warm-up (SEA, SELM: 5e-7)")
    warmup_steps: int = flag(5, "gradient steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    labels: Literal["bernoulli", "argmax"] = flag("bernoulli", "drawn, or the larger reward wins")
    eval_every: int = flag(256, "labels between evaluations")
    eval_prompts: int = flag(256, "held-out prompts an evaluation")
    checkpoint_every: int = flag(20, "rounds between checkpoints")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    micro_batch_size: int | None = flag(None, "prompts a forward pass (8; SELM 4; CPU 64)")
    gradient_checkpointing: bool = flag(False, "less memory, more time")
    prompt_column: str = flag("prompt", "of the data set")
    reference_column: str | None = flag(None, "to compare responses with (reference, if there)")
    resume: str | None = flag(None, "continue this folder or --output_dir", nargs="?", const="")
    overwrite: bool = flag(False, "delete the run in --output_dir first")
    debug: bool = flag(False, "show tracebacks")
    # --num_queries at the start: raising it does not change an iteration's length.
    planned_queries: int | None = field(default=None, init=False)

    script, arm = "run", "labels"  # the default folder's first words
    gpu_micro_batch_size = 8  # Pythia-410m at TL;DR's lengths fits into 16 GB
    may_be_zero = ("seed", "learning_rate", "warmup_steps")  # all others are above 0
    shown = ("win_rate", "reward", "kl", "objective", "gold")  # on the screen
    unsaved = ("output_dir", "resume", "overwrite", "debug")

    def __post_init__(self) -> None:
        require(self.resume is None or not self.overwrite, "--resume excludes --overwrite")
        is_one = not self.resume or self.output_dir in (None, self.resume)
        require(is_one, "--resume names another folder than --output_dir")
        folder = self.resume or self.output_dir or self.default_folder()
        self.output_dir = os.path.expanduser(folder)
        if self.resume is not None:
            self.take_saved_flags()
        self.ref_model = self.ref_model or self.model
        self.num_queries = 2048 if self.num_queries is None else self.num_queries
        self.planned_queries = self.planned_queries or self.num_queries
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.micro_batch_size is None:
            self.micro_batch_size = 64 if self.device == "cpu" else self.gpu_micro_batch_size
        for known in fields(self):
            name, value, choices = known.name, getattr(self, known.name), get_args(known.type)
            if type(value) in (int, float) and (value != 0 or name not in self.may_be_zero):
                require(0 < value < math.inf, f"--{name} {value} is out of range")
            if get_origin(known.type) is Literal:  # argparse checks no notebook
                require(value in choices, f"--{name} {value} is none of {', '.join(choices)}")

    def default_folder(self) -> str:
        words = [self.script, getattr(self, self.arm)]
        for known in fields(self):
            value = getattr(self, known.name)
            if value != known.default and known.name not in (self.arm, "seed", *self.unsaved):
                words.append(f"{known.name}={value}")
        name = re.sub(r"[^A-Za-z0-9.+=-]+", "_", "-".join(words))
        return f"runs/{name[:200]}-{self.seed}"  # no disk takes any length

    def take_saved_flags(self) -> None:
        """Take the flags of the run in --output_dir; --num_queries may be raised."""
        path = Path(self.output_dir, "config.json")
        about = json.loads(path.read_text()) if path.exists() else {}
        wrong = f"--resume: {self.output_dir} holds no run of {self.script}.py; "
        wrong += "--resume FOLDER names one"
        require(about.get("script") == self.script, wrong)
        # A command may give a flag at its default, as --beta=0.1 or --max-grad-norm 1.
        words = sys.argv[1:] if Path(sys.argv[0]).stem == self.script else []
        named = {word[2:].split("=")[0].replace("-", "_") for word in words if word[:2] == "--"}
        for known in [f for f in fields(self) if f.name not in self.unsaved]:
            given, old = getattr(self, known.name), about["flags"][known.name]
            if given == known.default and known.name not in named:
                setattr(self, known.name, old)
            elif known.name != "num_queries" or given < old:
                require(given == old, f"--resume: the run has --{known.name} {old}, not {given}")


# ---------------- models


def path_of(flag_name: str, config: Config) -> str:
    """A path starts with . / ~ and never asks the hub; else it may be an id."""
    name = getattr(config, flag_name)
    path, is_path = os.path.expanduser(name), name.startswith((".", "/", "~"))
    require(os.path.exists(path) or not is_path, f"--{flag_name} {name}: nothing there")
    return path


def load_pretrained(
    auto_class: Any, flag_name: str, config: Config, policy_tokenizer: Any = None
) -> tuple[Any, Any]:
    """A flag's model, with every dropout at 0, and its tokenizer. All but the oracle must have the
    policy's vocabulary and read packed rows like plain ones."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path, options = path_of(flag_name, config), {"trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = transformers.AutoConfig.from_pretrained(path, **options)
    vars(settings).update({key: 0.0 for key in vars(settings) if "drop" in key})
    is_oracle = auto_class is transformers.AutoModelForSequenceClassification
    dtype = torch.bfloat16 if is_oracle and config.device.startswith("cuda") else torch.float32
    options |= {"config": settings, "dtype": dtype, "output_loading_info": True}
    model, info = auto_class.from_pretrained(path, **options)
    model.to(config.device)
    where = f"--{flag_name} {path}"
    missing = ", ".join(sorted(info["missing_keys"])[:3])
    # A causal model as reward model would get a random head, and only a warning.
    require(not missing, f"{where} lacks weights for this use: {missing}")
    length = config.max_prompt_length + config.max_new_tokens
    context = getattr(settings, "max_position_embeddings", math.inf)
    require(context >= length, f"{where} reads {context} tokens; prompt + response: {length}")
    if not is_oracle:
        is_same = tokenizer.get_vocab() == (policy_tokenizer or tokenizer).get_vocab()
        require(is_same, f"{where} has another vocabulary than --model")
        require(reads_packed_rows(model, config), f"{where} misreads packed rows")
    return model, tokenizer


def reads_packed_rows(model: nn.Module, config: Config) -> bool:
    """Is a response beside another one read as in a plain row? Not with ALiBi, sliding windows,
    ignored masks and positions that cannot restart."""
    num, size = model.get_input_embeddings().num_embeddings, config.max_new_tokens
    prompt = torch.arange(config.max_prompt_length)[None] % num  # (1, P)
    responses = torch.arange(2 * size).view(1, 2, size) % num  # (1, 2, R)
    row = common.packed_row(model, prompt, prompt * 0 + 1, responses, responses * 0 + 1)
    ids = torch.cat([prompt, responses[:, 1]], dim=1).to(model.device)
    try:
        with torch.no_grad():
            plain = model(ids)[0][0, -size:]  # (R, V)
            packed = model(**row)[0][0, -size:]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    error = ((packed - plain).abs().max() / plain.std()).item()
    return error < (1e-3 if model.dtype == torch.float32 else 0.1)


def load_policies(config: Config) -> tuple[Any, Any, Any]:
    """Policy, reference and tokenizer. Both models run alike: in another precision, or without
    requires_grad, which picks other kernels, log-ratios would not start at 0."""
    auto_class = transformers.AutoModelForCausalLM
    policy, tokenizer = load_pretrained(auto_class, "model", config)
    ref_model, _ = load_pretrained(auto_class, "ref_model", config, tokenizer)
    require(tokenizer.eos_token_id is not None, f"--model {config.model} has no EOS token")
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    return policy, ref_model, tokenizer


# ---------------- prompts


def load_prompts(config: Config, tokenizer: Any) -> tuple[Batch, Batch]:
    """Training and held-out prompts: the test split, else validation, else the last rows."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    name, options = path_of("dataset", config), {}
    if os.path.isfile(name):
        name, options = Path(name).suffix[1:].replace("jsonl", "json"), {"data_files": name}
        is_known = name in ("json", "csv", "parquet")
        require(is_known, f"--dataset {config.dataset}: not a json, jsonl, csv or parquet file")
    splits = dict(datasets.load_dataset(name, **options))
    train = splits.pop("train" if "train" in splits else next(iter(splits)))
    held_out = splits.get("test") or splits.get("validation")
    if not held_out:
        require(len(train) > 1, f"--dataset {config.dataset} has one row only")
        size = min(config.eval_prompts, len(train) // 2)
        train, held_out = train.train_test_split(size, shuffle=False).values()
    held_out = tokenise_prompts(held_out, config, tokenizer)
    held_out = held_out.select(torch.arange(min(config.eval_prompts, len(held_out))))
    return tokenise_prompts(train, config, tokenizer), held_out


def tokenise_prompts(rows: Any, config: Config, tokenizer: Any) -> Batch:
    """Rows of a data set as a `Batch` without responses. A prompt may be a chat, if the model has a
    template; the oracle reads its last user turn. Columns that nobody reads are left out, since a
    checkpoint could not hold dates."""
    known, where = rows.column_names, f"--dataset {config.dataset}"
    gold = ("wanted", "wrong", "clutter")
    columns = {name: rows[name][:] for name in gold} if set(gold) <= set(known) else {}
    for name in [n for n in ("prompt", "reference", "other") if hasattr(config, f"{n}_column")]:
        named = getattr(config, f"{name}_column")  # None: the default, which may be missing
        column = name if named is None else named
        if column not in known:
            wrong = f"{where} has no --{name}_column {column}; it has {', '.join(known)}"
            require(named is None, wrong)
            continue
        columns[name], role = [], "user" if name == "prompt" else "assistant"
        for text in rows[column][:]:
            if isinstance(text, list) and text and text[-1]["role"] == role:
                text = text[-1]["content"]
            is_text = isinstance(text, str) and text.strip()
            require(is_text, f"{where}: a row's {column} is empty, or not text")
            columns[name].append(text)
    texts = rows[config.prompt_column][:]
    is_chat = bool(tokenizer.chat_template) or not isinstance(texts[0], str)
    if is_chat:
        chats = [[{"role": "user", "content": x}] if isinstance(x, str) else x for x in texts]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
    kept = [row for row, tokens in enumerate(ids) if len(tokens) <= config.max_prompt_length]
    if len(kept) < len(ids):
        print(f"dropped    {len(ids) - len(kept)} of {len(ids)} prompts: --max_prompt_length")
    require(kept, f"--max_prompt_length {config.max_prompt_length} leaves no prompt")
    columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    rows = {"input_ids": [ids[row] for row in kept]}
    rows = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
    none = torch.zeros(len(kept), 0, config.max_new_tokens, dtype=torch.long)  # (B, N = 0, R)
    prompts = rows["input_ids"], rows["attention_mask"]  # (B, P), (B, P)
    return Batch(columns, *prompts, [[] for _ in kept], none, none)


def next_prompts(prompts: Batch, start: int, count: int, seed: int) -> Batch:
    """`count` prompts from number `start` of an endless stream, reshuffled each epoch."""
    size = len(prompts)
    epochs = range(start // size, (start + count) // size + 1)
    order = [torch.randperm(size, generator=generator(seed, "epoch", epoch)) for epoch in epochs]
    return prompts.select(torch.cat(order)[start % size :][:count])


def count_iterations(config: Config, labels: int, num_steps: int) -> int:
    """How many iterations of so many labels and steps the budget, perhaps raised, pays for."""
    wrong = f"--warmup_steps {config.warmup_steps}: an iteration has only {num_steps} step(s); "
    wrong += "lower it or --batch_size, or raise --num_queries"
    require(config.warmup_steps < num_steps, wrong)
    more = config.num_queries - config.planned_queries
    require(more == 0 or more >= labels, f"--num_queries: an iteration more takes {labels} labels")
    return config.num_iterations + more // labels


# ---------------- oracles


def is_first() -> bool:
    """Under torchrun the first process alone writes."""
    return common.ranks()[0] == 0


def to_lines(rows: list[dict]) -> str:
    """Rows of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def rewrite(path: Path, text: str) -> None:
    """Replace a file at once: after any crash there is a whole one."""
    if is_first():
        path.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)


class Oracle:
    """The annotator. A rule, a judge or a person is a subclass with `score` or `prefer` alone.

    `label` and `rank` count what they cost in `queries`. Each answer is in labels.jsonl the moment
    it is given, and is given again when its question returns after a crash. `score` costs nothing.
    """

    scores_at_once = False  # each answer is kept before the next is asked

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, Path(os.devnull)
        self.queries, self.num_lines = 0, 0
        self.unused = []  # rows of labels.jsonl, bought before a crash

    def score(self, prompts: list[str], responses: list[list[str]]) -> Tensor | None:
        """Rewards (B, N) of N texts to each prompt; None if this oracle only compares."""

    def prefer(self, prompts: list[str], duels: list[list[str]], rewards: Tensor | None) -> Tensor:
        """Is the first of two texts better, (B,)? By SEA's Eq. 3, Bradley-Terry, with probability
        sigmoid(r1 - r2); with --labels argmax the larger reward wins, a tie by a coin. `rewards`
        (B, 2) are `score`'s, or None."""
        require(rewards is not None, "an oracle needs `score` or `prefer`")
        gap = rewards[:, 0] - rewards[:, 1]
        probability = gap.sigmoid() if self.config.labels == "bernoulli" else (gap.sign() + 1) / 2
        rng = generator(self.config.seed, "labels", self.queries)
        return torch.rand(len(gap), generator=rng) < probability

    def open(self, path: Path, queries: int, num_lines: int, unused: list[dict]) -> None:
        """Append answers to `path`. Its rows after the first `num_lines` were bought, but not used
        before the run stopped, like those of `unused`."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [json.loads(line) for line in text.split("\n")[:-1]]  # a crash may cut the last
        rewrite(path, to_lines(rows))
        self.path = path if is_first() else Path(os.devnull)
        self.queries, self.num_lines = queries, len(rows)
        self.unused = unused + rows[num_lines:]

    def ask(self, prompts: list, texts: list, costs: list, noise: Tensor | None) -> list[dict]:
        """Rows of labels.jsonl, of rankings if there is noise, else of duels: bought or new."""
        rows, rewards, texts = [], None, [[text.strip() for text in row] for row in texts]
        if self.scores_at_once and prompts:  # the bought too: digits depend on the batch
            rewards = self.score(prompts, texts)
        for n, (x, y) in enumerate(zip(prompts, texts)):
            bought = [row for row in self.unused if (row["prompt"], row["texts"]) == (x, y)]
            if bought:
                rows.append(bought[0])
                self.unused.remove(bought[0])
            else:
                own = self.score([x], [y]) if rewards is None else rewards[n : n + 1]  # (1, N)
                if noise is None:
                    answer = bool(self.prefer([x], [y], own)[0])
                else:
                    require(own is not None, "this oracle has no `score`: it cannot rank")
                    answer = (own[0] + noise[n]).tolist()
                rows.append({"prompt": x, "texts": y, "answer": answer})
                rows[-1]["rewards"] = None if own is None else own[0].tolist()
                self.num_lines += 1
                with open(self.path, "a", encoding="utf-8") as file:  # closed, hence flushed
                    file.write(to_lines(rows[-1:]))
            self.queries += costs[n]  # the number of the label names its coin
        return rows

    def label(self, duels: Batch) -> tuple[Tensor, dict[str, float]]:
        """Chosen and rejected response (B, 2) to each prompt, of two, at a label each; and
        online_win_rate, of both against the data set's reference, if there is one."""
        prompts, metrics = duels.columns["prompt"], {}
        rows = self.ask(prompts, duels.responses, [1] * len(duels), None)
        rewards = torch.tensor([row["rewards"] for row in rows if row["rewards"]]).flatten()
        if len(rewards) and "reference" in duels.columns:
            references = [[text] for text in duels.columns["reference"]]
            baseline = self.score(prompts, references).expand(-1, 2).flatten()  # (2 B,)
            metrics["online_win_rate"] = win_metrics(rewards, baseline)["win_rate"]
        first_wins = torch.tensor([row["answer"] for row in rows], dtype=torch.bool)  # (B,)
        return torch.stack([~first_wins, first_wins], dim=1).long(), metrics

    def rank(self, prompts: list, texts: list, noise: Tensor, costs: list[int]) -> Tensor:
        """Scores (B, N) plus `noise` (B, N), by which texts are ranked, at `costs` labels each."""
        rows = self.ask(prompts, texts, costs, noise)
        return torch.tensor([row["answer"] for row in rows]).view(noise.shape)


class RewardModelOracle(Oracle):
    """A reward model, which reads text by its own tokenizer and chat template. What the texts of a
    prompt begin with alike is read once, if it can read packed rows."""

    scores_at_once = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        auto_class = transformers.AutoModelForSequenceClassification
        self.model, self.tokenizer = load_pretrained(auto_class, "reward_model", config)
        require(self.model.config.num_labels == 1, "--reward_model has several labels")
        has_head, encoder = hasattr(self.model, "score"), self.model.base_model
        self.is_packed = has_head and reads_packed_rows(encoder, config)
        self.model.config.update({"pad_token_id": self.tokenizer.pad_token_id, "use_cache": False})

    @torch.no_grad()
    def score(self, prompts: list[str], responses: list[list[str]]) -> Tensor:
        pairs = [(x, y.strip()) for x, row in zip(prompts, responses) for y in row]
        texts = [f"{x} {y}".rstrip() for x, y in pairs]
        is_chat = bool(self.tokenizer.chat_template)
        if is_chat:
            turns = [(("user", x), ("assistant", y)) for x, y in pairs]
            chats = [[{"role": role, "content": text} for role, text in two] for two in turns]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        ids = self.tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
        for text in ids:  # rewards are read off at the last token that is not padding
            while len(text) > 1 and text[-1] == self.tokenizer.pad_token_id:
                text.pop()
        context = getattr(self.model.config, "max_position_embeddings", math.inf)
        require(max(map(len, ids)) <= context, f"--reward_model reads {context} tokens at most")
        num, size = len(responses[0]), self.config.micro_batch_size
        rows = [ids[n : n + num] for n in range(0, len(ids), num)]  # B lists of N texts' tokens
        read = self.read_packed if self.is_packed and num > 1 else self.read_plain
        rewards = in_parts(lambda part: read([rows[n] for n in part]), len(rows), size)
        require(rewards.isfinite().all(), "the oracle's reward is not finite")
        return rewards

    def pad(self, texts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        padded = self.tokenizer.pad({"input_ids": texts}, padding_side=side, return_tensors="pt")
        return padded["input_ids"].long(), padded["attention_mask"].long()

    def read_plain(self, rows: list[list[list[int]]]) -> Tensor:
        """Rewards (b, N) of b lists of N texts' tokens."""
        ids, mask = (tensor.to(self.model.device) for tensor in self.pad(sum(rows, []), "right"))
        logits = self.model(input_ids=ids, attention_mask=mask).logits  # (b N, 1)
        return logits.view(len(rows), -1).float().cpu()

    def read_packed(self, rows: list[list[list[int]]]) -> Tensor:
        """The same; what a list's texts begin with stands where a prompt would."""
        sizes = [len(os.path.commonprefix([text[:-1] for text in row])) for row in rows]
        start = self.pad([row[0][:size] for row, size in zip(rows, sizes)], "left")  # (b, P)
        ends = self.pad([text[size:] for row, size in zip(rows, sizes) for text in row], "right")
        ids, mask = (tensor.view(len(rows), -1, tensor.shape[1]) for tensor in ends)  # (b, N, R)
        row = common.packed_row(self.model, *start, ids, mask)
        length, mask = common.packed_mask(mask).shape[1], mask.to(self.model.device)
        states = self.model.base_model(**row)[0][:, -length:]  # (b, L, D)
        rewards = common.unpack(self.model.score(states), mask)[..., 0]  # (b, N, R)
        return rewards.gather(2, mask.sum(2, keepdim=True) - 1)[..., 0].float().cpu()


# ---------------- evaluation


@dataclass
class Task:
    """What a script works with."""

    policy: nn.Module
    ref_model: nn.Module
    tokenizer: Any
    prompts: Batch
    held_out: Batch
    oracle: Oracle


def win_metrics(rewards: Tensor, baseline: Tensor) -> dict[str, float]:
    """Share of rewards above their baseline (ties one half), its standard error, and the mean of
    sigmoid(reward - baseline), Eq. 1 of SEA; both (n,)."""
    wins = (rewards > baseline).double() + (rewards == baseline).double() / 2
    return {
        "win_rate": wins.mean().item(),
        "win_rate_stderr": wins.std(correction=0).item() / math.sqrt(len(wins)),
        "win_probability": (rewards - baseline).double().sigmoid().mean().item(),
    }


def evaluate(task: Task, config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of one sample a held-out prompt at temperature 1, and the samples.

    `kl` is the mean summed log-ratio to --ref_model, in nats a response; `objective` reward - beta
    * kl; `truncated` the share that was cut at --max_new_tokens.
    """
    models, rng = (task.policy, task.tokenizer), generator(config.seed, "evaluation")
    batch = common.respond(*models, task.held_out, 1, rng, config, temperature=1.0)
    logps = [frozen_logps(model, batch, config) for model in (task.policy, task.ref_model)]
    kl = (logps[0] - logps[1]).double().mean().item()
    columns = batch.columns
    metrics = {"compared_with": columns["compared_with"][0]}
    kept = {"prompt": columns["prompt"], "reference": columns["reference"]}
    kept["response"] = [row[0] for row in batch.responses]
    rewards = task.oracle.score(columns["prompt"], batch.responses)  # (B, 1)
    if rewards is not None:
        metrics |= win_metrics(rewards[:, 0], torch.tensor(columns["reference_reward"]))
        metrics["reward"] = rewards.double().mean().item()
        metrics["objective"] = metrics["reward"] - config.beta * kl
        kept["reward"] = rewards[:, 0].tolist()
    if "wanted" in columns:
        facts = (columns[name] for name in ("wanted", "wrong", "clutter"))
        kept["gold"] = list(map(gold_score, kept["response"], *facts))
        metrics["gold"] = sum(kept["gold"]) / len(batch)
    last = batch.response_ids[..., -1]  # what has ended is padded with EOS
    is_cut = ~torch.isin(last, common.eos_ids(*models).cpu())
    metrics["kl"] = kl
    metrics["length"] = batch.response_mask.sum(-1).double().mean().item()
    metrics["truncated"] = is_cut.double().mean().item()
    return metrics, [dict(zip(kept, values)) for values in zip(*kept.values())]


# ---------------- a run and its folder


def load(config: Config, oracle: Oracle | None) -> Task:
    """Load and show what a run needs; samples of the policy stand in for missing references."""
    folder, path = config.output_dir, Path(config.output_dir, "config.json")
    if path.exists():
        is_run = "script" in json.loads(path.read_text())
        require(is_run, f"--output_dir {folder} holds no run, but another's config.json")
        is_meant = config.overwrite or config.resume is not None
        ways = f"--overwrite, --resume {folder} or another --output_dir"
        require(is_meant, f"{folder} holds a run: give {ways}")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # else 1 GB of CPU kernels
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape: each token
    policy, ref_model, tokenizer = load_policies(config)
    prompts, held_out = load_prompts(config, tokenizer)
    judge = type(oracle).__name__ if oracle else config.reward_model
    require(not oracle or common.ranks()[1] == 1, f"{judge} is asked by each process: run only one")
    oracle = oracle or RewardModelOracle(config)
    columns, compared_with = held_out.columns, "reference"
    if "reference" not in columns:
        compared_with, rng = "initial policy", generator(config.seed, "baseline")
        batch = common.respond(policy, tokenizer, held_out, 1, rng, config, temperature=1.0)
        columns["reference"] = [row[0] for row in batch.responses]
    columns["compared_with"] = [compared_with] * len(held_out)
    rewards = oracle.score(columns["prompt"], [[text] for text in columns["reference"]])
    if rewards is not None:
        columns["reference_reward"] = rewards[:, 0].tolist()
    sizes = f"{len(prompts)} to train on, {len(held_out)} held out"
    limits = f"at most {config.max_prompt_length} tokens, responses at most {config.max_new_tokens}"
    print(f"policy     {config.model}, {policy.num_parameters():,} weights")
    print(f"reference  {config.ref_model}")
    print(f"oracle     {judge}, --labels {config.labels}; win rate against the {compared_with}")
    print(f"prompts    {config.dataset}, {sizes}, {limits}")
    print(f"run        {config.num_queries} labels into {folder}, on {config.device}")
    return Task(policy, ref_model, tokenizer, prompts, held_out, oracle)


@dataclass
class Counts:
    """What a run has cost so far; a script may add its own."""

    candidates: int = 0  # responses sampled to choose from
    decoder_streams: int = 0  # responses decoded, a forward pass a token each
    gradient_steps: int = 0
    synthetic_pairs: int = 0

    def add_samples(self, num: int) -> None:
        self.candidates += num
        self.decoder_streams += num


class Run:
    """The folder of a run, and what the screen shows. A checkpoint holds `parts`, `counts` and the
    files' rows, but no random state: what a round draws depends on the seed and its number."""

    def __init__(self, config: Config, oracle: Oracle, parts: dict, counts: Counts) -> None:
        self.config, self.oracle, self.parts, self.counts = config, oracle, parts, counts
        self.folder = Path(config.output_dir)
        self.round, self.seen = 0, {}  # recorded since the last row of metrics
        self.replay: list[Batch] = []  # pairs that a later round needs
        self.rows = {"metrics": [], "preferences": [], "samples": []}
        if config.overwrite and is_first() and (self.folder / "config.json").exists():
            shutil.rmtree(self.folder)
        if common.ranks()[1] > 1:
            distributed.barrier()
        self.folder.mkdir(parents=True, exist_ok=True)
        path, labels = self.folder / "checkpoint.pt", (0, 0, [])
        if path.exists() and config.resume is not None:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            vars(self).update(state["run"])
            self.replay = [Batch(**part) for part in state["replay"]]
            vars(counts).update(state["counts"])
            labels = state["labels"]
        oracle.open(self.folder / "labels.jsonl", *labels)
        about = {"script": config.script, "flags": asdict(config)}
        about["versions"] = {n: version(n) for n in ("torch", "transformers", "datasets", "tqdm")}
        clone = Path(__file__).resolve().parent
        options = {"cwd": clone, "capture_output": True, "text": True}
        commit = subprocess.run("git rev-parse HEAD", shell=True, **options).stdout.strip()
        rewrite(self.folder / "config.json", json.dumps(about | {"git_commit": commit}, indent=1))
        options = {"total": config.num_queries, "initial": oracle.queries, "unit": "label"}
        self.bar = tqdm(**options, disable=not is_first())

    def save(self) -> None:
        """Write the JSONL files and, last, checkpoint.pt: there is always a whole one."""
        if is_first():
            for name, rows in self.rows.items():
                rewrite(self.folder / f"{name}.jsonl", to_lines(rows))
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state["run"] = {"round": self.round, "seen": self.seen, "rows": self.rows}
            state["counts"] = vars(self.counts)
            state["replay"] = [vars(part) for part in self.replay]
            state["labels"] = (self.oracle.queries, self.oracle.num_lines, self.oracle.unused)
            torch.save(state, self.folder / "checkpoint.tmp")
            os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def evaluation_is_due(self, is_forced: bool) -> bool:
        """At the start, every --eval_every labels, and where it is forced; once a round."""
        if not self.rows["metrics"]:
            return True
        last, every = self.rows["metrics"][-1], self.config.eval_every
        is_step = self.oracle.queries // every > last["queries"] // every
        return last["round"] < self.round and (is_forced or is_step)

    def record(self, values: dict[str, float]) -> None:
        """Keep a round's values; the next row of metrics has their means."""
        for name, value in values.items():
            self.seen.setdefault(name, []).append(value)

    def keep(self, pairs: Batch, num_synthetic: int = 0) -> None:
        """Pairs, chosen first, are rows of preferences.jsonl; the synthetic ones come last."""
        sources = ["oracle"] * (len(pairs) - num_synthetic) + ["model"] * num_synthetic
        for x, y, source in zip(pairs.columns["prompt"], pairs.responses, sources):
            row = {"round": self.round, "prompt": x, "chosen": y[0], "rejected": y[1]}
            self.rows["preferences"].append(row | {"source": source})
        self.counts.synthetic_pairs += num_synthetic

    def log(self, metrics: dict, samples: list[dict], own: dict[str, float]) -> None:
        """Write and print a row of metrics, with means of what was recorded; save."""
        queries = {"queries": self.oracle.queries}
        means = {name: sum(values) / len(values) for name, values in sorted(self.seen.items())}
        row = queries | {"round": self.round} | vars(self.counts) | metrics | own | means
        self.rows["metrics"].append(row)
        self.rows["samples"] += [queries | sample for sample in samples]
        cells = [f"{name} {row[name]:.3f}" for name in self.config.shown if name in row]
        tqdm.write("  ".join([f"labels {self.oracle.queries}", *cells]))
        for sample in samples[:2]:
            if len(self.rows["metrics"]) == 1:
                tqdm.write(f"{sample['prompt']}\n  reference: {sample['reference']}")
            reward = f"[{sample['reward']:5.2f}] " if "reward" in sample else ""
            tqdm.write(f"  {reward}{sample['response'].strip()}")
        self.seen = {}
        self.save()

    def end_round(self) -> None:
        """Count the round, save it when due; stop if 20 rounds had nothing to compare."""
        self.round += 1
        self.bar.update(self.oracle.queries - self.bar.n)
        if self.round % self.config.checkpoint_every == 0:
            self.save()
        pairs = self.rows["preferences"]
        num_idle = self.round - (pairs[-1]["round"] + 1 if pairs else 0)
        require(num_idle < 20, "the candidates of 20 rounds all read the same")

    def finish(self, policy: nn.Module, tokenizer: Any) -> None:
        """Write model/, and compare the last row with the first."""
        self.bar.close()
        if is_first():
            policy.save_pretrained(self.folder / "model")
            tokenizer.save_pretrained(self.folder / "model")
        first, last = self.rows["metrics"][0], self.rows["metrics"][-1]
        names = [name for name in self.config.shown if name in first]
        gains = [f"{name} {last[name] - first[name]:+.3f}" for name in names]
        print("since the start:", "  ".join(gains))
        print(f"done, {self.oracle.queries} labels; see: python notebooks/plot.py {self.folder}")


# ---------------- the command line


class Parser(transformers.HfArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the flags)")


def in_one_line(error: Exception, config: Config | None) -> str:
    """What went wrong, after the flag whose value it names, if it is a library's word."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UserError):
        return line
    # Errors of a data set do not always name the file.
    said = config.dataset if "in load_prompts" in traceback.format_exc() else str(error)
    names = "model ref_model dataset reward_model erm_backbone output_dir device".split()
    flags = [(name, os.path.expanduser(getattr(config, name, ""))) for name in names]
    known = [(name, value) for name, value in flags if value and value.lower() in said.lower()]
    start = "--{} {}: ".format(*max(known, key=lambda flag: len(flag[1]))) if known else ""
    return f"{start}{line} ({type(error).__name__}, see --debug)"


def main(config_class: type[Config], train: Callable, docstring: str) -> None:
    """Parse the flags and train. An error ends in one line and exit code 2."""
    parser = Parser(config_class, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    parser.description, config = docstring.splitlines()[0], None
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun: one GPU a process
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group()
            sys.stdout = sys.stdout if is_first() else open(os.devnull, "w")
        config = config_class(**vars(parser.parse_args()))
        train(config)
        if common.ranks()[1] > 1:
            distributed.barrier()
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        has_begun = config and Path(config.output_dir, "config.json").exists()
        advice = f"; --resume {config.output_dir} continues" if has_begun else ""
        print(f"\nstopped{advice}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        for bar in list(tqdm._instances):  # the error has a line of its own
            bar.close()
        print(f"error: {in_one_line(error, config)}", file=sys.stderr)
        sys.exit(2)
