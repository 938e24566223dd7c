"""Does a packed row, ``prompt | y_1 | ... | y_N``, compute what one plain row a response does? And
does what is built on it, from sampling to a step of the optimiser?"""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import common
from common import Batch, UserError, dpo, token_logps
from harness import Config

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, plain_response, plain_token_logps, real_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = [7, 3, 11], [[4, 1, 6], [2, 6, 5], [6, 3, 1]]
REF_LOGPS = torch.tensor([[-20.0, -19.0, -3.0], [-20.5, -21.5, -4.0], [-18.0, -22.0, -8.0]])


@pytest.fixture
def batch() -> Batch:
    """Three prompts with three responses each, and their `ref_logps`."""
    return replace(make_batch(*SIZES), ref_logps=REF_LOGPS)


class Bigram(nn.Module):
    """A model that predicts each token from the one before alone."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(300, 300, generator=rng))

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, -logits_to_keep:]])


def more_padding(batch: Batch, left: int, right: int) -> Batch:
    """The same batch with more padding, whose ids are arbitrary."""
    return replace(
        batch,
        prompt_ids=F.pad(batch.prompt_ids, (left, 0), value=17),
        prompt_mask=F.pad(batch.prompt_mask, (left, 0)),
        response_ids=F.pad(batch.response_ids, (0, right), value=23),
        response_mask=F.pad(batch.response_mask, (0, right)),
    )


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """Of every parameter, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal up to 1e-4 of the largest entry, and not all zero."""
    assert 0 < expected.abs().max() < math.inf
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ---------------------------------------------------------------- pack, layout, mask


def test_layout_equals_a_loop_over_the_definition(batch):
    owner, position = common.layout(batch.prompt_mask, batch.response_mask)
    size = 11 + max(map(sum, SIZES[1]))
    assert owner.shape == position.shape == (3, size)
    for b, (num_prompt, lengths) in enumerate(zip(*SIZES)):
        owners = [0] * (11 - num_prompt) + [common.PROMPT] * num_prompt
        positions = [0] * (11 - num_prompt) + list(range(num_prompt))
        for n, length in enumerate(lengths):
            owners += [common.FIRST_RESPONSE + n] * length
            positions += range(num_prompt, num_prompt + length)
        assert owner[b].tolist() == owners + [0] * (size - len(owners))
        assert position[b, : len(positions)].tolist() == positions
        assert (position[b, len(positions) :] <= num_prompt).all(), "beyond the model's context"


@pytest.mark.parametrize("num_queries", [None, 1, 4])
def test_a_token_sees_the_prompt_and_its_own_response_up_to_itself(batch, num_queries):
    owner, position = common.layout(batch.prompt_mask, batch.response_mask)
    size = owner.shape[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mask = common.attention_mask(owner, position, num_queries or size, dtype)
        assert mask.dtype == dtype and mask.isfinite().all()
        assert ((mask == 0) | (mask < -1e29)).all()
    queries = range(size)[-(num_queries or size) :]
    assert mask.shape == (3, 1, len(queries), size)
    for b, (row, q), s in itertools.product(range(3), enumerate(queries), range(size)):
        mine, whose, is_seen = owner[b, q], owner[b, s], bool(mask[b, 0, row, s] == 0)
        is_free = mine == 0 and s != q  # padding sees itself; what else it sees does not matter
        assert is_free or is_seen == bool(whose in (common.PROMPT, mine) and s <= q)


def test_a_row_holds_real_tokens_only(model, batch):
    wide = more_padding(batch, 5, 4)
    prompt, response = (wide.prompt_ids, wide.prompt_mask), (wide.response_ids, wide.response_mask)
    row = common.packed_row(model, *prompt, *response)
    assert not row["use_cache"]
    for b, kept in enumerate(row["input_ids"].tolist()):
        prompt, _ = real_ids(batch, b, 0)
        responses = [token for n in range(3) for token in real_ids(batch, b, n)[1]]
        assert len(kept) == 11 + max(map(sum, SIZES[1]))
        assert kept[11 - len(prompt) : 11 + len(responses)] == prompt + responses


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("prompts, responses", [
    SIZES, ([1], [[1, 1]]), ([2], [[5]]), ([1, 6], [[1], [3]]), ([6], [[2, 7, 1, 3, 4, 6, 2, 5]])
])  # fmt: skip
def test_packed_token_logps_equal_plain_ones_token_by_token_and_so_do_gradients(
    model, prompts, responses
):
    batch = make_batch(prompts, responses, seed=2)
    packed, plain = token_logps(model, batch), plain_token_logps(model, batch)
    assert packed.dtype == torch.float32 and (packed[batch.response_mask == 0] == 0).all()
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    assert_near(gradient(model, packed.square().sum()), gradient(model, plain.square().sum()))


@pytest.mark.parametrize("left, right", [(5, 0), (0, 4), (3, 2)])
def test_more_padding_on_either_side_changes_no_logp_and_no_gradient(model, batch, left, right):
    padded, tight = token_logps(model, more_padding(batch, left, right)), token_logps(model, batch)
    torch.testing.assert_close(padded, F.pad(tight, (0, right)), rtol=1e-5, atol=1e-5)
    expected = gradient(model, tight.square().sum())
    assert_near(gradient(model, padded.square().sum()), expected)


@torch.no_grad()
def test_an_eos_inside_prompt_or_response_is_a_token_like_any_other(model, batch):
    """Padding is 0 here as well: a mask that was derived from ids would end too early."""
    assert (batch.prompt_ids * batch.prompt_mask == 0).any()
    batch = replace(batch, prompt_ids=batch.prompt_ids * 0, response_ids=batch.response_ids * 0)
    expected = plain_token_logps(model, batch)
    assert (expected[batch.response_mask == 1] < 0).all()
    torch.testing.assert_close(token_logps(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_prompt_tokens_are_no_targets_and_get_no_gradient_from_any_label(batch):
    """A bigram's row k is trained where k stands before a target: not a response's last token."""
    model = Bigram()
    logps = token_logps(model, batch)
    for b, n in itertools.product(range(3), range(3)):
        prompt, response = real_ids(batch, b, n)
        read = [prompt[-1], *response[:-1]]
        expected = sum(model.table[k].log_softmax(0)[y] for k, y in zip(read, response))
        assert logps[b, n].sum().item() == pytest.approx(expected.item(), rel=1e-5)
        (own,) = torch.autograd.grad(logps[b, n].sum(), model.table, retain_graph=True)
        assert own.any(1).nonzero()[:, 0].tolist() == sorted(set(read))


def test_an_empty_response_raises(model, batch):
    batch.response_mask[1, 2] = 0
    with pytest.raises(ValueError, match="without a token"):
        token_logps(model, batch)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("num, temperature", [(1, 1.0), (2, 0.6), (5, 1.0)])
@pytest.mark.parametrize("sizes", [[9, 4, 6, 1], [1, 1, 1, 1]])
@torch.no_grad()
def test_packed_decoding_draws_the_tokens_of_an_uncached_plain_recomputation(
    model, sizes, num, temperature
):
    prompts, eos = make_batch(sizes, [[1]] * 4), list(range(3, 300, 12))
    uniforms = torch.rand(4, num, 8, generator=torch.Generator().manual_seed(num))
    lengths = set()
    for padded in (prompts, more_padding(prompts, 3, 0)):
        decoder = common.PackedDecoder(model, padded)
        ids, mask = common.generate(decoder, padded, uniforms, torch.tensor(eos), temperature)
        for b, n in itertools.product(range(4), range(num)):
            prompt, _ = real_ids(prompts, b, 0)
            numbers = uniforms[b, n].tolist()
            expected = plain_response(model, prompt, numbers, eos, temperature)
            assert mask[b, n].tolist() == [1] * len(expected) + [0] * (8 - len(expected))
            assert ids[b, n, : len(expected)].tolist() == expected
            lengths.add(len(expected))
    assert min(lengths) < max(lengths), "no response ended early: the test has lost its point"


@torch.no_grad()
def test_a_response_that_has_ended_costs_nothing_more(model, batch):
    """The model reads as many columns as a prompt has open responses, at most; logits are equal."""
    counted, sizes = copy.deepcopy(model), []
    embeddings = counted.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[1]))
    decoder, plain = (common.PackedDecoder(m, batch) for m in (counted, model))
    is_open, rng = torch.ones(3, 4).bool(), torch.Generator().manual_seed(0)
    for closed in ([], [(0, 1), (1, 1)], [(0, 0), (1, 3), (2, 2)], [(0, 2), (0, 3)]):
        for b, n in closed:
            is_open[b, n] = False
        tokens = torch.randint(1, 300, (3, 4), generator=rng)
        logits, expected = decoder(tokens, is_open), plain(tokens, torch.ones_like(is_open))
        torch.testing.assert_close(logits[is_open], expected[is_open], rtol=1e-4, atol=1e-4)
        assert not logits[~is_open].any() and logits.dtype == torch.float32
    assert sizes == [14, 4, 3, 3]  # 10 are the prompt's; in the end prompt 2 has three open ones


@pytest.mark.parametrize("given", [0, 7, [7], [7, 299, 0], None])
def test_the_eos_ids_are_the_tokenizers_and_those_of_the_generation_config(model, tokenizer, given):
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = given
    own = given if isinstance(given, list) else [] if given is None else [given]
    assert sorted(common.eos_ids(model, tokenizer).tolist()) == sorted({0, *own})


@pytest.mark.parametrize("size, given", [(1, None), (2, 1.0), (64, 0.7)])
def test_respond_samples_at_its_temperature_whatever_the_micro_batch_size_and_decodes_real_tokens(
    model, tokenizer, batch, size, given
):
    model, rng = copy.deepcopy(model), common.generator(2, "x")
    model.generation_config.eos_token_id = eos = list(range(3, 300, 6))
    config = Config(temperature=0.5, max_new_tokens=6, micro_batch_size=size)
    uniforms = torch.rand(3, 2, 6, generator=common.generator(2, "x"))
    drawn = common.respond(model, tokenizer, batch, 2, rng, config, temperature=given)
    assert drawn.columns == batch.columns and drawn.response_ids.shape == (3, 2, 6)
    temperature = given or 0.5
    for b, n in itertools.product(range(3), range(2)):
        prompt, response = real_ids(drawn, b, n)
        numbers = uniforms[b, n].tolist()
        assert response == plain_response(model, prompt, numbers, [0, *eos], temperature)
        kept = [token for token in response if token > 1]  # without the special tokens
        assert drawn.responses[b][n] == tokenizer.decode(kept)


# ---------------------------------------------------------------- batches


def test_autocast_casts_each_weight_once_for_all_steps_and_the_cache_is_bfloat16(
    model, tokenizer, batch, monkeypatch
):
    """Float32 keys and values are 24 GiB for a batch of Pythia-1b, casts at each step 1.7 GiB."""
    monkeypatch.setattr(common, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    casts, decoders = Counter(), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), options=None):
            is_weight = args and isinstance(args[0], nn.Parameter)
            casts[id(args[0])] += is_weight and function is torch.ops.aten._to_copy.default
            return function(*args, **(options or {}))

    def kept(*args) -> common.PackedDecoder:
        decoders.append(common.PackedDecoder(*args))
        return decoders[0]

    with Casts():
        config, rng = Config(max_new_tokens=6), common.generator(0, "round")
        common.respond(model, tokenizer, batch, 2, rng, config, decoder=kept)
    assert set(casts.values()) == {0, 1} and decoders[0].num_steps > 1
    (cache,) = (value for value in decoders[0].options.values() if hasattr(value, "layers"))
    dtypes = {tensor.dtype for layer in cache.layers for tensor in (layer.keys, layer.values)}
    assert dtypes == {torch.bfloat16}


def test_in_parts_concatenates_tensors_and_tuples_and_the_last_part_may_be_smaller():
    sizes = common.in_parts(lambda rows: torch.full_like(rows, len(rows)), 5, 2)
    assert sizes.tolist() == [2, 2, 2, 2, 1]
    both = common.in_parts(lambda rows: (rows[:, None], -rows), 5, 3)
    assert isinstance(both, tuple) and both[0].tolist() == [[0], [1], [2], [3], [4]]
    assert both[1].tolist() == [0, -1, -2, -3, -4]


def assert_same_row(found: Batch, row: int, batch: Batch, old: int, picks: list[int]) -> None:
    """Row `row` is prompt `old` of `batch` with its responses `picks`, and nothing is lost."""
    assert found.columns["prompt"][row] == batch.columns["prompt"][old]
    assert found.responses[row] == [batch.responses[old][n] for n in picks]
    for place, n in enumerate(picks):
        assert real_ids(found, row, place) == real_ids(batch, old, n)
    assert found.ref_logps is None or torch.equal(found.ref_logps[row], batch.ref_logps[old, picks])


def test_select_stacked_and_beside_keep_texts_tokens_masks_and_ref_logps_together(batch):
    picks = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 0, 2], [2, 2, 0]]
    part = batch.select(torch.tensor([2, 0]), torch.tensor(picks[3:]))
    stacked = common.stacked([batch, part])
    assert len(stacked) == 5 and stacked.ref_logps.shape == (5, 3)
    for row, old in enumerate([0, 1, 2, 2, 0]):
        assert_same_row(stacked, row, batch, old, picks[row])
    columns = [batch.select(torch.arange(3), torch.full((3, 1), n)) for n in (1, 0)]
    beside = common.beside([*columns, batch])
    assert beside.ref_logps is None and beside.response_ids.shape == (3, 5, 6)
    for row in range(3):
        assert_same_row(beside, row, batch, row, [1, 0, 0, 1, 2])


def test_a_text_is_distinct_at_its_first_place_whatever_stands_around_it():
    responses = [["a", "b", "a ", "c"], ["", " ", "\n", "A"], ["x", "x", "x", "x"]]
    assert common.distinct(responses).int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]


def test_the_widest_pair_is_the_best_and_the_worst_distinct_response():
    rng = torch.Generator().manual_seed(0)
    rewards = torch.randint(-2, 3, (500, 4), generator=rng).float()  # with many ties
    is_distinct = torch.rand(500, 4, generator=rng) < 0.6
    is_distinct[:, 0] = True
    best, worst = (index.tolist() for index in common.widest_pair(rewards, is_distinct))
    for b, row in enumerate(rewards.tolist()):
        places = is_distinct[b].nonzero()[:, 0].tolist()
        assert best[b] in places and row[best[b]] == max(row[n] for n in places)
        if len(places) > 1:
            assert worst[b] in places and worst[b] != best[b]
            assert row[worst[b]] == min(row[n] for n in places)


# ---------------------------------------------------------------- one step of the optimiser


def pair_loss(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
    assert part.response_mask.shape[:2] == logps.shape == ref_logps.shape
    return dpo(logps, ref_logps, 0.1)


@pytest.mark.parametrize("num_responses, size", [(2, 1), (2, 3), (3, 2)])
def test_a_step_goes_down_the_clipped_gradient_of_the_mean_whatever_the_micro_batch_size(
    model, batch, num_responses, size
):
    pairs = batch.select(torch.arange(3), torch.arange(num_responses).expand(3, -1))
    logps = plain_token_logps(model, pairs).sum(-1)
    losses = dpo(logps, pairs.ref_logps, 0.1)
    expected = gradient(model, losses.mean())
    norm, rewards = expected.norm().item(), 0.3 * (logps - pairs.ref_logps).mean(0)
    names = ["chosen_reward", "rejected_reward", "y_reward"]
    numbers = dict(zip(names, rewards.tolist()), loss=losses.mean().item(), grad_norm=norm)
    for factor in (2, 1 / 3):  # of the norm, to which gradients are clipped
        config = Config(warmup_steps=0, learning_rate=1, micro_batch_size=size, beta=0.3,
                        max_grad_norm=factor * norm)  # fmt: skip
        policy = copy.deepcopy(model)
        optimizer = torch.optim.SGD(policy.parameters())
        optimizer.param_groups[0].update(peak=1, num_steps=0)
        seen = common.train_step(policy, optimizer, pairs, pair_loss, config)
        assert seen == pytest.approx(numbers, rel=1e-4)
        moves = [new - old for new, old in zip(policy.parameters(), model.parameters())]
        assert_near(torch.cat([m.flatten() for m in moves]), -expected * min(1, factor))
        assert all(p.grad is None for p in policy.parameters()), "it would be added to the next"


def test_a_step_runs_in_train_mode_where_checkpointing_works_and_leaves_eval_mode(model, batch):
    policy, modes = copy.deepcopy(model).eval(), []
    policy.gradient_checkpointing_enable()
    hooked = policy.base_model.layers[0].input_layernorm
    hooked.register_forward_hook(lambda *_: modes.append(policy.training))
    common.train_step(policy, common.start_optimizer(policy, Config()), batch, pair_loss, Config())
    assert modes == [True, True], "the backward pass computes each layer a second time"
    assert not policy.training


def test_the_optimiser_is_adam_that_warms_up_and_can_be_kept_and_restarted(batch):
    policy, config = Bigram(), Config(warmup_steps=2, learning_rate=0.3, max_grad_norm=1e9)
    optimizer = common.start_optimizer(policy, config)
    fresh = optimizer.state_dict()
    for step, rate in enumerate([0.1, 0.2, 0.3, 0.3, 0.05, 0.1, 0.15]):
        if step in (0, 4):  # restarted at half the rate
            count, first, second = 0, 0, 0
        if step == 4:
            optimizer.load_state_dict(fresh)
            optimizer.param_groups[0]["peak"] *= 0.5
        if step in (2, 6):  # as a run that is resumed
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = common.start_optimizer(policy, config)
            optimizer.load_state_dict(state)
        old, count = policy.table.detach().clone(), count + 1
        loss = dpo(plain_token_logps(policy, batch).sum(-1), batch.ref_logps, 0.1).mean()
        slope = gradient(policy, loss).view(300, 300)
        first, second = 0.9 * first + 0.1 * slope, 0.95 * second + 0.05 * slope**2
        common.train_step(policy, optimizer, batch, pair_loss, config)
        mean, square = first / (1 - 0.9**count), second / (1 - 0.95**count)
        moved, expected = policy.table.detach() - old, -rate * mean / (square.sqrt() + 1e-8)
        assert (moved - expected).abs().max() < 1e-5 * rate


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("bad_loss, said", [
    (lambda logps: logps * math.nan, "loss"),
    (lambda logps: logps * math.inf, "loss"),
    (lambda logps: (logps - logps.detach()).abs().sqrt(), "gradient"),  # 0, infinitely steep
])  # fmt: skip
def test_what_is_not_finite_is_refused_before_a_weight_moves(batch, bad_loss, said, size):
    policy, config = Bigram(), Config(micro_batch_size=size)
    optimizer = common.start_optimizer(policy, config)

    def losses(logps: Tensor, ref_logps: Tensor, part: Batch) -> Tensor:
        is_bad = torch.tensor([prompt == "prompt 1" for prompt in part.columns["prompt"]])
        return torch.where(is_bad, bad_loss(logps[:, 0]), dpo(logps, ref_logps, 0.1))

    with pytest.raises(UserError, match=said):
        common.train_step(policy, optimizer, batch, losses, config)
    assert torch.equal(policy.table, Bigram().table)
