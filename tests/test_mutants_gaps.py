"""What the mutants of tests/mutants.py showed to be untested."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_batch, make_tokenizer, plain_token_logps, real_ids

import common
import sea
import selm


class Rule(common.Oracle):
    """An oracle without a model: the longer text is better, of equal length the later one."""

    def score(self, prompts: list[str], responses: list[list[str]]) -> torch.Tensor:
        return torch.tensor([[len(text) + ord(text[:1] or " ") / 1e3 for text in row]
                             for row in responses])  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------ common.py


def padding_is_outside(batch: common.Batch) -> bool:
    """Prompts end, and responses begin, where they meet in a packed row."""
    prompts, responses = batch.prompt_mask.tolist(), batch.response_mask.flatten(0, 1).tolist()
    is_left = all(row == sorted(row) for row in prompts)
    return is_left and all(row == sorted(row, reverse=True) for row in responses)


def test_parts_of_any_widths_are_stacked_with_each_response_as_it_was() -> None:
    sizes = (([2, 5], [[1, 3], [2, 2]]), ([7], [[6, 4]]), ([3], [[1, 1]]))
    parts = [make_batch(*size, seed=seed) for seed, size in enumerate(sizes)]
    for seed, part in enumerate(parts):
        part.ref_logps = torch.randn(len(part), 2, generator=common.generator(seed))
    whole = common.stacked(parts)
    assert len(whole) == 4 and padding_is_outside(whole)
    origins = [(part, b) for part in parts for b in range(len(part))]
    for row, (part, b) in enumerate(origins):
        assert whole.columns["prompt"][row] == part.columns["prompt"][b]
        assert whole.responses[row] == part.responses[b]
        assert torch.equal(whole.ref_logps[row], part.ref_logps[b])
        for n in range(2):
            assert real_ids(whole, row, n) == real_ids(part, b, n)


def test_responses_of_any_lengths_are_put_beside_each_other_as_they_were() -> None:
    sizes = ([[1], [3]], [[6, 4], [2, 5]], [[2], [1]])
    parts = [make_batch([2, 5], lengths, seed=7) for lengths in sizes]
    for part, later in zip(parts, parts[1:]):
        later.prompt_ids, later.prompt_mask = part.prompt_ids, part.prompt_mask
    whole = common.beside(parts)
    assert padding_is_outside(whole) and whole.response_ids.shape == (2, 4, 6)
    for b in range(2):
        expected = [(part, n) for part in parts for n in range(part.response_ids.shape[1])]
        for place, (part, n) in enumerate(expected):
            assert real_ids(whole, b, place) == real_ids(part, b, n)
            assert whole.responses[b][place] == part.responses[b][n]


def test_with_argmax_labels_ties_are_decided_by_a_fair_coin_and_nothing_else_is(flags) -> None:
    oracle = Rule(common.Config(**flags | dict(labels="argmax")))
    for gap, rate in ((0.0, 0.5), (1e-6, 1.0), (-1e-6, 0.0)):
        rewards = torch.tensor([[gap, 0.0]]).expand(10_000, 2)
        is_first = oracle.prefer(["x"] * 10_000, [["a", "b"]] * 10_000, rewards)
        assert is_first.double().mean().item() == pytest.approx(rate, abs=0.02)  # 4 errors


def test_a_recorded_mean_weighs_each_round_by_its_pairs() -> None:
    run = SimpleNamespace(means={})
    for weight, value in ((2, 1.0), (0, math.nan), (6, 5.0)):
        common.Run.record(run, weight, {"loss": value})
    total, weight = run.means["loss"]
    assert total / weight == (1 + 1 + 6 * 5) / 8


def test_online_metrics_weigh_each_round_by_its_labels(flags, folder) -> None:
    """Rounds of 4, 4 and 1 labels in one row."""
    config = sea.Config(**flags | dict(explore="passive", num_queries=9, eval_every=100))
    run = sea.train(config, Rule(config))
    pairs = rows(run.folder / "preferences.jsonl")
    assert len({sum(pair["round"] == n for pair in pairs) for n in range(run.counts["rounds"])}) > 1
    references = {row["prompt"]: row["reference"] for row in rows(folder / "train.jsonl")}
    gaps = []
    for pair in pairs:
        texts = [references[pair["prompt"]], pair["chosen"].strip(), pair["rejected"].strip()]
        baseline, *both = run.oracle.score([pair["prompt"]], [texts])[0].tolist()
        gaps += [reward - baseline for reward in both]
    last = rows(run.folder / "metrics.jsonl")[-1]
    wins = [(gap > 0) + (gap == 0) / 2 for gap in gaps]
    assert len(gaps) == 18 and last["online_win_rate"] == pytest.approx(sum(wins) / 18)
    probabilities = [1 / (1 + math.exp(-gap)) for gap in gaps]
    assert last["online_win_probability"] == pytest.approx(sum(probabilities) / 18, abs=1e-5)


def test_a_pair_is_written_with_its_own_source_also_where_rows_before_it_are_dropped() -> None:
    written = []
    run = SimpleNamespace(counts=Counter(rounds=3), write=lambda _, pairs: written.extend(pairs))
    batch, chosen = make_batch([3] * 4, [[1, 1]] * 4), torch.tensor([0, 1, 0, 1])
    is_model = torch.tensor([True, False, True, True])
    kept = common.Run.keep(run, batch, chosen, torch.tensor([0, 0, 1, 0]), is_model)
    assert kept.tolist() == [1, 2, 3] and run.counts["synthetic_pairs"] == 2
    assert [pair["prompt"] for pair in written] == ["prompt 1", "prompt 2", "prompt 3"]
    assert [pair["source"] for pair in written] == ["oracle", "model", "model"]
    duels = [(pair["chosen"][9:], pair["rejected"][9:]) for pair in written]
    assert duels == [("1 1", "1 0"), ("2 0", "2 1"), ("3 1", "3 0")]


@torch.no_grad()
def test_each_step_compares_with_the_initial_model_once_the_policy_has_moved(
    flags, monkeypatch
) -> None:
    steps, update = [], common.update

    def listening(policy, optimizer, groups, *rest):
        steps.append([(group, group.ref_logps.clone()) for group in groups])
        with torch.enable_grad():
            return update(policy, optimizer, groups, *rest)

    monkeypatch.setattr(common, "update", listening)
    config = sea.Config(**flags | dict(explore="passive", learning_rate=1e-2, warmup_steps=0))
    run = sea.train(config, Rule(config))
    start = transformers.AutoModelForCausalLM.from_pretrained(flags["model"])
    assert len(steps) >= 3
    for group, ref_logps in (pair for step in steps for pair in step):
        expected = plain_token_logps(start, group).sum(-1)
        torch.testing.assert_close(ref_logps, expected, rtol=1e-3, atol=1e-3)
        moved = plain_token_logps(run.policy, group).sum(-1)
        assert (moved - expected).abs().max() > 0.1


def test_the_length_of_an_evaluation_is_a_mean_over_responses_without_padding(model) -> None:
    run = SimpleNamespace(
        eval_responses=lambda num, name: make_batch([3, 3, 3], [[1], [6], [2]]),
        policy=model, ref_model=model, config=SimpleNamespace(micro_batch_size=64, beta=0.1),
        oracle=SimpleNamespace(score=lambda _, texts: torch.zeros(len(texts), 1)),
        baseline=[["cat"]] * 3, baseline_rewards=torch.zeros(3), compared_with="reference",
    )  # fmt: skip
    metrics, _ = common.Run.evaluate(run)
    assert metrics["length"] == (1 + 6 + 2) / 3
    assert metrics["kl"] == 0 and metrics["win_rate"] == 0.5


def test_a_run_of_more_than_twenty_rounds_that_bring_labels_is_not_stopped_as_idle(flags) -> None:
    more = dict(explore="passive", batch_size=1, num_queries=22, eval_every=100)
    config = sea.Config(**flags | more)
    run = sea.train(config, Rule(config))
    assert run.oracle.queries == 22 and run.counts["rounds"] >= 22


def test_the_loss_of_a_row_weighs_each_step_by_its_pairs(flags, monkeypatch) -> None:
    losses = iter((1.0, 2.0, 4.0, 8.0))
    monkeypatch.setattr(common, "update", lambda *_: {"loss": next(losses)})
    config = sea.Config(**flags | dict(explore="passive", num_queries=9, eval_every=100))
    run = sea.train(config, Rule(config))
    assert run.oracle.queries == 9 and run.counts["rounds"] == 3
    last = rows(run.folder / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx((4 * 1 + 4 * 2 + 1 * 4) / 9)


@pytest.mark.parametrize("count", [3, 7, 16])
def test_each_epoch_has_each_prompt_once_in_an_order_of_its_own(count: int) -> None:
    prompts = make_batch([3] * 7, [[1]] * 7)
    run = SimpleNamespace(prompts=prompts, counts=Counter(), config=SimpleNamespace(seed=0))
    drawn = []
    while len(drawn) < 28:
        drawn += common.Run.next_prompts(run, count).columns["prompt"]
    epochs = [drawn[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(prompts.columns["prompt"]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


# ------------------------------------------------------------------ selm.py


def test_the_text_of_a_response_that_was_cut_is_the_text_of_its_tokens() -> None:
    """The oracle ranks texts and the policy is trained on tokens: they are of one response."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    run = SimpleNamespace(tokenizer=tokenizer, config=selm.Config(max_new_tokens=4))
    batch = make_batch([3, 3], [[1], [1]])
    batch.columns["other"] = ["zqzqzqzqz", "z"]
    batch = selm.own_responses(batch, "other", run)
    cut = batch.responses[0][0].strip()
    assert len(cut) < 9 and "zqzqzqzqz".startswith(cut)
    assert cut == tokenizer.decode(real_ids(batch, 0, 0)[1]).strip()
    assert batch.responses[1][0].strip() == "z"


def test_the_shares_of_y_are_of_the_prompts_that_had_something_to_rank(flags, tmp_path) -> None:
    """Two responses of one token are often equal: then y is neither best nor worst."""
    data = [dict(prompt=f"The cat {i}") for i in range(120)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    more = dict(dataset=str(tmp_path / "prompts.jsonl"), max_new_tokens=1, num_iterations=1)
    config = selm.Config(**flags | more | dict(num_queries=20))
    run = selm.train(config, Rule(config))
    last = rows(run.folder / "metrics.jsonl")[-1]
    pairs = rows(run.folder / "preferences.jsonl")
    assert len(pairs) < run.counts["prompts"]
    assert last["y_best"] + last["y_worst"] == pytest.approx(1.0) and last["y_middle"] == 0


def test_each_step_whose_loss_is_below_zero_is_counted_however_small_it_is(
    flags, monkeypatch
) -> None:
    losses = [0.4, -0.001, 0.0, -0.9, -5.0, 0.2] * 10
    monkeypatch.setattr(common, "update", lambda *_: {"loss": losses[len(seen)]})
    config, seen = selm.Config(**flags | dict(num_iterations=1, eval_every=1)), []
    learn = common.Run.learn

    def listening(run, *given, **named):
        result = learn(run, *given, **named)
        seen.append(result["loss"])
        return result

    monkeypatch.setattr(common.Run, "learn", listening)
    run = selm.train(dataclasses.replace(config, num_queries=60), Rule(config))
    table = [row for row in rows(run.folder / "metrics.jsonl") if row["rounds"]]
    assert len(seen) >= 5
    for row in table:
        assert row["negative_losses"] == sum(loss < 0 for loss in seen[: row["rounds"]])


# ------------------------------------------------------------------ sea.py


@torch.no_grad()
def test_a_feature_that_varies_by_rounding_alone_does_not_swamp_the_others_later() -> None:
    """Its own standard deviation as its unit would make of one small step a thousand units."""
    ensemble = sea.EpistemicRewardModel(6, sea.Config(device="cpu"), hidden=16)
    features = torch.randn(16, 4, 6, generator=common.generator(0))
    features[..., 2] = 1 + 1e-5 * features[..., 2]
    ensemble.calibrate(features)
    later = features.clone()
    later[..., 2] += 0.0078  # one step of bfloat16
    assert (ensemble(later) - ensemble(features)).abs().max() < 1


def test_bai_duels_two_candidates_also_where_no_head_doubts_any_duel() -> None:
    """All variances are then 0, as that of a candidate against itself is."""
    rewards = torch.tensor([100.0, 0.0, -100.0]).expand(5, 1, 3)
    is_distinct = torch.ones(1, 3, dtype=torch.bool)
    for variance in ("sigmoid", "logit"):
        for first in range(3):
            second = sea.second_bai(rewards, torch.tensor([first]), is_distinct, variance)
            assert second.item() != first


def test_best_of_n_is_the_reward_of_the_text_whose_mean_over_heads_is_largest() -> None:
    config = sea.Config(device="cpu", best_of_n=3)
    batch = make_batch([3, 3], [[1] * 3] * 2)
    batch.responses = [["a", "bb", "ccc"], ["dddd", "eeeee", "ffffff"]]
    heads = torch.tensor([[[9.0, 1.0, 1.0], [0.0, 0.0, 3.0]], [[-9.0, 1.0, 2.0], [7.0, 0.0, 3.0]]])
    run = SimpleNamespace(
        counts={"clashes": 4},
        eval_responses=lambda num, name: batch if num == 3 else None,
        oracle=SimpleNamespace(score=lambda _, texts: torch.tensor([[float(len(y)) for y in row]
                                                                    for row in texts])),
        baseline_rewards=torch.tensor([3.0, 3.0]),
    )  # fmt: skip
    metrics = sea.own_metrics(config, run, lambda features: features, lambda _: heads)
    # the means are 0, 1, 1.5 and 3.5, 0, 3: "ccc", which ties, and "dddd", which wins by one
    assert metrics["best_of_n_reward"] == 3.5 and metrics["best_of_n_win_rate"] == 0.75
    slope = 1 / (1 + math.exp(-1))
    assert metrics["best_of_n_win_probability"] == pytest.approx((0.5 + slope) / 2)
    assert metrics["clashes"] == 4


def test_apl_draws_four_times_the_prompts_that_it_compares(flags, folder) -> None:
    config = sea.Config(**flags | dict(explore="apl"))
    run = sea.train(config, Rule(config))
    pairs = rows(run.folder / "preferences.jsonl")
    num_rounds = run.counts["rounds"]
    assert run.counts["prompts"] == 4 * 4 * num_rounds
    assert run.counts["candidates"] == 8 * 4 * 4 * num_rounds
    for number in range(num_rounds):
        assert 0 < sum(pair["round"] == number for pair in pairs) <= 4


def test_the_scales_of_the_ensemble_are_set_in_the_first_round_alone(
    flags, folder, monkeypatch
) -> None:
    seen, calibrate = [], sea.EpistemicRewardModel.calibrate

    def listening(ensemble, features):
        seen.append(features)
        calibrate(ensemble, features)

    monkeypatch.setattr(sea.EpistemicRewardModel, "calibrate", listening)
    config = sea.Config(**flags | dict(erm_backbone=str(folder / "erm_backbone")))
    run = sea.train(config, Rule(config))
    assert run.counts["rounds"] >= 3 and len(seen) == 1
    mean = sum(row for prompt in seen[0] for row in prompt) / (4 * 20)
    torch.testing.assert_close(run.parts["ensemble"].mean, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("burn_in", [0, 4, 6])
def test_synthetic_pairs_come_from_the_round_on_that_begins_with_burn_in_labels(
    burn_in: int, flags, folder
) -> None:
    more = dict(gamma=0.1, burn_in=burn_in, num_queries=10)
    config = sea.Config(**flags | more | dict(erm_backbone=str(folder / "erm_backbone")))
    run = sea.train(config, Rule(config))
    pairs, num_labels, num_mixed = rows(run.folder / "preferences.jsonl"), 0, 0
    for number in range(run.counts["rounds"]):
        sources = [pair["source"] for pair in pairs if pair["round"] == number]
        if num_labels < burn_in:
            assert set(sources) == {"oracle"}
        elif num_mixed == 0:  # nine in ten of four prompts
            assert "model" in sources
        num_mixed += num_labels >= burn_in
        num_labels += sources.count("oracle")
    assert num_mixed > 0


def test_clashes_are_counted_over_all_rounds(flags, folder, monkeypatch) -> None:
    seen, choose_duels = [], sea.choose_duels

    def listening(*given):
        first, second, is_clash = choose_duels(*given)
        seen.extend(is_clash.tolist())
        return first, second, is_clash

    monkeypatch.setattr(sea, "choose_duels", listening)
    more = dict(explore="ee", num_heads=2, num_candidates=2, eval_every=100)
    config = sea.Config(**flags | more | dict(erm_backbone=str(folder / "erm_backbone")))
    run = sea.train(config, Rule(config))
    last = rows(run.folder / "metrics.jsonl")[-1]
    assert last["clashes"] == sum(seen) > sum(seen[-4:])


def test_the_heads_learn_from_the_features_of_the_chosen_and_the_rejected_response(
    flags, monkeypatch
):
    labelled, learned = [], []
    ask, fit = common.Run.ask, sea.EpistemicRewardModel.fit

    def listen(run, batch, *duels):
        labelled.append((run, batch, ask(run, batch, *duels)))
        return labelled[-1][-1]

    def watch(ensemble, new_pairs, rng):
        learned.append(new_pairs)
        fit(ensemble, new_pairs, rng)

    monkeypatch.setattr(common.Run, "ask", listen)
    monkeypatch.setattr(sea.EpistemicRewardModel, "fit", watch)
    sea.train(sea.Config(**flags, erm_backbone="reference"))
    assert sum(map(len, learned)) == 12
    for (run, batch, (rows, chosen, rejected)), pairs in zip(labelled, learned, strict=True):
        with torch.no_grad():
            features = sea.packed_features(run.ref_model.base_model, batch)
        for row, pair in zip(rows, pairs, strict=True):
            expected = [features[row, chosen[row]], features[row, rejected[row]]]
            torch.testing.assert_close(pair, torch.stack(expected), rtol=1e-4, atol=1e-4)
