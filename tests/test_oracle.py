"""Is the annotator asked, paid and believed as it should be? Oracles of one's own, and labels."""

import contextlib
import math
from pathlib import Path

import common
import harness

import pytest
import torch
from conftest import contents, make_model, make_tokenizer, rows, save
from test_loading import CLASSIFIER, TEMPLATE
from test_run import ARMS, SCRIPTS, Rule, config_of, train

HEAD = dict(num_labels=1)  # and no padding token


class Alphabetical(harness.Oracle):
    """Compares alone, as a person would."""

    def prefer(self, prompts, duels, rewards):
        assert rewards is None
        return torch.tensor([first < second for first, second in duels])


def labels_of(config: harness.Config, gap: float, *nums: int) -> torch.Tensor:
    """Which duels the first text won, in rounds of so many, where it is scored `gap` higher."""
    scores = {"score": lambda self, x, y: torch.tensor([[gap, 0.0]]).repeat(len(x), 1)}
    oracle = type("Constant", (harness.Oracle,), scores)(config)
    answers = [oracle.ask(["x"] * num, [["a", "b"]] * num, [1] * num, None) for num in nums]
    assert oracle.queries == sum(nums)
    return torch.tensor([row["answer"] for row in sum(answers, [])])


@pytest.mark.parametrize("gap", [-1.0, 0.0, 2.0])
def test_bernoulli_labels_have_the_frequency_of_bradley_terry(gap, flags):
    rate = labels_of(config_of("pilaf", flags), gap, 4000).double().mean().item()
    expected = math.exp(gap) / (math.exp(gap) + 1)
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


def test_argmax_takes_the_larger_reward_however_close_and_tosses_a_coin_for_a_tie(flags):
    config = config_of("pilaf", flags, labels="argmax")
    assert labels_of(config, 1e-6, 100).all() and not labels_of(config, -1e-6, 100).any()
    assert labels_of(config, 0.0, 2000).double().mean().item() == pytest.approx(0.5, abs=0.045)


def test_the_coins_differ_from_label_to_label_from_round_to_round_and_with_the_seed(flags):
    config = config_of("pilaf", flags)
    coins, again = labels_of(config, 0.0, 64, 64), labels_of(config, 0.0, 128)
    other = labels_of(config_of("pilaf", flags, seed=1), 0.0, 128)
    assert torch.equal(coins, again)  # two rounds of 64 are one of 128
    for a, b in ((coins[:64], coins[64:]), (coins[1:], coins[:-1]), (coins, other)):
        assert 0.25 < (a != b).double().mean() < 0.75


@pytest.mark.parametrize("judge", [Rule, Alphabetical])
@pytest.mark.parametrize("script, arm", [ARMS[0], ARMS[2], ARMS[4]])
def test_score_or_prefer_alone_needs_no_reward_model(script, arm, judge, flags, monkeypatch):
    monkeypatch.chdir(Path(flags["output_dir"]).parent)
    flags |= {"reward_model": "./tiny/reward_model"}  # the default, which is not in this folder
    folder = train(script, flags, judge, labels="argmax", **arm)
    pairs = [row for row in rows(folder / "preferences.jsonl") if row["source"] == "oracle"]
    texts = [(row["chosen"].strip(), row["rejected"].strip()) for row in pairs]
    is_right = {Rule: lambda a, b: len(set(a)) >= len(set(b)), Alphabetical: lambda a, b: a < b}
    assert len(texts) == 12 and all(is_right[judge](*pair) for pair in texts)
    last = rows(folder / "metrics.jsonl")[-1]
    assert ({"win_rate", "reward"} <= last.keys()) == (judge is Rule) and "kl" in last


@pytest.mark.parametrize("script, more", [("selm", {}), ("sea", dict(best_of_n=2))])
def test_a_ranking_and_the_best_of_n_need_scores(script, more, flags):
    with pytest.raises(common.UserError, match="score"):
        train(script, flags, Alphabetical, **more)


class Watched(Rule):
    """Before each question it looks at the file: all answers so far are there."""

    num_before = None

    def score(self, prompts, responses):
        if len(responses[0]) > 1:
            num_lines = len(rows(Path(self.config.output_dir) / "labels.jsonl"))
            self.num_before = num_lines if self.num_before is None else self.num_before
            assert num_lines == self.num_before + len(self.asked)
        return super().score(prompts, responses)


def ask(script: str, flags: dict, patience: int | None = None, **more) -> list[tuple]:
    """Train until a judge's patience is at an end, if it ever is; what it was asked."""
    config = config_of(script, flags, **more)
    oracle = Watched(config)
    oracle.stop_at = patience
    with contextlib.nullcontext() if patience is None else pytest.raises(TimeoutError):
        SCRIPTS[script].train(config, oracle)
    return oracle.asked


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("every", [1, 1000])
def test_an_oracle_that_fails_again_is_asked_nothing_twice(script, every, flags, tmp_path):
    more = {"checkpoint_every": every, "eval_every": 4 * every}
    more |= {"num_iterations": 1} if script == "selm" else {}
    expected = ask(script, flags, **more, output_dir=str(tmp_path / "whole"))
    asked = ask(script, flags, 5, **more)
    for patience in (3, 3, 0, None):
        asked += ask(script, flags, patience, **more, resume="")
    assert asked == expected and len(set(asked)) == 12
    assert contents(Path(flags["output_dir"])) == contents(tmp_path / "whole")


def test_a_half_written_last_line_is_dropped_and_its_question_asked_again(flags, tmp_path):
    ask("pilaf", flags, output_dir=str(tmp_path / "whole"))
    asked, path = ask("pilaf", flags, 6), Path(flags["output_dir"]) / "labels.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    again = ask("pilaf", flags, resume="")
    assert again[0] == asked[-1] and len(asked + again) == 13
    assert contents(path.parent) == contents(tmp_path / "whole")
    extra = {"prompt": "?", "texts": ["a", "b"], "answer": True, "rewards": None}
    path.write_text(path.read_text() + harness.to_lines([extra]))  # a round came out otherwise
    ask("pilaf", flags, resume="", num_queries=16)
    assert torch.load(path.with_name("checkpoint.pt"))["labels"] == (16, 17, [extra])


def test_a_resumed_run_that_asks_in_another_order_keeps_all_that_it_bought(flags, tmp_path):
    """On a GPU rounds are not quite repeated: B and C, bought before the crash, are still there."""
    start, asked, states, words = (0, 0, []), [], [], dict(A="ps", B="qs", C="qt", X="pt")
    for questions in ("ABC", "AX", "XCB"):  # the crash comes after the first, before a checkpoint
        oracle = Rule(config_of("pilaf", flags))
        oracle.open(tmp_path / "labels.jsonl", *(states[-1] if len(states) == 2 else start))
        prompts, texts = zip(*((words[name][0], [words[name][1], "no"]) for name in questions))
        answers = oracle.ask(prompts, texts, [1] * len(questions), None)
        assert [row["texts"] for row in answers] == [*texts]
        states.append((oracle.queries, oracle.num_lines, [*oracle.unused]))
        asked.append([prompt + first for prompt, (first, _) in oracle.asked])
    assert asked == [[words[name] for name in names] for names in ("ABC", "X", "X")]
    assert states[-1] == (5, 5, [])
    for name, num_bought in (("labels.jsonl", 5), ("new.jsonl", 0)):  # another run's are not ours
        oracle.open(tmp_path / name, *start)
        assert (len(oracle.unused), oracle.queries) == (num_bought, 0)


def test_what_was_bought_in_part_is_scored_whole_again(flags, tmp_path):
    """Else the rest would stand in another batch, and a resumed run would differ in last digits."""
    path, sizes, whole = tmp_path / "labels.jsonl", [], ""

    class Counted(harness.RewardModelOracle):
        def score(self, prompts, responses):
            sizes.append(len(prompts))
            return super().score(prompts, responses)

    for num_kept in (0, 6, 8):
        path.write_text("".join(whole.splitlines(True)[:num_kept]))
        oracle = Counted(config_of("pilaf", flags))
        oracle.open(path, 0, 0, [])
        prompts, duels = [f"Cat {n}" for n in range(8)], [["cats" * n, "mat"] for n in range(8)]
        answers = oracle.ask(prompts, duels, [1] * 8, None)
        whole = whole or path.read_text()
        assert path.read_text() == whole and sizes[-1:] == [8]
        expected = [oracle.score([x], [y])[0].tolist() for x, y in zip(prompts, duels)]
        assert sum((row["rewards"] for row in answers), []) == pytest.approx(sum(expected, []))
    with pytest.raises(common.UserError, match="128 tokens at most"):
        oracle.score(["cat " * 200], [["a"]])


@pytest.mark.parametrize("template, start, end", [
    (None, "<|start|>Why?", ""), (TEMPLATE, "<|start|><user>Why?</><assistant>", "</>"),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_score_is_one_unbatched_forward_of_a_text_with_one_bos(
    template, start, end, size, flags, tmp_path
):
    """Of prompt, space and stripped response, or the template's text. Scoring costs no label."""
    model, tokenizer = make_model(CLASSIFIER, "gpt_neox", 2, **HEAD), make_tokenizer()
    name = save(model, tmp_path / "rm", chat_template=template)
    config = config_of("pilaf", flags, reward_model=name, micro_batch_size=size)
    oracle = harness.RewardModelOracle(config)
    found = oracle.score(["Why?", "Why?"], [["Because.", " "], [" A cat sat\n", ""]])
    rewards = []
    for text in ("Because.", "", "A cat sat", ""):
        text = start + (" " if text and not template else "") + text + end
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[0] == 1 and ids.count(1) == 1
        rewards.append(model(torch.tensor([ids])).logits.item())
    assert found.flatten().tolist() == pytest.approx(rewards, abs=1e-5)
    assert found.shape == (2, 2) and len(set(rewards)) == 3 and oracle.queries == 0


@pytest.mark.parametrize(
    "family, is_packed", [("gpt_neox", True), ("llama", True), ("bloom", False)]
)
@pytest.mark.parametrize("template", [None, TEMPLATE.replace("</>", "<|endoftext|>")])
def test_what_the_texts_of_a_prompt_begin_with_alike_is_read_once_where_the_model_can(
    family, is_packed, template, flags, tmp_path
):
    """Not with ALiBi, whose distances cannot start again. A chat may end with what pads."""
    name = save(make_model(CLASSIFIER, family, 5, **HEAD), tmp_path / "rm")
    config = config_of("pilaf", flags, reward_model=name, micro_batch_size=2)
    oracle, sizes = harness.RewardModelOracle(config), []
    oracle.tokenizer.chat_template = template
    texts = {"Why?": ["cats", "cats sat", ""], "": ["a", "a", "a"], "The cat": ["", "mat", "m"]}
    expected = [oracle.score([x], [[y]]).item() for x, row in texts.items() for y in row]
    found = oracle.score([*texts], [*texts.values()]).flatten().tolist()
    assert found == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.1
    embeddings = oracle.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, ids, out: sizes.append(ids[0].numel()))
    for row in (["cats", "dogs"], ["cats"]):
        oracle.score(["The cat sat on my keyboard again"], [row])
    assert (sizes[0] < 1.5 * sizes[1]) == is_packed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error(value, flags, tmp_path):
    model = make_model(CLASSIFIER, "gpt_neox", 2, **HEAD)
    with torch.no_grad():
        model.score.weight[0, 0] = value
    with pytest.raises(common.UserError, match="not finite"):
        train("pilaf", flags, reward_model=save(model, tmp_path / "rm"))
