"""Does a packed row, ``prompt | y_1 | ... | y_N``, compute what one plain row a response does?"""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_batch, make_model, plain_token_logps, real_ids
from torch import Tensor, nn

import common
from common import (
    Batch,
    Config,
    PackedDecoder,
    UserError,
    dpo,
    frozen_logps,
    generate,
    packed_inputs,
    packed_layout,
    packing_error,
    response_logps,
    token_logps,
    update,
)

PROMPTS, RESPONSES = [7, 3, 11], [[4, 1, 6], [2, 6, 5], [6, 3, 1]]
CAUSAL = transformers.AutoModelForCausalLM


@pytest.fixture
def batch() -> Batch:
    return make_batch(PROMPTS, RESPONSES)


def more_padding(batch: Batch, left: int, right: int) -> Batch:
    """The same batch with more padding, whose ids are arbitrary."""
    return Batch(
        batch.columns,
        F.pad(batch.prompt_ids, (left, 0), value=17),
        F.pad(batch.prompt_mask, (left, 0)),
        batch.responses,
        F.pad(batch.response_ids, (0, right), value=23),
        F.pad(batch.response_mask, (0, right)),
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def gradient_error(model: nn.Module, ours: Tensor, expected: Tensor) -> float:
    """Largest difference of any parameter's gradient over the largest entry of the whole one (NaN
    if there is one anywhere)."""
    theirs = torch.cat([gradient.flatten() for gradient in gradients(model, expected).values()])
    found = torch.cat([gradient.flatten() for gradient in gradients(model, ours).values()])
    return ((found - theirs).abs().max() / theirs.abs().max()).item()


# ------------------------------------------------------------------ log-probabilities


@torch.no_grad()
def test_packed_token_logps_equal_plain_ones_token_by_token(model, batch) -> None:
    packed = token_logps(model, batch)
    assert packed.shape == batch.response_ids.shape and packed.dtype == torch.float32
    torch.testing.assert_close(packed, plain_token_logps(model, batch), rtol=1e-5, atol=1e-5)
    assert (packed[batch.response_mask == 0] == 0).all()
    assert torch.equal(response_logps(model, batch), packed.sum(-1))


def test_log_probabilities_of_500_token_responses_agree_with_float64_to_1e_3() -> None:
    """Sums over 500 tokens, in float32, against plain rows in float64; of a real model's scale."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=5000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(intermediate_size=256, max_position_embeddings=1024)
    config = transformers.AutoConfig.for_model("gpt_neox", **sizes)
    model = CAUSAL.from_config(config).float().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # far from uniform
    batch = make_batch([30, 12], [[500, 480], [500, 3]])
    with torch.no_grad():
        logps = response_logps(model, batch)
        expected = plain_token_logps(model.double(), batch).sum(-1)
    assert expected.min() < -2000
    assert (logps - expected).abs().max() < 1e-3


@torch.no_grad()
def test_packed_logits_equal_plain_ones_to_1e_10_in_float64(model, batch) -> None:
    model = copy.deepcopy(model).double()
    full = torch.ones_like(batch.response_mask)  # padding too: each token at its own place
    inputs, _ = packed_inputs(model, batch.prompt_ids, batch.prompt_mask, batch.response_ids, full)
    packed = model(**inputs).logits  # (B, P + N R, V)
    num_prompt_tokens, length = max(PROMPTS), batch.response_ids.shape[-1]
    for b, n in itertools.product(range(3), range(3)):
        prompt, response = real_ids(batch, b, n)
        plain = model(torch.tensor([prompt + response])).logits[0]
        start = num_prompt_tokens + n * length
        own = packed[b, start : start + len(response)]
        torch.testing.assert_close(own, plain[len(prompt) :], rtol=1e-10, atol=1e-10)
        own_prompt = packed[b, num_prompt_tokens - len(prompt) : num_prompt_tokens]
        torch.testing.assert_close(own_prompt, plain[: len(prompt)], rtol=1e-10, atol=1e-10)


def test_gradients_of_a_loss_equal_the_plain_ones_for_every_parameter(model, batch) -> None:
    pairs = batch.select(torch.arange(3), torch.tensor([[0, 1]] * 3))
    ref_logps = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    packed = dpo(response_logps(model, pairs), ref_logps, 0.1).mean()
    plain = dpo(plain_token_logps(model, pairs).sum(-1), ref_logps, 0.1).mean()
    assert gradient_error(model, packed, plain) < 1e-4
    model = copy.deepcopy(model).double()  # only the log-softmax is in float32 here
    packed = token_logps(model, batch).square().sum()
    plain = plain_token_logps(model, batch).square().sum()
    assert gradient_error(model, packed, plain) < 1e-6


def test_more_padding_on_either_side_changes_no_logp_and_no_gradient(model, batch) -> None:
    tight = token_logps(model, batch)
    for left, right in ((5, 0), (0, 4), (3, 2)):
        padded = token_logps(model, more_padding(batch, left, right))
        assert (padded[..., tight.shape[-1] :] == 0).all()
        torch.testing.assert_close(padded[..., : tight.shape[-1]], tight, rtol=1e-5, atol=1e-5)
        expected = token_logps(model, batch).square().sum()
        assert gradient_error(model, padded.square().sum(), expected) < 1e-4


@torch.no_grad()
def test_one_token_responses_and_single_responses_and_many_are_read(model) -> None:
    for lengths in ([[1, 1]], [[5]], [[1]], [[2, 7, 1, 3, 4, 6, 2, 5]]):
        batch = make_batch([6], lengths, seed=2)
        expected = plain_token_logps(model, batch)
        torch.testing.assert_close(token_logps(model, batch), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prompt_tokens_count_for_nothing_and_moving_a_token_to_the_prompt_takes_its_logp(
    model,
) -> None:
    longer, shorter = make_batch([6], [[5]]), make_batch([7], [[4]])
    ids = torch.cat([longer.prompt_ids[0], longer.response_ids[0, 0]])
    shorter.prompt_ids[0], shorter.response_ids[0, 0] = ids[:7], ids[7:]
    moved, kept = token_logps(model, longer)[0, 0].split([1, 4])
    torch.testing.assert_close(token_logps(model, shorter)[0, 0], kept, rtol=1e-5, atol=1e-5)
    assert moved.item() < -1e-3


def test_only_the_prompts_last_token_and_the_responses_are_predicted_from(model, batch) -> None:
    embedded = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_()) or output
    )
    logps = token_logps(model, batch)
    hook.remove()
    (gradient,) = torch.autograd.grad(logps[0, 1].sum(), embedded[0])
    reaches = gradient.abs().sum(-1) > 0  # (B, S)
    prompt = batch.prompt_mask.bool()
    assert torch.equal(reaches[:, : prompt.shape[1]], prompt & torch.tensor([[1], [0], [0]]).bool())
    # Response 1 of prompt 0 is one token: predicted from the prompt, it reads no response token.
    assert not reaches[:, prompt.shape[1] :].any()


def test_a_response_without_a_token_raises_value_error(model, batch) -> None:
    batch.response_mask[1, 2] = 0
    with pytest.raises(ValueError):
        token_logps(model, batch)


@torch.no_grad()
def test_frozen_logps_are_response_logps_whatever_the_micro_batch(model, batch) -> None:
    expected = response_logps(model, batch)
    for size in (1, 2, 64):
        found = frozen_logps(model, batch, Config(micro_batch_size=size))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        assert not frozen_logps(model, batch, Config()).requires_grad


# ------------------------------------------------------------------ mask and positions


@pytest.mark.parametrize("num_queries", [0, 1, 3, 6])
@pytest.mark.parametrize("order", ["response-major", "step-major"])
def test_mask_and_positions_equal_a_loop_over_the_definition(order: str, num_queries: int) -> None:
    prompt_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    tokens = [(n, t) for n in range(2) for t in range(3)]  # (response, step)
    if order == "step-major":
        tokens.sort(key=lambda token: token[1])
    owner, step = torch.tensor(tokens).T
    mask, positions = packed_layout(prompt_mask, owner, step, torch.float32, num_queries)
    size = 4 + len(tokens)
    rows = range(size - num_queries if num_queries else 0, size)
    assert mask.shape == (3, 1, len(rows), size) and positions.shape == (3, size)
    assert mask.dtype == torch.float32 and mask.isfinite().all()
    for b in range(3):
        num_real = int(prompt_mask[b].sum())
        for s in range(size):
            if s >= 4:
                assert positions[b, s] == num_real + tokens[s - 4][1]
            elif prompt_mask[b, s]:
                assert positions[b, s] == int(prompt_mask[b, :s].sum())
            assert 0 <= positions[b, s] < num_real + 3  # padding too has a legal position
        for query, s in itertools.product(range(len(rows)), range(size)):
            q = rows[query]
            if s < 4:  # a prompt token: real, and not in the future
                sees = bool(prompt_mask[b, s]) and (q >= 4 or s <= q)
            elif q < 4:  # the prompt sees no response
                sees = False
            else:  # a response sees itself, up to itself
                same = tokens[s - 4][0] == tokens[q - 4][0]
                sees = same and tokens[s - 4][1] <= tokens[q - 4][1]
            if q == s:
                assert mask[b, 0, query, s] == 0  # also in padding, where a row may not be empty
            else:
                assert (mask[b, 0, query, s] == 0) == sees, (b, q, s)
                assert sees or mask[b, 0, query, s] < -1e30


@torch.no_grad()
def test_a_row_holds_its_real_tokens_in_order_and_padding_only_to_fill_up(model, batch) -> None:
    sources = batch.response_ids, batch.response_mask
    inputs, order = packed_inputs(model, batch.prompt_ids, batch.prompt_mask, *sources)
    sizes = batch.response_mask.sum((1, 2)).tolist()
    assert order.shape == (3, max(sizes)) and max(sizes) < batch.response_ids[0].numel()
    for b, size in enumerate(sizes):
        kept = [token for n in range(3) for token in real_ids(batch, b, n)[1]]
        assert inputs["input_ids"][b, max(PROMPTS) :][:size].tolist() == kept
        assert batch.response_mask[b].flatten()[order[b, size:]].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_mask_is_finite_in_every_precision(dtype: torch.dtype) -> None:
    ones = torch.ones(1, 3, dtype=torch.long)
    mask, _ = packed_layout(ones, torch.tensor([0, 1]), torch.tensor([0, 0]), dtype)
    assert mask.dtype == dtype and mask.isfinite().all() and mask.min() < -1e30


def test_the_packed_row_is_the_prompt_then_the_responses_in_order(model, batch) -> None:
    full = torch.ones_like(batch.response_mask)  # padding too: each token at its own place
    inputs, _ = packed_inputs(model, batch.prompt_ids, batch.prompt_mask, batch.response_ids, full)
    for b in range(3):
        row = batch.prompt_ids[b].tolist() + sum(batch.response_ids[b].tolist(), [])
        assert inputs["input_ids"][b].tolist() == row


# ------------------------------------------------------------------ generation


def draw(logits: Tensor, uniform: float, temperature: float) -> int:
    """The first token whose cumulative probability exceeds the uniform, in float64."""
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1).tolist()
    return next(token for token, total in enumerate(cumulative) if total > uniform)


def plain_response(
    model: nn.Module, prompt: list[int], uniforms: list[float], eos: int, bonus: Tensor, temperature
) -> list[int]:
    """A response, recomputed from its first token at each step, without padding or a cache."""
    response = []
    for uniform in uniforms:
        logits = model(torch.tensor([prompt + response])).logits[0, -1]
        response.append(draw(logits + bonus, uniform, temperature))
        if response[-1] == eos:
            break
    return response


@pytest.mark.parametrize(("temperature", "eos_bonus"), [(1.0, 5.0), (0.6, 3.6)])
@pytest.mark.parametrize("num_responses", [1, 2, 5])
@torch.no_grad()
def test_packed_decoding_draws_the_tokens_of_an_uncached_plain_recomputation(
    model, num_responses: int, temperature: float, eos_bonus: float
) -> None:
    prompts, eos, length = make_batch([9, 4, 6, 1], [[1]] * 4), 0, 8
    assert (prompts.prompt_ids[0] == eos).any(), "an EOS inside the prompt"
    rng = torch.Generator().manual_seed(num_responses)
    uniforms = torch.rand(4, num_responses, length, generator=rng)
    bonus = torch.zeros(300)
    bonus[eos] = eos_bonus  # so that some responses end early
    decoder = PackedDecoder(model, prompts, num_responses)
    ids, mask = generate(lambda tokens: decoder(tokens) + bonus, uniforms, eos, temperature)
    assert ids.shape == mask.shape == uniforms.shape
    lengths = set()
    for b, n in itertools.product(range(4), range(num_responses)):
        prompt = [i for i, m in zip(prompts.prompt_ids[b].tolist(), prompts.prompt_mask[b]) if m]
        numbers = uniforms[b, n].tolist()
        expected = plain_response(model, prompt, numbers, eos, bonus, temperature)
        lengths.add(len(expected))
        assert mask[b, n].tolist() == [1] * len(expected) + [0] * (length - len(expected))
        assert ids[b, n, : len(expected)].tolist() == expected
        assert (ids[b, n, len(expected) :] == eos).all()
    assert min(lengths) < length, "no response ended early: the test has lost its point"
    assert num_responses == 1 or length in lengths


@torch.no_grad()
def test_the_decoders_logits_equal_plain_ones_at_each_step(model, batch) -> None:
    decoder = PackedDecoder(model, batch, 3)
    steps = [decoder(None)] + [decoder(batch.response_ids[..., t]) for t in range(2)]
    for b, n in itertools.product(range(3), range(3)):
        prompt, _ = real_ids(batch, b, n)
        response = batch.response_ids[b, n, :2].tolist()
        plain = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :]
        for t in range(3):
            torch.testing.assert_close(steps[t][b, n], plain[t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_neither_padding_nor_neighbours_nor_micro_batches_shift_what_is_sampled(model) -> None:
    prompts = make_batch([9, 4, 6], [[1]] * 3)
    uniforms = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(5))
    whole, _ = generate(PackedDecoder(model, prompts, 4), uniforms, eos_token_id=0)
    padded, _ = generate(PackedDecoder(model, more_padding(prompts, 4, 0), 4), uniforms, 0)
    assert torch.equal(whole, padded)
    for rows, part in prompts.split(1):
        alone, _ = generate(PackedDecoder(model, part, 4), uniforms[rows], 0)
        assert torch.equal(whole[rows], alone)
    pair, _ = generate(PackedDecoder(model, prompts, 2), uniforms[:, 1:3], 0)
    assert torch.equal(whole[:, 1:3], pair), "the other responses to a prompt play no part"


def scripted(tokens: Tensor) -> tuple[list, object]:
    """A `next_logits` that gives tokens (B, N, R) with certainty, and the record of its calls."""
    calls = []

    def next_logits(newest: Tensor | None) -> Tensor:
        calls.append(newest)
        certain = F.one_hot(tokens[..., len(calls) - 1], 10).double()
        return certain.log().float()

    return calls, next_logits


def test_a_response_ends_with_its_eos_and_one_cut_at_r_tokens_gets_none() -> None:
    tokens = torch.tensor([[[3, 4, 9, 5], [9, 1, 1, 1]], [[1, 2, 3, 4], [1, 2, 3, 9]]])
    calls, next_logits = scripted(tokens)
    ids, mask = generate(next_logits, torch.rand(2, 2, 4), eos_token_id=9)
    assert ids.tolist() == [[[3, 4, 9, 9], [9, 9, 9, 9]], [[1, 2, 3, 4], [1, 2, 3, 9]]]
    assert mask.tolist() == [[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]]
    assert calls[0] is None and len(calls) == 4
    assert [call.tolist() for call in calls[1:]] == [
        [[3, -1], [1, 1]], [[4, -1], [2, 2]], [[-1, -1], [3, 3]],
    ]  # fmt: skip


def test_a_decoder_feeds_no_response_that_has_ended_but_to_fill_up_a_row(model, batch) -> None:
    """Its logits for the open ones are those of a decoder that is told of no end."""
    sizes, plain = [], PackedDecoder(model, batch, 4)
    decoder = PackedDecoder(model, batch, 4)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(args[0].shape[1])
    )
    try:
        decoder(None), plain(None)
        rng, is_open = torch.Generator().manual_seed(0), torch.ones(len(batch), 4).bool()
        for closed in ([], [(0, 1), (1, 1)], [(0, 0), (1, 3), (2, 2)], [(0, 2), (0, 3)]):
            for b, n in closed:
                is_open[b, n] = False
            tokens = torch.randint(1, 300, is_open.shape, generator=rng)
            found = decoder(torch.where(is_open, tokens, -1))
            torch.testing.assert_close(found[is_open], plain(tokens)[is_open], rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()
    assert sizes[2::2] == [4, 4, 3, 3]  # prompt 2 has four open ones at first, then three


def test_generation_stops_when_every_response_has_ended() -> None:
    calls, next_logits = scripted(torch.tensor([[[9, 1, 1], [2, 9, 1]]]))
    ids, mask = generate(next_logits, torch.rand(1, 2, 3), eos_token_id=9)
    assert len(calls) == 2 and mask.sum(-1).tolist() == [[1, 2]]
    assert ids.shape == (1, 2, 3) and ids[0, :, 2].tolist() == [9, 9]


# ------------------------------------------------------------------ batches


def test_select_keeps_prompts_responses_texts_and_masks_together(batch) -> None:
    rows, picks = torch.tensor([2, 0, 2]), torch.tensor([[1, 0], [2, 2], [0, 1]])
    chosen = batch.select(rows, picks)
    assert len(chosen) == 3
    for new, (old, own) in enumerate(zip(rows.tolist(), picks.tolist())):
        assert chosen.columns["prompt"][new] == batch.columns["prompt"][old]
        assert chosen.responses[new] == [batch.responses[old][n] for n in own]
        for place, n in enumerate(own):
            assert real_ids(chosen, new, place) == real_ids(batch, old, n)


def test_select_without_picks_keeps_all_responses(batch) -> None:
    chosen = batch.select(torch.tensor([1]))
    assert chosen.responses == [batch.responses[1]]
    assert [real_ids(chosen, 0, n) for n in range(3)] == [real_ids(batch, 1, n) for n in range(3)]


def test_select_cuts_padding_to_what_is_left(batch) -> None:
    chosen = batch.select(torch.tensor([1, 0]), torch.tensor([[0], [0]]))  # 3 and 7; 2 and 4
    assert chosen.prompt_ids.shape == chosen.prompt_mask.shape == (2, 7)
    assert chosen.response_ids.shape == chosen.response_mask.shape == (2, 1, 4)


def test_select_works_before_responses_are_sampled(batch) -> None:
    nothing = torch.zeros(3, 0, 0, dtype=torch.long)
    prompts = Batch(
        batch.columns, batch.prompt_ids, batch.prompt_mask, [[], [], []], nothing, nothing
    )
    chosen = prompts.select(torch.tensor([1, 2]))
    assert chosen.prompt_ids.shape == (2, 11) and chosen.responses == [[], []]
    assert chosen.response_ids.shape[:2] == (2, 0)


@pytest.mark.parametrize(("size", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_split_gives_each_prompt_once_and_in_order(batch, size: int, sizes: list) -> None:
    parts = list(batch.split(size))
    assert [len(part) for _, part in parts] == sizes
    assert torch.cat([rows for rows, _ in parts]).tolist() == [0, 1, 2]
    for rows, part in parts:
        for new, old in enumerate(rows.tolist()):
            assert part.responses[new] == batch.responses[old]
            assert real_ids(part, new, 1) == real_ids(batch, old, 1)


def test_duplicate_texts_are_distinct_only_at_their_first_place() -> None:
    responses = [["a", "b", "a ", "c"], ["", " ", "\n", "A"], ["x", "x", "x", "x"]]
    assert common.distinct(responses).int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]


# ------------------------------------------------------------------ the update


def pair_loss(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
    assert part.response_mask.shape[:2] == logps.shape == ref_logps.shape
    return dpo(logps, ref_logps, 0.1)


def sgd_step(model: nn.Module, pairs: Batch, ref_logps: Tensor, **flags) -> tuple[dict, dict]:
    """What `update` reports, and by how much each weight of a copy of the model moved."""
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    pairs = replace(pairs, ref_logps=ref_logps)
    seen = update(policy, optimizer, [pairs], pair_loss, Config(**flags))
    before = dict(model.named_parameters())
    return seen, {name: p.detach() - before[name] for name, p in policy.named_parameters()}


@pytest.fixture
def pairs(batch) -> Batch:
    return batch.select(torch.tensor([0, 1, 2]), torch.tensor([[0, 1], [1, 2], [2, 0]]))


def test_an_update_is_a_clipped_step_down_the_gradient_of_the_mean_over_pairs(model, pairs) -> None:
    ref_logps = torch.tensor([[-20.0, -19.0], [-20.5, -21.5], [-18.0, -22.0]])
    logps = plain_token_logps(model, pairs).sum(-1)
    losses = dpo(logps, ref_logps, 0.1)
    expected = gradients(model, losses.mean())
    norm = math.sqrt(sum(gradient.double().square().sum() for gradient in expected.values()))
    for max_norm in (1e9, norm / 3):
        seen, moves = sgd_step(model, pairs, ref_logps, max_grad_norm=max_norm)
        for name, move in moves.items():
            step = -0.01 * expected[name] * min(1, max_norm / norm)
            assert (move - step).abs().max() < 1e-4 * 0.01 * norm, name
        rewards = (0.1 * (logps - ref_logps)).mean(0)
        numbers = dict(loss=losses.mean().item(), grad_norm=norm)
        numbers |= dict(chosen_reward=rewards[0].item(), rejected_reward=rewards[1].item())
        assert {name: seen[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_give_the_update_of_one_batch(model, pairs, size: int) -> None:
    ref_logps = torch.tensor([[-20.0, -19.0], [-20.5, -21.5], [-18.0, -22.0]])
    seen, moves = sgd_step(model, pairs, ref_logps, max_grad_norm=1e9)
    small_seen, small_moves = sgd_step(
        model, pairs, ref_logps, max_grad_norm=1e9, micro_batch_size=size
    )
    assert small_seen == pytest.approx(seen, rel=1e-4)
    largest = max(move.abs().max() for move in moves.values())
    for name, move in small_moves.items():
        assert (move - moves[name]).abs().max() < 1e-4 * largest, name


def test_an_update_leaves_no_gradient_behind_and_the_policy_in_eval_mode(model, pairs) -> None:
    policy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    update(policy, optimizer, [replace(pairs, ref_logps=torch.zeros(3, 2))], pair_loss, Config())
    assert not policy.training
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_user_error_and_moves_no_weight(
    model, pairs, bad: float, size: int
) -> None:
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    ref_logps = torch.zeros(3, 2)
    ref_logps[1, 0] = bad  # chosen: its log-ratio is nan or -inf, its loss nan or inf
    pairs, config = replace(pairs, ref_logps=ref_logps), Config(micro_batch_size=size)
    with pytest.raises(UserError, match="prompt 1"):
        update(policy, optimizer, [pairs], pair_loss, config)
    for new, old in zip(policy.parameters(), model.parameters()):
        assert torch.equal(new, old)


def test_a_gradient_that_is_not_finite_is_a_user_error_and_moves_no_weight(model, pairs) -> None:
    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)

    def steep_loss(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
        return (logps[:, 0] - logps[:, 0].detach()).abs().sqrt()  # finite, of infinite slope

    pairs = replace(pairs, ref_logps=torch.zeros(3, 2))
    with pytest.raises(UserError):
        update(policy, optimizer, [pairs], steep_loss, Config())
    for new, old in zip(policy.parameters(), model.parameters()):
        assert torch.equal(new, old)


# ------------------------------------------------------------------ where packing is wrong


def random_model(family: str, auto_class=CAUSAL, **sizes) -> nn.Module:
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(
        family, vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    model = auto_class.from_config(settings).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


LLAMA_SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64,
)  # fmt: skip
BERT_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
GPT2_SIZES = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)


def test_packing_error_is_rounding_for_neox_and_llama(model) -> None:
    assert packing_error(model, 20, 8) < 1e-5
    assert packing_error(model.base_model, 20, 8) < 1e-5  # as a reader of features


@pytest.mark.parametrize(
    ("family", "auto_class", "sizes"),
    [
        ("bloom", CAUSAL, dict(hidden_size=32, n_layer=2, n_head=4)),  # ALiBi, no position_ids
        ("mpt", CAUSAL, dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),  # ALiBi
        ("mistral", CAUSAL, LLAMA_SIZES | dict(sliding_window=16)),
        ("mamba", CAUSAL, dict(hidden_size=32, num_hidden_layers=2)),  # no attention at all
        ("bert", transformers.AutoModel, BERT_SIZES),  # sees what comes later
        ("roberta", transformers.AutoModel, BERT_SIZES),
    ],
)
def test_packing_error_is_large_where_packing_is_wrong(family: str, auto_class, sizes) -> None:
    assert packing_error(random_model(family, auto_class, **sizes), 20, 8) > 0.01


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", GPT2_SIZES),
        ("qwen2", LLAMA_SIZES),
        ("mistral", LLAMA_SIZES | dict(sliding_window=28)),  # as long as prompt and response
    ],
)
@torch.no_grad()
def test_where_packing_error_is_small_many_responses_are_right_too(family: str, sizes) -> None:
    model = random_model(family, **sizes)
    assert packing_error(model, 20, 8) < 1e-5
    batch = make_batch([20, 9], [[8] * 6] * 2)  # a packed row of 68, far beyond that window
    expected = plain_token_logps(model, batch)
    torch.testing.assert_close(token_logps(model, batch), expected, rtol=1e-4, atol=1e-4)
    uniforms = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(0))
    ids, _ = generate(PackedDecoder(model, batch, 6), uniforms, eos_token_id=300)
    nothing = torch.zeros(300)
    for b, n in itertools.product(range(2), range(6)):
        prompt, _ = real_ids(batch, b, n)
        numbers = uniforms[b, n].tolist()
        assert ids[b, n].tolist() == plain_response(model, prompt, numbers, 300, nothing, 1.0)


def test_packing_error_shows_positions_that_count_padding(monkeypatch) -> None:
    def layout(prompt_mask: Tensor, *args) -> tuple[Tensor, Tensor]:
        mask, positions = packed_layout(prompt_mask, *args)
        return mask, positions + (prompt_mask == 0).sum(1, keepdim=True)

    monkeypatch.setattr(common, "packed_layout", layout)
    assert packing_error(random_model("gpt2", **GPT2_SIZES), 20, 8) > 0.01


def test_a_random_model_of_other_weights_is_told_apart(model, batch) -> None:
    other = make_model(CAUSAL, model.config.model_type, seed=9)
    assert not torch.allclose(token_logps(model, batch), token_logps(other, batch), atol=0.1)
