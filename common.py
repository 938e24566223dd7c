"""What SEA, SELM and PILAF share: packed generation and log-probabilities, losses, the oracle,
evaluation, and the folder of a run. Nothing here knows which paper is running.

Everything is B prompts with N responses each. A prompt and its responses are computed as one
*packed row* ``prompt | y_1 | ... | y_N``: a mask lets each response see the prompt and itself only,
and positions restart after the prompt, so the prompt is computed and kept once however many
responses hang on it. Shapes: B prompts, N responses a prompt, P prompt tokens, R response tokens,
V vocabulary. Prompts are padded on the left, responses on the right; masks are 1 on real tokens (a
response's EOS is one) and are never derived from ids, since the padding may be EOS too.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

# A CPU's kernels are kept by shape, and shapes vary from round to round: 1,024 would take 1 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# ------------------------------------------------------------------ flags and the command line


class UserError(Exception):
    """What the user can mend: one sentence, exit code 2."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise UserError(message)


def flag(default: Any, help: str) -> Any:
    """A field of `Config`, which `transformers.HfArgumentParser` makes a command-line flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The flags that all scripts share; a script adds its own and may override defaults."""

    model: str = flag("./tiny/sft", "policy at the start: a folder or a hub id")
    ref_model: str | None = flag(None, "reference of the loss and of kl (default: --model)")
    dataset: str = flag("./tiny", "prompts: a folder, a json, jsonl, csv or parquet file, a hub id")
    reward_model: str = flag("./tiny/reward_model", "the oracle: a folder or a hub id")
    output_dir: str | None = flag(None, "folder of the run (default: runs/SCRIPT-ARM-SEED)")
    seed: int = flag(0, "of every random stream")
    num_queries: int = flag(2048, "labels to ask of the oracle in all")
    batch_size: int = flag(16, "prompts a round (SEA: 128; SELM: 128 or 256)")
    max_prompt_length: int = flag(128, "tokens; longer prompts are dropped, with a count")
    max_new_tokens: int = flag(28, "tokens of a response, EOS included")
    temperature: float = flag(1.0, "of sampling, applied after any combination of logits")
    beta: float = flag(0.1, "strength of the KL penalty")
    learning_rate: float = flag(3e-4, "of AdamW, constant after warm-up (SEA, SELM: 5e-7)")
    warmup_steps: int = flag(5, "gradient steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    labels: Literal["bernoulli", "argmax"] = flag(
        "bernoulli", "bernoulli draws a label from sigmoid(r1 - r2), argmax takes the larger reward"
    )
    eval_every: int = flag(256, "labels between evaluations")
    eval_prompts: int = flag(256, "held-out prompts an evaluation")
    checkpoint_every: int = flag(20, "rounds between checkpoints")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    micro_batch_size: int = flag(64, "prompts a forward pass: fewer take less memory")
    gradient_checkpointing: bool = flag(False, "less memory, more time")
    chat_template: Literal["auto", "on", "off"] = flag(
        "auto", "auto uses a model's chat template if it has one, on insists on the policy's"
    )
    prompt_column: str = flag("prompt", "of the data set")
    reference_column: str = flag("reference", "of the data set: a response to compare with")
    resume: bool = flag(False, "continue the run in --output_dir")
    overwrite: bool = flag(False, "delete the run in --output_dir first")
    debug: bool = flag(False, "show tracebacks")

    may_be_zero = ("seed", "learning_rate", "warmup_steps")  # every other number is above 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if get_origin(kinds[0]) is list and isinstance(value, list):
                for element in value:
                    self.check(name, element, get_args(kinds[0]))
            else:
                self.check(name, value, kinds, is_choice=get_origin(hint) is Literal)
        require(not (self.resume and self.overwrite), "--resume excludes --overwrite")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {self.device} is not to be had here") from error
        self.ref_model = self.ref_model or self.model

    def check(self, name: str, value: Any, kinds: tuple, is_choice: bool = False) -> None:
        """UserError unless the value is one of the kinds, and a number finite and above 0."""
        if is_choice:
            is_right, wanted = value in kinds, "one of " + ", ".join(kinds)
        else:
            is_right = type(value) in kinds or (type(value) is int and float in kinds)
            wanted = kinds[0].__name__
        if is_right and type(value) in (int, float):
            is_right = 0 < value < 2**63 or (value == 0 and name in self.may_be_zero)
            wanted = f"a finite {wanted} above 0"
        require(is_right, f"--{name} must be {wanted}, not {value!r}")


def main(config_class: type[Config], train: Callable, docstring: str) -> None:
    """Parse the command line and train; a user's mistake becomes one sentence and exit code 2."""
    title = docstring.strip().splitlines()[0]
    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False, description=title)
    parser.error = lambda message: require(False, f"{message} (see --help)")
    try:
        train(config_class(**vars(parser.parse_args())))
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if "--debug" in sys.argv:
            raise
        remedy = " (try --micro_batch_size)" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {str(error).splitlines()[0]}{remedy}", file=sys.stderr)
        sys.exit(2)


def generator(seed: int, *name: Any) -> torch.Generator:
    """The CPU random stream of a name such as ("labels", round).

    One a purpose and a round: no use of one can shift another, and a resumed run needs no state.
    """
    return torch.Generator().manual_seed(random.Random(repr((seed, *name))).getrandbits(63))


# ------------------------------------------------------------------ prompts x responses


@dataclass
class Batch:
    """B prompts with N responses each (N = 0 before they are sampled). Tensors are on the CPU."""

    columns: dict[str, list]  # of the data set, B rows; "prompt" is what the oracle reads
    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P)
    responses: list[list[str]]  # B lists of N texts
    response_ids: Tensor  # (B, N, R)
    response_mask: Tensor  # (B, N, R)
    ref_logps: Tensor | None = None  # (B, N), once computed, kept

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: Tensor, picks: Tensor | None = None) -> "Batch":
        """The prompts `rows` (b,), each with its responses `picks` (b, n) or all; padding cut."""
        if picks is None:
            picks = torch.arange(self.response_ids.shape[1]).expand(len(rows), -1)
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        prompt_mask, mask = self.prompt_mask[rows], self.response_mask[rows[:, None], picks]
        widest = int(prompt_mask.sum(1).max()) if len(rows) else 0
        start = self.prompt_ids.shape[1] - widest
        length = int(mask.sum(-1).max()) if mask.numel() else 0
        return Batch(
            columns,
            self.prompt_ids[rows, start:],
            prompt_mask[:, start:],
            [[self.responses[row][n] for n in pick] for row, pick in zip(rows, picks, strict=True)],
            self.response_ids[rows[:, None], picks, :length],
            mask[..., :length],
            None if self.ref_logps is None else self.ref_logps[rows[:, None], picks],
        )

    def split(self, size: int) -> Iterator[tuple[Tensor, "Batch"]]:
        """Row numbers and rows of micro-batches of at most `size` prompts."""
        for rows in torch.arange(len(self)).split(size):
            yield rows, self.select(rows)


def beside(parts: list[Batch]) -> Batch:
    """The same prompts, with the responses of all parts side by side (without `ref_logps`)."""
    length = max(part.response_ids.shape[-1] for part in parts)
    ids = [F.pad(p.response_ids, (0, length - p.response_ids.shape[-1])) for p in parts]
    masks = [F.pad(p.response_mask, (0, length - p.response_mask.shape[-1])) for p in parts]
    texts = [sum(rows, []) for rows in zip(*(part.responses for part in parts), strict=True)]
    ids, mask = torch.cat(ids, dim=1), torch.cat(masks, dim=1)  # (B, N, R)
    return dataclasses.replace(parts[0], responses=texts, response_ids=ids, response_mask=mask)


def stacked(parts: list[Batch]) -> Batch:
    """The prompts of all parts one after another, each with its N responses."""
    widest = max(part.prompt_ids.shape[1] for part in parts)
    length = max(part.response_ids.shape[-1] for part in parts)

    def left(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (widest - tensor.shape[1], 0))

    def right(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, length - tensor.shape[-1]))

    return Batch(
        {name: sum((part.columns[name] for part in parts), []) for name in parts[0].columns},
        torch.cat([left(part.prompt_ids) for part in parts]),
        torch.cat([left(part.prompt_mask) for part in parts]),
        sum((part.responses for part in parts), []),
        torch.cat([right(part.response_ids) for part in parts]),
        torch.cat([right(part.response_mask) for part in parts]),
        torch.cat([part.ref_logps for part in parts]),
    )


class Replay:
    """Pairs kept for later steps, with their reference log-probabilities. Checkpoints hold them."""

    def __init__(self) -> None:
        self.parts: list[Batch] = []

    def state_dict(self) -> dict[str, Any]:
        return vars(stacked(self.parts)) if self.parts else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.parts = [Batch(**state)] if state else []


def distinct(responses: list[list[str]]) -> Tensor:
    """True (B, N) where no earlier response to the prompt reads the same."""
    texts = [[text.strip() for text in row] for row in responses]
    return torch.tensor([[row.index(text) == n for n, text in enumerate(row)] for row in texts])


def widest_pair(rewards: Tensor, is_distinct: Tensor) -> tuple[Tensor, Tensor]:
    """The pair with the largest margin, best first: rewards (B, N) -> (B,), (B,). Where all are
    equal, as implicit rewards are at policy = reference, any two responses, which is random."""
    best = rewards.masked_fill(~is_distinct, -math.inf).argmax(-1)
    others = is_distinct.scatter(1, best[:, None], False)  # none: both are response 0
    return best, rewards.masked_fill(~others, math.inf).argmin(-1)


# ------------------------------------------------------------------ the packed row


def packed_layout(
    prompt_mask: Tensor, owner: Tensor, step: Tensor, dtype: torch.dtype, num_queries: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention mask and positions of a packed row: prompt, then L response tokens in any order.

    A token sees itself, the prompt's real tokens up to itself, and its own response up to itself.

    Args: prompt_mask (B, P); owner (L,) or (B, L), the response of each token after the prompt;
        step, alike, its place in that response from 0; num_queries, to get only the mask's last
        rows Q (else S).
    Returns: mask (B, 1, Q, S) to add to attention scores, 0 or hugely negative, S = P + L; and
        positions (B, S), which count real tokens and restart after the prompt.
    """
    size, length = prompt_mask.shape
    owner, step = owner.expand(size, -1), step.expand(size, -1)  # (B, L)
    prompt_steps = torch.arange(length, device=step.device).expand(size, -1)  # (B, P)
    place = torch.cat([prompt_steps, length + step], dim=1)[:, None]  # (B, 1, S)
    is_real = F.pad(prompt_mask.bool(), (0, step.shape[1]), value=True)[:, None]
    owner = F.pad(owner, (length, 0), value=-1)[:, None]  # (B, 1, S), -1 is the prompt
    queries = slice(-num_queries or None, None)
    is_mine = (owner == -1) | (owner == owner[..., queries].mT)  # (B, Q, S)
    is_past = place <= place[..., queries].mT  # (B, Q, S)
    itself = torch.eye(owner.shape[-1], dtype=torch.bool, device=owner.device)[queries]
    is_visible = (is_mine & is_past & is_real) | itself  # (B, Q, S); itself: for padding
    hidden = torch.tensor(torch.finfo(torch.bfloat16).min, dtype=dtype, device=owner.device)
    mask = torch.where(is_visible, torch.zeros_like(hidden), hidden)  # finite in every precision
    prompt_positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    response_positions = prompt_mask.sum(1, keepdim=True) + step  # (B, L)
    return mask[:, None], torch.cat([prompt_positions, response_positions], dim=1)


def packed_inputs(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of one forward pass over ``prompt | y_1 | ... | y_N``, without the padding between
    responses: (B, P), (B, P), response ids and mask (B, N, R).

    Also returns the row's L response tokens by their number in the flattened (N R), as (B, L): the
    real ones in order, then, in rows that have fewer than others, padding.
    """
    order = mask.flatten(1).argsort(dim=1, descending=True, stable=True)  # real tokens first
    order = order[:, : int(mask.sum((1, 2)).max())].to(model.device)  # (B, L)
    owner, step = order // ids.shape[-1], order % ids.shape[-1]
    attention, positions = packed_layout(prompt_mask.to(model.device), owner, step, model.dtype)
    ids = torch.cat([prompt_ids, ids.flatten(1).gather(1, order.cpu())], dim=1).to(model.device)
    inputs = dict(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
    return inputs, order


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU over weights kept in float32: at a learning rate of 5e-7 a
    bfloat16 weight would never move, since its spacing is far wider than the update."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def token_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y_t | x, y_<t), float32 (B, N, R), 0 at padding; ValueError if a response is empty.

    The prompt's last token predicts y_1, y_{t-1} predicts y_t, a response's last token nothing.
    """
    ids, mask = batch.response_ids.to(model.device), batch.response_mask.to(model.device)
    if not mask.any(-1).all():
        raise ValueError("a response without a token: even an empty text has its EOS")
    sources = batch.response_ids[..., :-1], batch.response_mask[..., 1:]  # y_{t-1}, if there is y_t
    inputs, order = packed_inputs(model, batch.prompt_ids, batch.prompt_mask, *sources)
    with autocast(model.device):  # the LM head skips the rest of the prompt
        logits = model(**inputs, logits_to_keep=1 + order.shape[1]).logits.float()  # (B, 1+L, V)
    normaliser = logits.logsumexp(-1)  # (B, 1 + L)
    first = logits[:, 0].gather(1, ids[..., 0]) - normaliser[:, :1]  # (B, N)
    targets = ids[..., 1:].flatten(1).gather(1, order)  # (B, L)
    later = logits[:, 1:].gather(2, targets[..., None])[..., 0] - normaliser[:, 1:]  # (B, L)
    later = torch.zeros_like(ids[..., 1:], dtype=later.dtype).flatten(1).scatter(1, order, later)
    later = later.view_as(ids[..., 1:])  # (B, N, R - 1)
    return torch.cat([first[..., None], later], dim=-1) * mask  # (B, N, R)


def response_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y | x), (B, N): the sum over the response's tokens, EOS too, never the prompt's."""
    return token_logps(model, batch).sum(-1)  # (B, N, R) -> (B, N)


@torch.no_grad()
def frozen_logps(model: nn.Module, batch: Batch, config: Config) -> Tensor:
    """`response_logps` (B, N) without a gradient, in micro-batches, on the CPU."""
    parts = batch.split(config.micro_batch_size)
    return torch.cat([response_logps(model, part).cpu() for _, part in parts])


class PackedDecoder:
    """Next-token logits of N responses a prompt, on one key/value cache a prompt.

    The prompt fills the cache once; each step then feeds the newest tokens of a prompt's open
    responses as one row of queries: no cache is expanded, and what has ended costs nothing more.
    Slower than an expanded cache only where N x R is much longer than the prompt.
    """

    def __init__(self, model: nn.Module, batch: Batch, num_responses: int) -> None:
        self.model, self.cache = model, transformers.DynamicCache()
        self.num_responses, self.num_steps = num_responses, 0
        self.prompt_ids = batch.prompt_ids.to(model.device)
        self.prompt_mask = batch.prompt_mask.to(model.device)
        self.owner = self.step = self.prompt_ids[:, :0]  # (B, L), of the tokens in the cache

    @torch.no_grad()
    def __call__(self, tokens: Tensor | None) -> Tensor:
        """The newest tokens (B, N), -1 where a response has ended, or None at the start -> logits
        (B, N, V) in float32, which mean nothing where a response has ended."""
        ids = self.prompt_ids
        if tokens is not None:
            is_open = tokens >= 0
            fed = is_open.int().argsort(dim=1, descending=True, stable=True)  # open ones first
            fed = fed[:, : max(1, int(is_open.sum(1).max()))]  # (B, n), ended ones fill up rows
            ids = tokens.gather(1, fed).clamp(min=0)  # (B, n)
            self.owner = torch.cat([self.owner, fed], dim=1)
            self.step = torch.cat([self.step, torch.full_like(fed, self.num_steps)], dim=1)
            self.num_steps += 1
        num_new, layout = ids.shape[1], (self.prompt_mask, self.owner, self.step)
        mask, positions = packed_layout(*layout, self.model.dtype, num_new)
        with autocast(ids.device):
            logits = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions[:, -num_new:],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1 if tokens is None else num_new,
            ).logits.float()  # (B, 1 or n, V)
        if tokens is None:
            return logits.expand(-1, self.num_responses, -1)
        full = logits.new_zeros(*tokens.shape, logits.shape[-1])  # (B, N, V)
        return full.scatter(1, fed[..., None].expand_as(logits), logits)


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Invert each cumulative distribution at `uniforms` in [0, 1): (B, N, V), (B, N) -> (B, N).

    Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (B, N, V)
    target = uniforms[..., None] * cumulative[..., -1:]  # the last one is 1 up to rounding
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


@torch.no_grad()
def generate(
    next_logits: Callable[[Tensor | None], Tensor],
    uniforms: Tensor,
    eos_token_id: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, N, R), of responses drawn from what `next_logits` says.

    `next_logits` takes the newest tokens (B, N), -1 where a response has ended, or None at the
    start, and returns (B, N, V), as a `PackedDecoder` does. `uniforms` (B, N, R), drawn up front,
    hold one number for each token that may come: neither early stops nor micro-batches, padding or
    device can shift the stream. A response ends with EOS if it was drawn; one cut off at R tokens
    gets none.
    """
    ids = torch.full(uniforms.shape, eos_token_id, device=uniforms.device)
    mask = torch.zeros_like(ids)
    is_open, tokens = torch.ones_like(ids[..., 0], dtype=torch.bool), None  # (B, N)
    for t in range(uniforms.shape[-1]):
        tokens = sample_tokens(next_logits(tokens), uniforms[..., t], temperature)
        tokens = torch.where(is_open, tokens, eos_token_id)
        ids[..., t], mask[..., t] = tokens, is_open
        is_open = is_open & (tokens != eos_token_id)
        if not is_open.any():
            break
        tokens = torch.where(is_open, tokens, -1)
    return ids, mask


# ------------------------------------------------------------------ losses and the update


def margin(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio gap, chosen (column 0) minus rejected (column 1), without beta: (B, 2) -> (B,)."""
    log_ratios = logps - ref_logps
    return log_ratios[:, 0] - log_ratios[:, 1]


def dpo(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """DPO loss, Eq. 7 of arXiv:2305.18290v3: -log sigmoid(beta * margin), (B, 2) -> (B,).

    `logps` are sums over tokens, chosen first. At policy = reference the loss is log 2 = 0.6931
    for any pair: the start, not a bug, and its gradient is not zero.
    """
    return -F.logsigmoid(beta * margin(logps, ref_logps))  # Eq. 7


def ipo(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """IPO loss, Eq. 17 of arXiv:2310.12036v2: (margin - 1 / (2 beta))^2, (B, 2) -> (B,).

    SEA feeds it means over tokens (of both models), so that it is a gap a token.
    """
    return (margin(logps, ref_logps) - 1 / (2 * beta)).square()  # Eq. 17


def slic(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """SLiC as SEA has it, max(0, 1 - beta * margin), (B, 2) -> (B,): with the reference, and
    without the cross-entropy term of the original (arXiv:2305.10425). `logps` are sums."""
    return F.relu(1 - beta * margin(logps, ref_logps))


def update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: list[Batch],
    pair_loss: Callable[[Tensor, Tensor, Batch], Tensor],
    config: Config,
) -> dict[str, float]:
    """One step on the mean over all pairs of `pair_loss(logps, ref_logps, part)`; what it saw.

    A group has N >= 2 responses a prompt, chosen and rejected first, and its own `ref_logps`.
    Groups and micro-batches sum to the same gradient. UserError, before a weight moves, if a number
    is not finite. Train mode because gradient checkpointing is silently off in eval mode.
    """
    policy.train()
    seen, num_pairs = [], sum(map(len, groups))
    for part in (part for group in groups for _, part in group.split(config.micro_batch_size)):
        logps, ref_logps = response_logps(policy, part), part.ref_logps.to(policy.device)  # (b, N)
        losses = pair_loss(logps, ref_logps, part)  # (b,)
        if not losses.isfinite().all():
            prompt = part.columns["prompt"][int((~losses.isfinite()).nonzero()[0])]
            raise UserError(f"the loss is not finite on the pair of the prompt ...{prompt[-60:]!r}")
        (losses.sum() / num_pairs).backward()
        rewards = config.beta * (logps - ref_logps)[:, :2]  # implicit, of chosen and rejected
        seen.append(torch.cat([losses[:, None], rewards], dim=1).detach().cpu())
    policy.eval()
    norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    require(norm.isfinite(), "the gradient is not finite, though the loss is")
    optimizer.step()
    optimizer.zero_grad()
    means = torch.cat(seen).mean(0).tolist() + [norm.item()]
    return dict(zip(("loss", "chosen_reward", "rejected_reward", "grad_norm"), means))


# ------------------------------------------------------------------ models and prompts


def is_path(name: str, flag_name: str) -> bool:
    """True for a path (starts with . / ~, or exists), which must exist; False for a hub id."""
    exists, looks_local = os.path.exists(os.path.expanduser(name)), name.startswith((".", "/", "~"))
    require(exists or not looks_local, f"--{flag_name} {name}: nothing there, from {os.getcwd()}")
    return exists


def load_pretrained(auto_class: Any, name: str, flag_name: str, **options: Any) -> Any:
    """`from_pretrained` without dropout, remote code or missing weights; a path never asks the hub.

    (A causal model loaded as a reward model gets a random head, and only a warning says so.) A
    tokenizer without padding pads with EOS.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options |= dict(local_files_only=is_path(name, flag_name), trust_remote_code=False)
    name = os.path.expanduser(name)
    try:
        if auto_class is transformers.AutoTokenizer:
            tokenizer = auto_class.from_pretrained(name, **options)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            return tokenizer
        settings = transformers.AutoConfig.from_pretrained(name, **options)
        for key in [key for key in vars(settings) if "drop" in key]:
            setattr(settings, key, 0.0)
        options |= dict(config=settings, output_loading_info=True)
        model, info = auto_class.from_pretrained(name, **options)
    except Exception as error:  # of a dozen kinds, from a cut-off file to a page that is not there
        raise UserError(f"--{flag_name} {name} cannot be loaded: {error}") from error
    missing = ", ".join(sorted(info["missing_keys"])[:3])
    require(not missing, f"--{flag_name} {name} lacks weights that its use here needs: {missing}")
    return model.eval()


def packing_error(model: nn.Module, num_prompt_tokens: int, num_response_tokens: int) -> float:
    """Largest difference of packed and plain outputs, in standard deviations of the outputs.

    One padded prompt, two responses, at full length: positions that do not restart, ALiBi, sliding
    windows and ignored masks all show. Infinite if the model does not take packed arguments.
    """
    size, rng = model.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    prompt = torch.randint(size, (1, num_prompt_tokens), generator=rng)
    responses = torch.randint(size, (1, 2, num_response_tokens), generator=rng)
    plain_ids = torch.cat([prompt.expand(2, -1), responses[0]], dim=1).to(model.device)
    padded, mask = F.pad(prompt, (1, 0)), F.pad(torch.ones_like(prompt), (1, 0))
    with torch.no_grad():
        plain = model(plain_ids)[0][:, num_prompt_tokens:].flatten(0, 1)  # (2 R, V or D)
        try:
            inputs, _ = packed_inputs(model, padded, mask, responses, torch.ones_like(responses))
            packed = model(**inputs)[0][0, padded.shape[1] :]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return math.inf
    return ((packed - plain).abs().max() / plain.std()).item()


def load_policies(config: Config) -> tuple[Any, Any, Any]:
    """Policy, reference and tokenizer. Both models are float32 and run alike: in another precision,
    or even with requires_grad off (which picks other kernels), log-ratios would not start at 0.
    The reference stays as it is because nothing steps it."""
    tokenizers, models = [], []
    longest = config.max_prompt_length + config.max_new_tokens
    for flag_name, name in (("model", config.model), ("ref_model", config.ref_model)):
        tokenizer = load_pretrained(transformers.AutoTokenizer, name, flag_name)
        auto_class = transformers.AutoModelForCausalLM
        model = load_pretrained(auto_class, name, flag_name, dtype=torch.float32)
        context = getattr(model.config, "max_position_embeddings", 0)
        where = f"--{flag_name} {name}"
        require(tokenizer.eos_token_id is not None, f"{where}: its tokenizer has no EOS token")
        is_short = 0 < context < longest
        sizes = f"--max_prompt_length + --max_new_tokens = {longest}"
        require(not is_short, f"{where} reads {context} tokens, fewer than {sizes}")
        error = packing_error(model, config.max_prompt_length, config.max_new_tokens)
        require(error < 1e-3, f"{where} misreads packed rows, by {error:.2g} standard deviations")
        tokenizers.append(tokenizer)
        models.append(model.to(config.device))
    policy, ref_model = models
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    is_same = vocabularies[0] == vocabularies[1]
    is_same &= policy.config.vocab_size == ref_model.config.vocab_size
    require(is_same, f"--ref_model {config.ref_model} has another vocabulary than --model")
    has_template = tokenizers[0].chat_template or config.chat_template != "on"
    require(has_template, f"--chat_template on, but --model {config.model} has none")
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    return policy, ref_model, tokenizers[0]


def load_prompts(config: Config, tokenizer: Any) -> tuple[Batch, Batch]:
    """Training and held-out prompts: the test split, else validation, else the last rows."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    name, options = os.path.expanduser(config.dataset), {}
    if is_path(config.dataset, "dataset") and os.path.isfile(name):
        name, options = Path(name).suffix[1:].replace("jsonl", "json"), {"data_files": name}
    try:
        splits = dict(datasets.load_dataset(name, **options))
        train = splits.pop("train", None) or splits.popitem()[1]
        held_out = splits.get("test") or splits.get("validation")
        if not held_out:
            size = len(train) - min(config.eval_prompts, len(train) // 2)
            held_out, train = train.select(range(size, len(train))), train.select(range(size))
        train, held_out = train[:], held_out[:]
    except Exception as error:  # of a dozen kinds, as above
        raise UserError(f"--dataset {config.dataset} cannot be read: {error}") from error
    held_out = tokenise_prompts(held_out, config, tokenizer)
    held_out = held_out.select(torch.arange(min(config.eval_prompts, len(held_out))))
    return tokenise_prompts(train, config, tokenizer), held_out


def tokenise_prompts(columns: dict[str, list], config: Config, tokenizer: Any) -> Batch:
    """Rows of a data set as a `Batch` without responses; rows whose prompt is too long are dropped,
    with a count. The columns are also named "prompt" and, if there is one, "reference"."""
    where, wanted = f"--dataset {config.dataset}", config.prompt_column
    require(wanted in columns, f"{where} has no --prompt_column {wanted}, but {', '.join(columns)}")
    columns["prompt"] = prompts = columns[wanted]
    if config.reference_column in columns:
        columns["reference"] = columns[config.reference_column]
    for name in {"prompt", "reference"} & columns.keys():
        bad = [i for i, text in enumerate(columns[name]) if not (text and str(text).strip())]
        require(not bad, f"{where}: the {name} of row {bad[:1]} is empty")
    is_chat = config.chat_template != "off" and bool(tokenizer.chat_template)
    if is_chat:
        chats = [[dict(role="user", content=prompt)] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompts, add_special_tokens=not is_chat)["input_ids"] if prompts else []
    limit = config.max_prompt_length
    kept = [i for i, tokens in enumerate(ids) if len(tokens) <= limit]
    require(kept, f"{where} has no prompt of at most --max_prompt_length {limit} tokens")
    if len(kept) < len(ids):
        print(f"{len(ids) - len(kept)} of {len(ids)} prompts are too long and were dropped")
    columns = {name: [values[i] for i in kept] for name, values in columns.items()}
    ids = {"input_ids": [ids[i] for i in kept]}
    padded = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    none, texts = torch.zeros(len(kept), 0, 0, dtype=torch.long), [[] for _ in kept]
    return Batch(columns, padded["input_ids"], padded["attention_mask"], texts, none, none)


# ------------------------------------------------------------------ the oracle


def plain_text(prompt: str, response: str) -> str:
    """What a plain reward model reads: the prompt, a space, the stripped response."""
    return f"{prompt} {response.strip()}" if response.strip() else prompt


class Oracle:
    """The annotator: a reward model of one label. Labels are counted in `queries`, scores are not.

    Anything else can stand in (a rule, a judge, a student): override `prefer`, the answer to a
    duel, or `score`, which rankings and metrics read.
    """

    def __init__(self, config: Config) -> None:
        name, self.config, self.queries = config.reward_model, config, 0
        self.tokenizer = load_pretrained(transformers.AutoTokenizer, name, "reward_model")
        auto_class = transformers.AutoModelForSequenceClassification
        dtype = torch.bfloat16 if config.device.startswith("cuda") else torch.float32
        self.model = load_pretrained(auto_class, name, "reward_model", dtype=dtype)
        require(self.model.config.num_labels == 1, f"--reward_model {name} has several labels")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.to(config.device)

    @torch.no_grad()
    def score(self, prompts: list[str], responses: list[list[str]]) -> Tensor:
        """Rewards (B, N) of texts, by the model's chat template if it has one."""
        pairs = [(prompt, y) for prompt, row in zip(prompts, responses) for y in row]
        is_chat = self.config.chat_template != "off" and bool(self.tokenizer.chat_template)
        texts = [plain_text(*pair) for pair in pairs]
        if is_chat:
            roles = ("user", "assistant")
            chats = [[dict(role=r, content=text) for r, text in zip(roles, p)] for p in pairs]
            texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        rewards = torch.empty(len(texts))
        context = getattr(self.model.config, "max_position_embeddings", math.inf)
        options = dict(padding=True, padding_side="right", add_special_tokens=not is_chat)
        for rows in torch.tensor([len(text) for text in texts]).argsort(stable=True).split(64):
            batch = self.tokenizer([texts[i] for i in rows], return_tensors="pt", **options)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            length = ids.shape[1]
            require(length <= context, f"the oracle reads {context} tokens, not {length}")
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            rewards[rows] = self.model(ids, attention_mask=mask).logits[:, 0].float().cpu()
        require(rewards.isfinite().all(), "the oracle's reward is not finite")
        return rewards.view(len(prompts), -1)

    def prefer(self, prompts: list[str], duels: list[list[str]], rewards: Tensor) -> Tensor:
        """Is the first of two responses better, (B,)? Bradley-Terry: P = sigmoid(r1 - r2); with
        --labels argmax the larger reward wins, ties by a coin. `rewards` (B, 2) are `score`'s."""
        gap = rewards[:, 0] - rewards[:, 1]
        probability = gap.sigmoid() if self.config.labels == "bernoulli" else (gap.sign() + 1) / 2
        rng = generator(self.config.seed, "labels", self.queries)
        return torch.rand(len(gap), generator=rng) < probability

    def label(self, prompts: list[str], duels: list[list[str]]) -> tuple[Tensor, Tensor]:
        """`prefer`, counted, (B,), and the rewards of both responses (B, 2), which metrics need."""
        rewards = self.score(prompts, duels)
        is_first = torch.as_tensor(self.prefer(prompts, duels, rewards)).bool()
        self.queries += len(prompts)
        return is_first, rewards


# ------------------------------------------------------------------ metrics


def gold_score(response: str, facts: list[str], wrong_facts: list[str]) -> float:
    """Facts that the response states, minus wrong ones, minus 0.1 a word: the quality behind the
    labels that the oracle was trained on. Case and punctuation do not count."""

    def plain(text: str) -> str:
        return " " + " ".join(re.findall(r"\w+", text.lower())) + " "

    text = plain(response)
    num_right, num_wrong = (sum(plain(f) in text for f in kind) for kind in (facts, wrong_facts))
    return num_right - num_wrong - 0.1 * len(text.split())


def win_metrics(rewards: Tensor, baseline: Tensor) -> dict[str, float]:
    """Share of rewards above their baseline (ties one half), its standard error, and the mean of
    sigmoid(reward - baseline), Eq. 1 of SEA; both (n,)."""
    wins = (rewards > baseline).double() + (rewards == baseline).double() / 2
    return {
        "win_rate": wins.mean().item(),
        "win_rate_stderr": wins.std(correction=0).item() / math.sqrt(len(wins)),
        "win_probability": (rewards - baseline).double().sigmoid().mean().item(),
    }


# ------------------------------------------------------------------ a run and its folder


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write under a temporary name and rename: never half a file or folder. A full disk, which
    torch, safetensors and Python report in three ways, becomes one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written (is the disk full?): {error}") from error


class Run:
    """A training run: models, prompts, oracle, counts, and the output folder.

    A round's randomness depends on the seed and the round's number alone, so a checkpoint holds
    what `parts` return as state_dict, the counts, and the length of each JSONL file, no more.
    """

    jsonl = ("metrics.jsonl", "preferences.jsonl", "samples.jsonl", "timing.jsonl")
    may_change = ("num_queries", "eval_every", "device", "micro_batch_size", "debug", "output_dir",
                  "resume", "overwrite")  # fmt: skip
    counted = ("rounds", "candidates", "decoder_streams", "gradient_steps", "synthetic_pairs")
    table = ("win_rate", "win_rate_stderr", "reward", "kl", "objective", "gold", "length",
             "online_win_rate")  # fmt: skip

    def __init__(self, config: Config, oracle: Oracle | None = None) -> None:
        self.config, self.folder = config, Path(config.output_dir).expanduser()
        self.check_folder()
        self.policy, self.ref_model, self.tokenizer = load_policies(config)
        self.prompts, self.eval_prompts = load_prompts(config, self.tokenizer)
        self.oracle = oracle or Oracle(config)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0,
            fused=config.device.startswith("cuda"),
        )  # fmt: skip
        self.parts = {"policy": self.policy, "optimizer": self.optimizer}  # a script adds its own
        self.counts, self.means = Counter(), {}
        self.is_milestone = self.is_stopping = False
        self.seconds, self.clock = Counter(), time.perf_counter()
        columns = self.eval_prompts.columns
        self.compared_with = "reference" if "reference" in columns else "initial policy"
        self.baseline = [[text] for text in columns.get("reference", [])]
        self.baseline = self.baseline or self.eval_responses(1, "baseline").responses
        self.baseline_rewards = self.oracle.score(columns["prompt"], self.baseline)[:, 0]

    def check_folder(self) -> None:
        """Refuse a folder that holds a run, unless told to, and a resume with other flags."""
        config, folder, flags = self.config, self.folder, dataclasses.asdict(self.config)
        require(not folder.exists() or folder.is_dir(), f"--output_dir {folder} is a file")
        is_used = (folder / "config.json").exists()
        if config.resume:
            require(is_used, f"--resume: {folder} holds no run")
            saved = json.loads((folder / "config.json").read_text())["flags"]
            changed = {name for name in flags if saved.get(name) != flags[name]}
            changed = ", ".join(f"--{name}" for name in sorted(changed.difference(self.may_change)))
            require(not changed, f"--resume: {changed} differ from the run in {folder}")
        is_free = config.resume or config.overwrite or not is_used
        require(is_free, f"{folder} holds a run: --resume, --overwrite or another --output_dir?")

    def start(self) -> None:
        """Continue from the checkpoint, if there is one to be resumed; write config.json; cut the
        JSONL files back to where they were."""
        config, path = self.config, self.folder / "checkpoint.pt"
        if config.overwrite:
            path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "model", ignore_errors=True)
        state = {"counts": {}, "means": {}, "sizes": {}}
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                raise UserError(f"{path} is damaged: start again with --overwrite") from error
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        self.counts.update(state["counts"])
        self.means.update(state["means"])
        self.oracle.queries = done = self.counts["queries"]
        wrong = f"--num_queries {config.num_queries}: {self.folder} already has {done} labels"
        require(config.num_queries >= done, wrong)
        self.folder.mkdir(parents=True, exist_ok=True)
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        versions = {name: version(name) for name in ("torch", "transformers", "datasets", "tqdm")}
        about = dict(flags=dataclasses.asdict(config), versions=versions, git_commit=commit)
        about["device"] = config.device
        with writing(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1))
        for name in self.jsonl:
            with open(self.folder / name, "ab") as file:
                file.truncate(state["sizes"].get(name, 0))

    def save(self) -> None:
        """Write checkpoint.pt: the parts, the counts, the lengths of the JSONL files."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        sizes = {name: (self.folder / name).stat().st_size for name in self.jsonl}
        state |= dict(counts=dict(self.counts), means=self.means, sizes=sizes)
        with writing(self.folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def write(self, name: str, rows: list[dict]) -> None:
        """Append rows to a JSONL file. What a crash leaves half-written, `start` cuts off."""
        try:
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(lines)
        except (OSError, ValueError) as error:  # a ValueError: a number that is not finite
            raise UserError(f"{self.folder / name} cannot be written: {error}") from error

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under `phase`, for timing.jsonl."""
        if self.config.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - self.clock
        self.clock = time.perf_counter()

    def record(self, weight: int, values: dict[str, float]) -> None:
        """Add a round's values to the weighted means that the next row of metrics shows."""
        for name, value in values.items() if weight else ():
            total, weights = self.means.get(name, (0.0, 0))
            self.means[name] = (total + weight * value, weights + weight)

    def next_prompts(self, count: int) -> Batch:
        """The next prompts of the training set, which is reshuffled each epoch."""
        size, start, seed = len(self.prompts), self.counts["prompts"], self.config.seed
        epochs = range(start // size, (start + count - 1) // size + 1)
        order = [torch.randperm(size, generator=generator(seed, "epoch", e)) for e in epochs]
        self.counts["prompts"] += count
        return self.prompts.select(torch.cat(order)[start % size :][:count])

    def respond(
        self, decoder: Callable, prompts: Batch, num: int, rng: torch.Generator, temperature: float
    ) -> Batch:
        """The prompts with `num` sampled responses each, as tokens and text.

        `decoder(part)` makes the `next_logits` of a micro-batch, see `generate`.
        """
        uniforms = torch.rand(len(prompts), num, self.config.max_new_tokens, generator=rng)
        eos, sampled = self.tokenizer.eos_token_id, []
        for rows, part in prompts.split(self.config.micro_batch_size):
            numbers = uniforms[rows].to(self.config.device)
            sampled.append(generate(decoder(part), numbers, eos, temperature))
        ids, mask = (torch.cat(parts).cpu() for parts in zip(*sampled))  # (B, N, R)
        lengths = mask.sum(-1).flatten().tolist()
        tokens = [row[:length] for row, length in zip(ids.flatten(0, 1).tolist(), lengths)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        texts = [texts[start : start + num] for start in range(0, len(texts), num)]
        full = dataclasses.replace(prompts, responses=texts, response_ids=ids, response_mask=mask)
        return full.select(torch.arange(len(full)))

    def decoder(self, model: nn.Module, num_responses: int, part: Batch) -> PackedDecoder:
        """A `PackedDecoder` whose streams are counted: a forward pass a token and response."""
        self.counts["decoder_streams"] += num_responses * len(part)
        return PackedDecoder(model, part, num_responses)

    def eval_responses(self, num: int, name: str, model: nn.Module | None = None) -> Batch:
        """Samples at temperature 1 (of the policy) for the held-out prompts, by one stream."""
        rng = generator(self.config.seed, name)
        decoder = partial(PackedDecoder, model or self.policy, num_responses=num)
        return self.respond(decoder, self.eval_prompts, num, rng, temperature=1.0)

    def ask(
        self, batch: Batch, first: Tensor, second: Tensor, is_asked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send the duels (B,), (B,) of the rows `is_asked` to the oracle; elsewhere the first wins.

        Duels of equal texts are not sent, nor any beyond the budget. Returns the rows that were
        labelled (n,), and the chosen and the rejected candidate of each row (B,), which are equal
        where there is nothing to train on. Logs online_win_rate and online_win_probability: of the
        labelled responses, both of a duel, against the data set's reference, if it has one.
        """
        trios = zip(batch.responses, first, second)
        duels = [[texts[a].strip(), texts[b].strip()] for texts, a, b in trios]
        differs = torch.tensor([a != b for a, b in duels])
        is_sent = is_asked & differs
        is_sent &= is_sent.cumsum(0) <= self.config.num_queries - self.oracle.queries
        sent, is_dropped = is_sent.nonzero()[:, 0], ~differs | (is_asked & ~is_sent)
        chosen, rejected = first.clone(), torch.where(is_dropped, first, second)
        if len(sent):
            asked = batch.select(sent).columns
            is_first, rewards = self.oracle.label(asked["prompt"], [duels[i] for i in sent])
            chosen[sent] = torch.where(is_first, first[sent], second[sent])
            rejected[sent] = torch.where(is_first, second[sent], first[sent])
            if "reference" in asked:
                references = [[text] for text in asked["reference"]]
                baseline = self.oracle.score(asked["prompt"], references).expand(-1, 2)  # (n, 2)
                online = win_metrics(rewards.flatten(), baseline.flatten())
                del online["win_rate_stderr"]
                self.record(len(sent), {f"online_{name}": value for name, value in online.items()})
        self.lap("label")
        return sent, chosen, rejected

    def rank(
        self, batch: Batch, cost: Callable[[int], int], is_noisy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Best and worst distinct response to each prompt by the oracle's scores, (B,), (B,), which
        are equal where a prompt has one; and which responses were ranked, (B, N).

        `cost(n)` labels are counted for ranking n; when fewer are left, the prompt's last responses
        are not ranked. Noise: standard Gumbel on the scores with --labels bernoulli, a
        Plackett-Luce ranking, whose pairs have exactly Bradley-Terry's probabilities.
        """
        is_ranked, budget = distinct(batch.responses), self.config.num_queries - self.oracle.queries
        for row in is_ranked:
            while cost(int(row.sum())) > budget:
                row[row.nonzero()[-1]] = False
            budget -= cost(int(row.sum()))
        texts = [[text.strip() for text in row] for row in batch.responses]
        rewards = self.oracle.score(batch.columns["prompt"], texts)  # (B, N)
        if is_noisy and self.config.labels == "bernoulli":
            rng = generator(self.config.seed, "labels", self.oracle.queries)
            uniforms = torch.rand(rewards.shape, generator=rng, dtype=torch.float64)
            rewards = rewards - (-uniforms.log()).log()
        self.oracle.queries = self.config.num_queries - budget
        best, worst = widest_pair(rewards, is_ranked)
        self.lap("label")
        return best, worst, is_ranked

    def keep(
        self, batch: Batch, chosen: Tensor, rejected: Tensor, is_model: Tensor | None = None
    ) -> Tensor:
        """Write the pairs to preferences.jsonl, where chosen and rejected differ; their rows."""
        kept = (chosen != rejected).nonzero()[:, 0]
        is_model = torch.zeros(len(batch)) if is_model is None else is_model
        sources = ["model" if model else "oracle" for model in is_model[kept]]
        pairs = [
            dict(
                round=self.counts["rounds"],
                prompt=batch.columns["prompt"][row],
                chosen=batch.responses[row][chosen[row]],
                rejected=batch.responses[row][rejected[row]],
                source=source,
            )
            for row, source in zip(kept, sources)
        ]
        self.write("preferences.jsonl", pairs)
        self.counts["synthetic_pairs"] += sources.count("model")
        return kept

    def iteration(self, num_iterations: int) -> int:
        """Which iteration this is, from 0, each with an equal share of the labels; never one before
        `counts["iteration"]`, the number of those begun, should --num_queries be raised later."""
        now = self.oracle.queries * num_iterations // self.config.num_queries
        return max(self.counts["iteration"] - 1, min(now, num_iterations - 1))

    def restart_optimizer(self) -> None:
        """For a new iteration: a fresh optimiser state and a new warm-up."""
        self.optimizer.state.clear()
        self.counts["steps_before"] = self.counts["gradient_steps"]

    def learn(
        self, groups: list[Batch], pair_loss: Callable, rate: float = 1.0
    ) -> dict[str, float]:
        """One step of the policy on the groups of pairs, see `update`, at `rate` times
        --learning_rate after the warm-up. Returns what it saw, if there was a step."""
        config, groups, seen = self.config, [group for group in groups if len(group)], {}
        if config.learning_rate and groups:
            self.counts["gradient_steps"] += 1
            num_steps = self.counts["gradient_steps"] - self.counts["steps_before"]
            warmth = min(1.0, num_steps / (config.warmup_steps + 1))
            self.optimizer.param_groups[0]["lr"] = config.learning_rate * rate * warmth
            for group in groups:
                if group.ref_logps is None:  # computed once and for all
                    group.ref_logps = frozen_logps(self.ref_model, group, config)  # (b, N)
            try:
                seen = update(self.policy, self.optimizer, groups, pair_loss, config)
            except UserError as error:
                raise UserError(f"round {self.counts['rounds']}: {error}") from error
            self.record(sum(map(len, groups)), seen)
        self.lap("update")
        return seen

    def evaluate(self, more_metrics: Callable | None = None) -> tuple[dict[str, Any], list[dict]]:
        """Metrics of one response to each held-out prompt, and the responses. `more_metrics` gets
        the responses and their log-probabilities under the policy, (B, 1)."""
        batch = self.eval_responses(1, "evaluation")
        columns, models = batch.columns, (self.policy, self.ref_model)
        rewards = self.oracle.score(columns["prompt"], batch.responses)[:, 0]
        logps, ref_logps = (frozen_logps(model, batch, self.config) for model in models)
        reward, kl = rewards.double().mean().item(), (logps - ref_logps).double().mean().item()
        metrics = win_metrics(rewards, self.baseline_rewards)
        metrics["compared_with"] = self.compared_with
        metrics |= {"reward": reward, "kl": kl, "objective": reward - self.config.beta * kl}
        metrics["length"] = batch.response_mask.sum(-1).double().mean().item()
        rows = zip(columns["prompt"], self.baseline, batch.responses, rewards.tolist())
        samples = [dict(prompt=x, baseline=z[0], response=y[0], reward=r) for x, z, y, r in rows]
        if {"facts", "wrong_facts"} <= columns.keys():
            for row, right, wrong in zip(samples, columns["facts"], columns["wrong_facts"]):
                row["gold"] = gold_score(row["response"], right, wrong)
            metrics["gold"] = sum(row["gold"] for row in samples) / len(samples)
        return metrics | (more_metrics(batch, logps) if more_metrics else {}), samples

    def log(self, more_metrics: Callable | None) -> None:
        """Evaluate; write metrics, samples and timing; print a row of the table and two samples."""
        metrics, samples = self.evaluate(more_metrics)
        self.lap("evaluation")
        means = {name: total / weight for name, (total, weight) in sorted(self.means.items())}
        queries = {"queries": self.oracle.queries}
        counts = {name: self.counts[name] for name in self.counted}
        row = queries | counts | metrics | means
        self.write("metrics.jsonl", [row])
        self.write("samples.jsonl", [queries | sample for sample in samples])
        self.write("timing.jsonl", [queries | {k: round(v, 3) for k, v in self.seconds.items()}])
        if not self.counts["rows"]:
            for sample in samples[:2]:
                tqdm.write(f"{sample['prompt']}\n  {self.compared_with}: {sample['baseline']}\n")
            tqdm.write("  ".join(("queries", *(f"{name:>6}" for name in self.table))))
        cells = [row.get(name, "") for name in self.table]
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        cells = [f"{cell:>{max(len(name), 6)}}" for cell, name in zip(cells, self.table)]
        tqdm.write("  ".join((f"{row['queries']:7d}", *cells)))
        for sample in samples[:2]:
            tqdm.write(f"  [{sample['reward']:5.2f}] {sample['response'].strip()}")
        self.counts["rows"] += 1
        self.means.clear()

    def rounds(self, more_metrics: Callable | None = None) -> Iterator[int]:
        """Number the rounds until the budget of labels is spent. Between them: evaluate when
        --eval_every more labels have been trained on, and where the script sets `is_milestone`,
        log, save; at the end write the model. `counts["untrained"]`: labels kept for later."""
        self.start()
        config, counts, oracle = self.config, self.counts, self.oracle
        bar = tqdm(total=config.num_queries, initial=oracle.queries, unit="label", mininterval=1)
        is_main_thread = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGINT, self.interrupt) if is_main_thread else None
        try:
            if not counts["rows"]:
                self.log(more_metrics)
            while oracle.queries < config.num_queries:
                before = oracle.queries
                yield counts["rounds"]
                counts["rounds"] += 1
                counts["queries"] = oracle.queries
                counts["idle_rounds"] = 0 if oracle.queries > before else counts["idle_rounds"] + 1
                bar.update(oracle.queries - bar.n)
                is_last, is_idle = oracle.queries >= config.num_queries, counts["idle_rounds"] >= 20
                trained = oracle.queries - counts["untrained"]
                is_step = trained // config.eval_every > before // config.eval_every
                if is_last or is_step or self.is_milestone:
                    self.log(more_metrics)
                self.is_milestone = False
                is_due = counts["rounds"] % config.checkpoint_every == 0
                if is_due or is_last or is_idle or self.is_stopping:
                    self.save()
                require(not is_idle, "20 rounds in a row brought no label: stopped and saved")
                if self.is_stopping:
                    bar.write("stopped and saved: the same command with --resume continues")
                    raise KeyboardInterrupt
        finally:
            bar.close()
            if is_main_thread:
                signal.signal(signal.SIGINT, previous)
        self.finish()

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C ends the run after this round; a second one ends it at once."""
        if self.is_stopping:
            raise KeyboardInterrupt
        self.is_stopping = True
        tqdm.write("finishing the round and saving (Ctrl-C again: stop at once)")

    def finish(self) -> None:
        """Write model/ and say where everything is."""
        with writing(self.folder / "model") as temporary:
            self.policy.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
        names = "model/, metrics.jsonl, preferences.jsonl and samples.jsonl"
        print(f"done, {self.oracle.queries} labels: {names} are in {self.folder}")
