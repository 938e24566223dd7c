"""Do SELM's loss, rankings and iterations do what the paper and the corrections to it define?"""

import copy
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import common
import harness
import selm
from common import Batch, UserError, generator
from selm import Config, bonus_loss, pair_loss

import pytest
import torch
from conftest import make_batch, make_model, plain_response, plain_token_logps, real_ids, rows, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BETA, ALPHA, NUM_ARMS, BOTH = 0.3, 0.7, 12, ("reference", "other")
BONUSES = [("selm", ALPHA * BETA), ("xpo", ALPHA)]  # and what a nat of y weighs in the loss


def world(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Twelve arms: logits of a policy, which want a gradient, and a reference's probabilities."""
    logits, ref = torch.randn(2, NUM_ARMS, generator=generator(seed, "world"), dtype=torch.float64)
    return logits.requires_grad_(), (2 * ref).softmax(0)


def expected_bonus(logits: Tensor, ref: Tensor, source: Tensor, bonus: str = "selm") -> Tensor:
    """The bonus of each arm as y, weighted by the probability that `source` draws it."""
    return source @ bonus_loss(logits.log_softmax(0), ref.log(), ALPHA, BETA, bonus)


@pytest.mark.parametrize("bonus,weight", BONUSES)
def test_at_policy_equal_to_reference_only_a_greedy_y_has_an_expected_gradient(bonus, weight):
    logits, ref = world()
    mode = nn.functional.one_hot(ref.argmax(), NUM_ARMS).double()
    for start in (logits, ref.log().requires_grad_()):
        for source in (ref, mode):
            (slope,) = torch.autograd.grad(expected_bonus(start, ref, source, bonus), start)
            torch.testing.assert_close(slope, weight * (source - start.detach().softmax(0)))
            assert (slope.abs().max() < 1e-15) == (start is not logits and source is ref)


def test_the_expected_bonus_is_minus_the_forward_kl_and_theorem_5_1_holds_for_any_rho() -> None:
    (logits, ref), rho = world(), world(1)[0].detach().softmax(0)
    reward = bonus_loss(rho.log(), ref.log(), 1.0, BETA)  # rho's implicit reward
    minimiser = (rho.log() - reward / BETA).softmax(0)
    noise = torch.randn(99, NUM_ARMS, generator=generator(0, "noise"), dtype=torch.float64)
    policies = torch.cat([minimiser[None], (minimiser.log() + 0.1 * noise).softmax(-1)])
    objective = policies @ reward + BETA * (policies * (policies / rho).log()).sum(-1)
    assert objective.argmin() == 0
    bonuses = [expected_bonus(logits, ref, source) for source in (ref, minimiser)]
    kl = sum(q * math.log(q / p) for q, p in zip(ref.tolist(), logits.softmax(0).tolist()))
    assert bonuses[0].item() == pytest.approx(-ALPHA * BETA * kl) and kl > 0
    torch.testing.assert_close(*(torch.autograd.grad(bonus, logits)[0] for bonus in bonuses))


def test_the_gradient_of_the_whole_loss_is_eq_4_3() -> None:
    (logits, ref), best, worst = world(), 3, 7
    trios = torch.tensor([[best, worst, y] for y in range(NUM_ARMS)])  # y by enumeration
    given = Config(alpha=ALPHA, beta=BETA), logits.log_softmax(0)[trios], ref.log()[trios], None
    (gradient,) = torch.autograd.grad(ref @ pair_loss(*given), logits)
    policy = logits.detach().softmax(0)
    scores = torch.eye(NUM_ARMS, dtype=torch.float64) - policy  # row y: grad log pi(y)
    reward = BETA * (policy.log() - ref.log())
    expected = -BETA * (reward[worst] - reward[best]).sigmoid() * (scores[best] - scores[worst])
    expected += ALPHA * BETA * (policy * (-reward / BETA).exp()) @ scores
    torch.testing.assert_close(gradient, expected)


def test_at_alpha_0_the_loss_is_dpos_bit_for_bit_and_without_a_bonus_y_is_not_there() -> None:
    logps, ref_logps = -30 * torch.rand(2, 12, 3, generator=generator(0, "logps"))
    gap = (logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1]
    for width, more in ((3, dict(alpha=0.0)), (2, dict(bonus="none"))):
        given = Config(beta=BETA, **more), logps[:, :width], ref_logps[:, :width], None
        assert torch.equal(pair_loss(*given), -nn.functional.logsigmoid(BETA * gap))


@pytest.mark.parametrize("y", [0, 1, 2])
@pytest.mark.parametrize("bonus,weight", BONUSES)
def test_the_bonus_adds_alpha_beta_to_dpos_slope_at_y_wherever_y_ranks(bonus, weight, y) -> None:
    logps, ref_logps = -30 * torch.rand(2, 12, 3, generator=generator(0, "logps")).double()
    logps.requires_grad_()
    config, trio = Config(bonus=bonus, alpha=ALPHA, beta=BETA), [0, 1, y]
    losses = pair_loss(config, logps[:, trio], ref_logps[:, trio], None)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    for b, (now, ref) in enumerate(zip(logps.tolist(), ref_logps.tolist())):
        odds = math.exp(-BETA * ((now[0] - ref[0]) - (now[1] - ref[1])))
        term = weight * (now[y] - ref[y] if bonus == "selm" else now[y])
        assert losses[b].item() == pytest.approx(math.log(1 + odds) + term)
        dpo = BETA * odds / (1 + odds)
        slopes = [slope + weight * (n == y) for n, slope in enumerate((-dpo, dpo, 0.0))]
        assert gradient[b].tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("bonus", ["selm", "xpo"])
def test_a_step_on_the_bonus_alone_makes_y_less_likely(model, bonus: str) -> None:
    config = Config(learning_rate=1e-4, warmup_steps=0)
    pairs, policy = make_batch([5, 3, 7], [[4, 2, 6]] * 3), copy.deepcopy(model)
    pairs.ref_logps = common.frozen_logps(model, pairs, config)
    alone = lambda now, ref, _: bonus_loss(now[:, 2], ref[:, 2], ALPHA, BETA, bonus)  # noqa: E731
    common.train_step(policy, common.start_optimizer(policy, config), pairs, alone, config)
    with torch.no_grad():
        before, after = (plain_token_logps(m, pairs)[:, 2].sum(-1) for m in (model, policy))
    assert (after - before).mean() < -1e-3


class Rule(harness.Oracle):
    """An oracle by a rule on texts; it keeps the checkpoint that each round starts from."""

    def __init__(self, config: Config, value) -> None:
        super().__init__(config)
        self.value, self.states = value, {}

    def score(self, prompts: list[str], responses: list[list[str]]) -> Tensor:
        for path in self.path.parent.glob("checkpoint.pt") if self.path else ():
            state = torch.load(path, weights_only=True)
            self.states[state["run"]["round"]] = state
        return torch.tensor([[self.value(text.strip()) for text in row] for row in responses])


def prompts_of(num: int, texts: list | None = None, limit: int = 12, **columns: list) -> Batch:
    """Prompts numbered in file order, with these texts, whose tokens are left out."""
    texts = texts or [[]] * num
    ids, none = torch.ones(num, 1).long(), torch.zeros(num, len(texts[0]), limit).long()
    columns = {"prompt": [f"prompt {n}" for n in range(num)]} | columns
    return Batch(columns, ids, ids, texts, none, none)


@pytest.mark.parametrize("bonus", ["selm", "none"])
def test_argmax_takes_the_extreme_scores_of_distinct_texts_at_a_tournaments_cost(bonus) -> None:
    letters = torch.randint(3, (60, 3), generator=generator(0, "letters")).tolist()
    texts = [["abc"[i] + " " * n for n, i in enumerate(row)] for row in letters]
    config, scores = Config(bonus=bonus, labels="argmax"), dict(a=0.5, b=-1.0, c=0.7)
    oracle = Rule(config, scores.get)
    asked, picks = selm.rank(config, oracle, prompts_of(60, texts), 0)
    distinct = [{text.strip() for text in row} for row in texts]
    assert asked.tolist() == [n for n in range(60) if len(distinct[n]) > 1] != list(range(60))
    assert oracle.queries == sum({1: 0, 2: 1, 3: 3}[len(row)] for row in distinct)
    for n, (best, worst, *y) in zip(asked.tolist(), picks.tolist()):
        assert texts[n][best].strip() == max(distinct[n], key=scores.get)
        assert texts[n][worst].strip() == min(distinct[n], key=scores.get)
        assert y == ([] if bonus == "none" else [0])


@pytest.mark.parametrize("texts", ["ab", "abc", "abcd", "abac"])
def test_a_noisy_ranking_has_plackett_luces_probabilities_of_best_and_worst(texts: str) -> None:
    num, scores, chances = 5_000, dict(a=0.8, b=-0.5, c=0.1, d=1.2), Counter()
    given = Config(), Rule(Config(), scores.get), prompts_of(num, [list(texts)] * num), 0
    picks = selm.rank(*given)[1]
    for order in itertools.permutations(sorted(set(texts))):  # the second "a" of "abac" is no text
        odds = [math.exp(scores[text]) for text in order]
        chance = math.prod(odd / sum(odds[n:]) for n, odd in enumerate(odds))
        chances[texts.index(order[0]), texts.index(order[-1])] += chance
    seen = Counter(map(tuple, picks[:, :2].tolist()))
    assert seen.keys() == chances.keys()
    for pair, chance in chances.items():
        spread = math.sqrt(chance * (1 - chance) / num)
        assert seen[pair] / num == pytest.approx(chance, abs=4 * spread)


@pytest.mark.parametrize("labels,num_different", [("bernoulli", 4), ("argmax", 1)])
def test_the_noise_changes_with_seed_and_round_and_argmax_has_none(labels, num_different) -> None:
    batch, found = prompts_of(200, [["aa", "a", ""]] * 200), []
    for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0), (1, 1)):
        config = Config(seed=seed, labels=labels)
        found.append(selm.rank(config, Rule(config, len), batch, number)[1].tolist())
    assert found[0] == found[1] and len(set(map(str, found))) == num_different


def test_the_shares_of_y_count_where_response_0_stands() -> None:
    picks = torch.tensor([[0, 2, 0], [2, 0, 0], [1, 2, 0], [2, 1, 0], [3, 0, 0]])
    assert selm.y_ranks(picks) == pytest.approx(dict(y_best=0.2, y_middle=0.4, y_worst=0.4))
    assert selm.y_ranks(picks[:0]) == {}


@pytest.mark.parametrize("source", ["greedy", "sample"])
def test_candidate_0_is_y_greedy_unless_sampled_further_ones_are_not(model, tokenizer, source):
    prompts, batch = prompts_of(3, limit=8), make_batch([5, 3, 9], [[1]] * 3)
    prompts.prompt_ids, prompts.prompt_mask = batch.prompt_ids, batch.prompt_mask
    config = Config(bonus_response=source, ranker_candidates=2, max_new_tokens=8, temperature=0.7)
    found = selm.candidates(config, model, tokenizer, prompts, generator(0, "candidates"))
    sampled = common.respond(model, tokenizer, prompts, 3, generator(0, "candidates"), config)
    for b in range(3):
        greedy = plain_response(model, real_ids(batch, b, 0)[0], [0.5] * 8, [0], 1e-4)
        ids, plain = ([real_ids(part, b, n)[1] for n in range(3)] for part in (found, sampled))
        assert greedy not in plain and plain[1:] == ids[1:]
        assert ids[0] == (greedy if source == "greedy" else plain[0])


@pytest.mark.parametrize("is_chat", [False, True])
def test_own_responses_have_a_space_or_a_template_no_bos_and_eos_unless_cut(tokenizer, is_chat):
    tokenizer, texts = copy.deepcopy(tokenizer), ["the cat\n", " zqzqzq", "a"]
    tokenizer.chat_template = "{{ messages[0].content }}" if is_chat else None
    for limit in range(1, 12):
        batch = selm.own_responses(prompts_of(3, limit=limit, other=texts), "other", tokenizer)
        for b, text in enumerate(texts):
            ids, text = real_ids(batch, b, 0)[1], " " * (not is_chat) + text.strip()
            assert [1, *ids] == (tokenizer(text)["input_ids"] + [0])[: limit + 1]  # 1 is BOS
            assert batch.responses[b] == [tokenizer.decode([i for i in ids if i != 0])]


def test_alpha_and_the_factors_depend_on_the_bonus_and_the_iterations() -> None:
    assert [Config(bonus=name).alpha for name in ("selm", "xpo", "none")] == [1e-3, 1e-5, 0.0]
    found = [Config(num_iterations=num).learning_rate_factors for num in (1, 3)]
    assert sum(found, []) == pytest.approx([1.0, 1.0, 0.6, 0.2])


@pytest.mark.parametrize("columns,more,cost", [
    (BOTH, {}, 3), (("other",), {}, 1), ((), {}, 1), (BOTH, dict(bonus="xpo"), 1),
    ((), dict(ranker_candidates=3), 4), (BOTH, dict(ranker_candidates=2), 6),
])  # fmt: skip
def test_a_plan_shares_the_labels_out_and_what_does_not_fit_is_refused(columns, more, cost) -> None:
    prompts = prompts_of(30, **{name: ["a"] * 30 for name in columns})
    right = dict(num_queries=30 * cost + 2, batch_size=4, warmup_steps=2) | more
    config = Config(**right)
    for raise_by, num_iterations in ((0, 3), (20 * cost - 1, 4), (1, 5)):  # as --resume does
        config.num_queries += raise_by
        assert selm.plan(config, prompts) == (num_iterations, 10)
    config.num_queries = config.planned_queries + 10 * cost - 1
    with pytest.raises(UserError, match=f"an iteration more takes {10 * cost} labels"):
        selm.plan(config, prompts)
    wrong = dict(num_queries=33 * cost), dict(num_queries=3 * cost - 1), dict(warmup_steps=3)
    for flags, words in zip(wrong, ("needs 11", "pays for no prompt", "--warmup_steps 3")):
        with pytest.raises(UserError, match=words):
            selm.plan(Config(**right | flags), prompts)


@pytest.mark.parametrize("num_iterations,size", [(4, 15283), (3, 20378)])
def test_slices_are_disjoint_and_in_file_order(num_iterations: int, size: int) -> None:
    config, prompts = Config(num_iterations=num_iterations), prompts_of(61135)
    parts = [selm.slice_of(prompts, t, config).columns["prompt"] for t in range(num_iterations)]
    for t, part in enumerate(parts):
        assert part == [f"prompt {n}" for n in range(t * size, (t + 1) * size)]


def test_forward_kl_is_the_references_against_the_policy_at_temperature_1(model, tokenizer) -> None:
    batch, policy, num = make_batch([5], [[1]]), copy.deepcopy(model), 1000
    held_out = batch.select(torch.zeros(num).long(), torch.zeros(num, 0).long())
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(0.5)
        q, p = (m(batch.prompt_ids).logits[0, -1].double().softmax(-1) for m in (model, policy))
    kl = (q * (q / p).log()).sum().item()
    spread = math.sqrt(((q * (q / p).log().square()).sum().item() - kl**2) / num)
    task = harness.Task(policy, None, tokenizer, None, held_out, None)
    configs = [Config(max_new_tokens=1, temperature=0.5, seed=seed) for seed in (0, 1)]
    found = [selm.forward_kl(task, config, model)["forward_kl"] for config in configs]
    assert found == pytest.approx([kl, kl], abs=4 * spread) and kl > 6 * spread
    assert found[0] != found[1]


def run_of(flags: dict, **more) -> SimpleNamespace:
    """Three iterations of two rounds, of two prompts and one, at three labels a prompt."""
    lively = dict(num_queries=29, batch_size=2, eval_every=1, learning_rate=3e-3, alpha=0.5)
    config = Config(**flags | lively | more)
    oracle = Rule(config, lambda text: sum(text.encode()) % 97 / 24 - 2)
    folder = selm.train(config, oracle).folder
    oracle.score([], [])  # keeps the last checkpoint too
    files = {name: rows(folder / f"{name}.jsonl") for name in ("metrics", "preferences", "labels")}
    return SimpleNamespace(states=oracle.states, **files)


def models_of(run: SimpleNamespace, number: int) -> tuple[nn.Module, nn.Module]:
    """The policy that a round starts with and the snapshot that it uses."""
    weights = run.states[number]["policy"], run.states[number + 1]["snapshot"]
    models = tuple(make_model(AutoModelForCausalLM, "gpt_neox", 1) for _ in weights)
    for model, values in zip(models, weights):
        model.load_state_dict(values)
    return models


def test_iterations_are_arithmetic_and_a_raised_budget_adds_one_as_long_as_the_others(flags):
    for num, more in ((3, {}), (4, dict(resume=flags["output_dir"], num_queries=29 + 9 + 8))):
        found = run_of(flags, eval_every=1000, **more)
        for name, factor in (("iteration", 1), ("round", 2), ("queries", 9), ("candidates", 3)):
            assert [row[name] for row in found.metrics] == [factor * t for t in range(num + 1)]
        numbers = [int(row["prompt"].split(".")[0].split()[-1]) for row in found.preferences]
        assert [number // 13 for number in numbers] == [t % 3 for t in range(num) for _ in "123"]
        assert len(set(numbers)) == 9
        assert [row["round"] % 2 for row in found.preferences] == [0, 0, 1] * num


def test_an_iteration_starts_with_its_reference_a_loss_of_log_2_and_a_fresh_optimiser(flags):
    run = run_of(flags, learning_rate_factors=[1.0, 0.5, 0.25], warmup_steps=1)
    for number in range(6):
        t, step = divmod(number, 2)
        start, state, row = run.states[2 * t], run.states[number + 1], run.metrics[number + 1]
        for name, weight in state["snapshot"].items():
            assert torch.equal(weight, start["policy"][name])
        group, peak = state["optimizer"]["param_groups"][0], 3e-3 * 0.5**t
        assert [group["peak"], group["lr"]] == pytest.approx([peak, peak * (step + 1) / 2])
        assert {int(own["step"]) for own in state["optimizer"]["state"].values()} == {step + 1}
        is_start = row["loss"] == torch.tensor(math.log(2)).item() and row["y_reward"] == 0
        assert is_start == (step == 0) and row["forward_kl"] != run.metrics[0]["forward_kl"] == 0


def test_y_is_greedy_from_the_reference_and_ranked_with_the_data_sets_two(flags, tokenizer) -> None:
    run, is_stale, noises = run_of(flags), set(), set()
    asked = iter(run.labels)
    for number, metrics in enumerate(run.metrics[1:]):
        models, gaps, is_best = models_of(run, number), [], []
        for pair in [pair for pair in run.preferences if pair["round"] == number]:
            prompt, label = tokenizer(pair["prompt"])["input_ids"], next(asked)
            stale, y = (plain_response(model, prompt, [0.5] * 6, [0], 1e-4) for model in models)
            name = "cat " + pair["prompt"].split(".")[0].split()[-1]
            own = [tokenizer(f" {text}")["input_ids"][1:7] for text in (name, f"a {name}")]
            texts = tokenizer.batch_decode([y, *own], skip_special_tokens=True)
            assert label["texts"] == [text.strip() for text in texts]
            ranking = [text for _, text in sorted(zip(label["answer"], texts))]
            assert [pair["rejected"], pair["chosen"]] == ranking[::2]
            logits = [m(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1] for m in models]
            nats = [-x.log_softmax(-1)[range(len(y)), y].sum().item() for x in logits]
            gaps.append(0.1 * (nats[1] - nats[0]))  # 0.1 is beta
            is_best.append(pair["chosen"] == texts[0])
            is_stale.add(stale != y)
            noises.add(round(label["answer"][0] - label["rewards"][0], 4))
        assert metrics["y_reward"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-3)
        assert metrics["y_best"] == pytest.approx(sum(is_best) / len(is_best))
    assert is_stale == {True, False} and len(noises) == 9
    for row in run.metrics[2::2]:  # after the rounds of one prompt
        odds = math.exp(row["rejected_reward"] - row["chosen_reward"])
        assert row["loss"] == pytest.approx(math.log(1 + odds) + 0.5 * row["y_reward"], abs=1e-4)


def test_alpha_0_is_iterative_dpo_in_preferences_and_losses(flags) -> None:
    zero, none = run_of(flags, alpha=0.0), run_of(flags, bonus="none", alpha=None, overwrite=True)
    losses = [[row["loss"] for row in run.metrics[1:]] for run in (zero, none)]
    assert zero.preferences == none.preferences and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "y_reward" in zero.metrics[1] and "y_reward" not in none.metrics[1]


def test_xpo_duels_snapshot_and_frozen_reference_and_replays(flags, tmp_path, tokenizer) -> None:
    """At this temperature all samples are greedy; --ref_model is another model than --model."""
    reference = make_model(AutoModelForCausalLM, "gpt_neox", 9)
    more = dict(ref_model=save(reference, tmp_path / "ref"), labels="argmax", alpha=0.01)
    run, is_stale = run_of(flags, bonus="xpo", num_queries=11, temperature=1e-4, **more), set()
    pairs, asked = [Batch(**part) for part in run.states[6]["replay"]], iter(run.labels)
    assert [len(part) for part in pairs] == [2, 1] * 3 and run.metrics[-1]["candidates"] == 18
    for number, metrics in enumerate(run.metrics[1:]):
        policy, snapshot = models_of(run, number)
        for prompt, responses in zip(pairs[number].columns["prompt"], pairs[number].responses):
            prompt, label = tokenizer(prompt)["input_ids"], next(asked)
            models = (snapshot, reference, policy)
            ids = [plain_response(model, prompt, [0.5] * 6, [0], 1e-4) for model in models]
            *duel, stale = tokenizer.batch_decode(ids, skip_special_tokens=True)
            assert label["texts"] == [text.strip() for text in duel]
            is_second = label["rewards"][1] > label["rewards"][0]
            assert responses == [duel[is_second], duel[not is_second], duel[1]]
            is_stale.add(stale != duel[0])
        losses = []
        for part in pairs[number % 2 : number + 1 : 2]:  # the same round of each iteration so far
            logps, refs = (plain_token_logps(m, part).sum(-1) for m in (policy, reference))
            gap = (logps - refs)[:, 0] - (logps - refs)[:, 1]
            losses += (torch.log1p((-0.1 * gap).exp()) + 0.01 * logps[:, 2]).tolist()
        assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert is_stale == {True, False}


def test_prompts_alone_get_a_sample_beside_y_that_changes_with_seed_and_round(flags, tmp_path):
    """One prompt, two iterations and no learning: y stays the same."""
    (tmp_path / "prompts.csv").write_text("prompt\nThe cat. TL;DR:\nA held-out cat. TL;DR:\n")
    given = dict(dataset=str(tmp_path / "prompts.csv"), num_iterations=1, learning_rate=0.0)
    found = run_of(flags, seed=1, num_queries=1, **given).labels
    assert len(run_of(flags, overwrite=True, num_queries=1, **given).labels) == 1
    found += run_of(flags, resume=flags["output_dir"], num_queries=2, **given).labels
    y, samples = zip(*(row["texts"] for row in found))
    assert len(set(y)) == 1 and len(set(samples)) == len(samples) == 3
    with pytest.raises(UserError, match="no responses to rank"):
        run_of(flags, overwrite=True, ranker_candidates=0, **given)


def test_a_named_column_is_the_second_response(flags) -> None:
    run = run_of(flags, other_column="reference")
    assert all(row["texts"][1] == row["texts"][2] for row in run.labels)
    assert run.metrics[-1]["queries"] == len(run.labels) == 9  # one each: two texts are the same
