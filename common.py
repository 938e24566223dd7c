"""The mathematics that SEA, SELM and PILAF share: packed rows, sampling, log-probabilities, losses.

Everything is B prompts with N responses each. A prompt and its responses are computed as one
*packed row*, ``prompt | y_1 | ... | y_N``: a mask lets each response see the prompt and itself
only, and positions restart after the prompt, so the prompt is computed and kept once.

Shapes: P prompt tokens, R response tokens, L response tokens of a packed row, S = P + L, V
vocabulary. Prompts are padded on the left, responses on the right. A mask is 1 on every real token,
a response's first and EOS too; it is never derived from ids, since the padding may be EOS as well.
"""

import inspect
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

# Linux: idle threads soon sleep and leave a browser its core; OpenMP reads this as torch is loaded.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "3000"
    import torch

    del os.environ["GOMP_SPINCOUNT"]

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, distributed, nn


class UserError(Exception):
    """What the user can mend, in one sentence."""


def require(condition: Any, message: str) -> None:
    if not condition:
        raise UserError(message)


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """The CPU random stream of one purpose and, for instance, one round: no use can shift another,
    and a run that is resumed in round 7 draws what it would have drawn."""
    name = random.Random(repr((seed, purpose, *numbers)))
    return torch.Generator().manual_seed(name.getrandbits(63))


def ranks() -> tuple[int, int]:
    """Number of this process and how many there are under torchrun; (0, 1) without it."""
    is_on = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if is_on else (0, 1)


def in_parts(function: Callable[[Tensor], Any], count: int, size: int) -> Any:
    """Concatenate `function(rows)`, a tensor or a tuple of tensors with an entry a row, on the CPU,
    over micro-batches of at most `size` of `count` rows, which bounds the memory. Of n processes
    each computes every n-th micro-batch and receives the results of the others."""
    rank, num_ranks = ranks()
    parts = torch.arange(count).split(min(size, max(1, -(-count // num_ranks))))
    everyone = [None] * num_ranks
    try:
        results = [function(rows) for rows in parts[rank::num_ranks]]
    except Exception:
        if num_ranks > 1:  # the others wait for a process that fails
            distributed.all_gather_object(everyone, None)
        raise
    if num_ranks > 1:
        distributed.all_gather_object(everyone, results)
        require(None not in everyone, "another process failed")
        results = [everyone[n % num_ranks][n // num_ranks] for n in range(len(parts))]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(column) for column in zip(*results))
    return torch.cat(results)


# ---------------- B prompts x N responses


@dataclass
class Batch:
    """B prompts with N responses each (N = 0 before they are sampled), on the CPU. P and R are the
    same throughout a run: batches are joined and indexed like any tensor."""

    columns: dict[str, list]  # B values each; "prompt" is the text that the oracle reads
    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P)
    responses: list[list[str]]  # B lists of N texts
    response_ids: Tensor  # (B, N, R)
    response_mask: Tensor  # (B, N, R)
    ref_logps: Tensor | None = None  # (B, N), computed once and kept with the pair

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: Tensor, picks: Tensor | None = None) -> "Batch":
        """The prompts `rows` (b,), each with its responses `picks` (b, n), or all of them."""
        if picks is None:
            picks = torch.arange(self.response_ids.shape[1]).expand(len(rows), -1)
        chosen = (rows[:, None], picks)
        return Batch(
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
            self.prompt_ids[rows],
            self.prompt_mask[rows],
            [[self.responses[row][n] for n in pick] for row, pick in zip(rows, picks)],
            self.response_ids[chosen],
            self.response_mask[chosen],
            None if self.ref_logps is None else self.ref_logps[chosen],
        )


def stacked(parts: list[Batch]) -> Batch:
    """The prompts of all parts, one after another, each with N responses of known `ref_logps`."""
    return Batch(
        {name: sum((part.columns[name] for part in parts), []) for name in parts[0].columns},
        torch.cat([part.prompt_ids for part in parts]),
        torch.cat([part.prompt_mask for part in parts]),
        sum((part.responses for part in parts), []),
        torch.cat([part.response_ids for part in parts]),
        torch.cat([part.response_mask for part in parts]),
        torch.cat([part.ref_logps for part in parts]),
    )


def beside(parts: list[Batch]) -> Batch:
    """The same prompts, with the responses of all parts side by side."""
    return replace(
        parts[0],
        responses=[sum(rows, []) for rows in zip(*(part.responses for part in parts))],
        response_ids=torch.cat([part.response_ids for part in parts], dim=1),
        response_mask=torch.cat([part.response_mask for part in parts], dim=1),
        ref_logps=None,
    )


def distinct(responses: list[list[str]]) -> Tensor:
    """True, (B, N), where no earlier response to the same prompt reads the same. Of two responses
    column 1 tells if they are a pair that can be compared and trained on."""
    texts = [[text.strip() for text in row] for row in responses]
    return torch.tensor([[row.index(text) == n for n, text in enumerate(row)] for row in texts])


def widest_pair(rewards: Tensor, is_distinct: Tensor) -> tuple[Tensor, Tensor]:
    """The best and the worst distinct response to each prompt, (B, N) -> (B,), (B,); they differ
    where a prompt has two distinct responses, even if all rewards are equal."""
    best = rewards.masked_fill(~is_distinct, -math.inf).argmax(-1)
    others = is_distinct.scatter(1, best[:, None], False)
    return best, rewards.masked_fill(~others, math.inf).argmin(-1)


# ---------------- the packed row


def pack(values: Tensor, mask: Tensor) -> Tensor:
    """Push real values together, row by row, (B, ...) -> (B, L), then zeros. `mask`, of the
    same shape, is 1 on real values; L is the largest number of them in a row."""
    is_filled = packed_mask(mask)
    return values.new_zeros(is_filled.shape).masked_scatter(is_filled, values[mask.bool()])


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `pack`: (B, L) -> the shape of `mask`, zeros where it is 0. Further
    dimensions, as in (B, L, V), stay behind."""
    values = packed.new_zeros(*mask.shape, *packed.shape[2:])
    values[mask.bool()] = packed[packed_mask(mask)]
    return values


def packed_mask(mask: Tensor) -> Tensor:
    """True, (B, L), where a packed row holds a real value."""
    lengths = mask.flatten(1).sum(1)  # (B,)
    return torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]


PROMPT, FIRST_RESPONSE = 1, 2  # owners of a token: 0 padding, 1 the prompt, 2 + n response n


def layout(prompt_mask: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Owner and position of each token of packed rows, (B, P), (B, N, R) -> (B, S), (B, S).
    Positions count real tokens and start again after the prompt in every response."""
    responses = torch.arange(mask.shape[1], device=mask.device)[:, None].expand_as(mask)
    steps = torch.arange(mask.shape[2], device=mask.device).expand_as(mask)
    owner = torch.cat([PROMPT * prompt_mask, pack(FIRST_RESPONSE + responses, mask)], dim=1)
    prompt_position = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # (B, P)
    position = prompt_mask.sum(1, keepdim=True) + pack(steps, mask)  # (B, L)
    return owner, torch.cat([prompt_position, position], dim=1)


def attention_mask(owner: Tensor, position: Tensor, num_queries: int, dtype: torch.dtype) -> Tensor:
    """Who sees whom in packed rows: (B, S), (B, S) -> (B, 1, Q, S), 0 or hugely negative.

    A token sees the prompt and its own response, in both up to its own position. Nobody sees
    padding but padding, which sees itself, so that no softmax is empty. Q is the last
    `num_queries` tokens: while decoding, the others are in the cache already.
    """
    whose, where = owner[:, None, :], position[:, None, :]  # of the keys, (B, 1, S)
    mine, here = owner[:, -num_queries:, None], position[:, -num_queries:, None]  # (B, Q, 1)
    is_visible = ((whose == PROMPT) | (whose == mine)) & (where <= here)  # (B, Q, S)
    # -inf could make NaN of a sum, and float32's lowest number would be -inf in bfloat16.
    return torch.where(is_visible, 0.0, -1e30).to(dtype)[:, None]


def packed_row(
    model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor
) -> dict[str, Any]:
    """Arguments of one forward pass over ``prompt | y_1 | ... | y_N``, real tokens only: (B, P),
    (B, P), (B, N, R), (B, N, R) -> input ids and positions (B, S), mask (B, 1, S, S)."""
    is_used = prompt_mask.any(0)  # (P,): columns that are padding in every row go
    prompt_ids, prompt_mask = prompt_ids[:, is_used], prompt_mask[:, is_used]
    owner, position = (tensor.to(model.device) for tensor in layout(prompt_mask, mask))
    return {
        "input_ids": torch.cat([prompt_ids, pack(ids, mask)], dim=1).to(model.device),
        "attention_mask": attention_mask(owner, position, owner.shape[1], model.dtype),
        "position_ids": position,
        "use_cache": False,
    }


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU over weights that stay float32: at a learning rate of 5e-7 a
    bfloat16 weight would never move, since its spacing is far wider than the update."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---------------- log-probabilities


def token_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y_t | x, y_<t) of every response token, (B, N, R) in float32, 0 at padding.

    Each response is read behind a copy of the prompt's last token, so that y_1 is predicted like
    any other token. ValueError if a response has no token.
    """
    if not batch.response_mask.any(-1).all():
        raise ValueError("a response without a token: even an empty text has its EOS")
    mask = batch.response_mask.to(model.device)
    last = batch.prompt_ids[:, None, -1:].expand(-1, mask.shape[1], -1)  # x_P, (B, N, 1)
    read = torch.cat([last, batch.response_ids[..., :-1]], dim=-1)  # x_P y_1 ... y_{R-1}
    prompt = batch.prompt_ids[:, :-1], batch.prompt_mask[:, :-1]  # x_1 ... x_{P-1}
    row = packed_row(model, *prompt, read, batch.response_mask)

    targets = pack(batch.response_ids.to(model.device), mask)  # y_1 ... y_R of each, (B, L)
    with autocast(model.device):  # the LM head reads no prompt token
        logits = model(**row, logits_to_keep=targets.shape[1]).logits.float()  # (B, L, V)
    logps = logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(-1)  # (B, L)
    return unpack(logps, mask)  # (B, N, R)


def response_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y | x), (B, N): the sum over the response's tokens, EOS too, never the prompt's."""
    return token_logps(model, batch).sum(-1)  # (B, N, R) -> (B, N)


@torch.no_grad()
def frozen_logps(model: nn.Module, batch: Batch, config: Any) -> Tensor:
    """`response_logps` (B, N) without a gradient, in micro-batches, on the CPU."""
    if not len(batch):
        return torch.zeros(batch.response_mask.shape[:2])
    size = config.micro_batch_size
    return in_parts(lambda rows: response_logps(model, batch.select(rows)).cpu(), len(batch), size)


# ---------------- generation


class Cache(transformers.DynamicCache):
    """Keys and values; bfloat16 under autocast, which would keep float32."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled(keys.device.type):
            keys, values = keys.bfloat16(), values.bfloat16()
        return super().update(keys, values, *args, **options)


class PackedDecoder:
    """Next-token logits of N responses a prompt. Each step feeds the newest tokens of its open
    responses as one row of queries; the first puts the prompt before them, and a cache keeps it."""

    def __init__(self, model: nn.Module, prompts: Batch) -> None:
        self.model, self.num_steps = model, 0
        takes = inspect.signature(model.forward).parameters  # transformers 5.24 renamed it
        name = "cache" if "cache" in takes else "past_key_values"
        self.options = {name: Cache(), "use_cache": True}
        # The prompt's last token is left out: it is the first that every response reads.
        ids, mask = prompts.prompt_ids[:, :-1], prompts.prompt_mask[:, :-1]
        self.unread, mask = (tensor[:, mask.any(0)].to(model.device) for tensor in (ids, mask))
        self.prompt_length = mask.sum(1, keepdim=True)  # (B, 1)
        self.owner, self.position = layout(mask, mask[:, None, :0])  # (B, S), of the row so far

    def __call__(self, tokens: Tensor, is_open: Tensor) -> Tensor:
        """The newest token of each response (B, N) and which responses go on (B, N) -> logits
        (B, N, V) of the next, in float32; zeros where a response has ended."""
        responses = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        owner = pack(FIRST_RESPONSE + responses, is_open)  # (B, n)
        position = (self.prompt_length + self.num_steps).expand_as(owner)
        self.owner = torch.cat([self.owner, owner], dim=1)
        self.position = torch.cat([self.position, position], dim=1)
        ids = torch.cat([self.unread, pack(tokens, is_open)], dim=1)  # (B, Q)
        mask = attention_mask(self.owner, self.position, ids.shape[1], self.model.dtype)
        options = self.options | {"position_ids": self.position[:, -ids.shape[1] :]}
        options["logits_to_keep"] = owner.shape[1]  # none of the prompt
        logits = self.model(ids, attention_mask=mask, **options).logits.float()  # (B, n, V)
        self.unread, self.num_steps = ids[:, :0], self.num_steps + 1
        return unpack(logits, is_open)


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Invert each cumulative distribution at `uniforms` in [0, 1): (B, N, V), (B, N) -> (B, N)."""
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (B, N, V)
    target = uniforms[..., None] * cumulative[..., -1:]  # the last is 1 only up to rounding
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


def eos_ids(model: nn.Module, tokenizer: Any) -> Tensor:
    """Every id that ends a response: the tokenizer's, and the generation config's one or several
    (chat models end a turn and a text with different tokens)."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    return torch.tensor(sorted(ids), device=model.device)


@torch.no_grad()
def generate(
    next_logits: Callable, prompts: Batch, uniforms: Tensor, eos: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, N, R) each, of responses drawn from `next_logits`, a `PackedDecoder`.

    `uniforms` (B, N, R) has a number for each token that may come: no early end, micro-batch or
    device shifts the stream. A response keeps the id of `eos` that ends it, unless it is cut off.
    """
    uniforms = uniforms.to(eos.device)
    ids = eos[0].expand(uniforms.shape).clone()  # (B, N, R)
    mask = torch.zeros_like(ids)
    is_open = torch.ones_like(ids[..., 0], dtype=torch.bool)  # (B, N)
    tokens = prompts.prompt_ids[:, -1:].to(eos.device).expand(is_open.shape)  # (B, N)
    for t in range(uniforms.shape[-1]):
        logits = next_logits(tokens, is_open)  # (B, N, V)
        tokens = sample_tokens(logits, uniforms[..., t], temperature)  # (B, N)
        ids[..., t] = torch.where(is_open, tokens, ids[..., t])
        mask[..., t] = is_open
        is_open = is_open & ~torch.isin(tokens, eos)
        if not is_open.any():
            break
    return ids, mask


def with_responses(prompts: Batch, ids: Tensor, mask: Tensor, tokenizer: Any) -> Batch:
    """The prompts with these responses (B, N, R), and their texts."""
    rows = zip(ids.tolist(), mask.sum(-1).tolist())
    tokens = [[y[:length] for y, length in zip(*row)] for row in rows]  # B lists of N
    texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in tokens]
    return replace(prompts, responses=texts, response_ids=ids, response_mask=mask)


def respond(
    model: nn.Module, tokenizer: Any, prompts: Batch, num: int, rng: torch.Generator,
    config: Any, temperature: float | None = None, decoder: Callable = PackedDecoder,
) -> Batch:  # fmt: skip
    """The prompts with N = `num` responses each, at --temperature unless another one is given."""
    temperature = temperature or config.temperature
    uniforms = torch.rand(len(prompts), num, config.max_new_tokens, generator=rng)
    eos = eos_ids(model, tokenizer)

    def sample(rows: Tensor) -> tuple[Tensor, Tensor]:
        part = prompts.select(rows)
        with autocast(model.device):  # one for all steps: each new one casts all weights again
            ids, mask = generate(decoder(model, part), part, uniforms[rows], eos, temperature)
        return ids.cpu(), mask.cpu()

    ids, mask = in_parts(sample, len(prompts), config.micro_batch_size)
    return with_responses(prompts, ids, mask, tokenizer)


# ---------------- losses


def margin(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio gap of chosen (column 0) and rejected (column 1), without beta: (B, N) -> (B,)."""
    log_ratios = logps - ref_logps  # (B, N)
    return log_ratios[:, 0] - log_ratios[:, 1]


def dpo(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """DPO loss, Eq. 7 of arXiv:2305.18290v3: -log sigmoid(beta * margin), (B, N) -> (B,).

    `logps` are sums over tokens. At policy = reference the loss is log 2 = 0.6931 for any pair,
    not a bug, and its gradient is not zero. Only the margin counts: both rewards may fall.
    """
    return -F.logsigmoid(beta * margin(logps, ref_logps))  # Eq. 7


def ipo(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """IPO loss, Eq. 17 of arXiv:2310.12036v2, (B, N) -> (B,); SEA feeds it means over tokens."""
    return (margin(logps, ref_logps) - 1 / (2 * beta)).square()  # Eq. 17


def slic(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """SLiC as SEA has it: max(0, 1 - beta * margin), (B, N) -> (B,), `logps` sums over tokens; with
    the reference, and without the cross-entropy term of the original (arXiv:2305.10425)."""
    return F.relu(1 - beta * margin(logps, ref_logps))


# ---------------- one step of the optimiser


def start_optimizer(policy: nn.Module, config: Any) -> torch.optim.AdamW:
    """AdamW before its first step; `train_step` warms its rate up to `peak`. Loading the state_dict
    that it has now starts it afresh."""
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": policy.device.type == "cuda"}
    optimizer = torch.optim.AdamW(policy.parameters(), **options)
    optimizer.param_groups[0].update(peak=config.learning_rate, num_steps=0)
    return optimizer


def train_step(
    policy: nn.Module, optimizer: Any, pairs: Batch, pair_loss: Callable, config: Any
) -> dict[str, float]:
    """One step on the mean over all pairs of `pair_loss(logps, ref_logps, part)`; what it saw.

    `pairs` have the chosen response first, the rejected second, perhaps a third, y; and their
    `ref_logps`. UserError, before a weight moves, if a number is not finite. Train mode, since
    gradient checkpointing is silently off in eval mode; dropout is 0."""
    if not len(pairs):
        return {}

    def backward(rows: Tensor) -> Tensor:
        part = pairs.select(rows)
        logps, ref_logps = response_logps(policy, part), part.ref_logps.to(policy.device)  # (b, N)
        losses = pair_loss(logps, ref_logps, part)  # (b,)
        require(losses.isfinite().all(), "the loss is not finite")
        (losses.sum() / len(pairs)).backward()
        implicit_rewards = config.beta * (logps - ref_logps)  # (b, N)
        return torch.cat([losses[:, None], implicit_rewards], dim=1).detach().cpu()

    policy.train()
    seen = in_parts(backward, len(pairs), config.micro_batch_size)  # (n, 1 + N)
    policy.eval()
    if ranks()[1] > 1:
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            distributed.all_reduce(weight.grad)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    require(norm.isfinite(), "the gradient is not finite, though the loss is")
    group = optimizer.param_groups[0]
    group["num_steps"] += 1
    group["lr"] = group["peak"] * min(1.0, group["num_steps"] / (config.warmup_steps + 1))
    optimizer.step()
    optimizer.zero_grad()
    names = ("loss", "chosen_reward", "rejected_reward", "y_reward")
    return dict(zip(names, seen.mean(0).tolist())) | {"grad_norm": norm.item()}
