"""Is a run what its folder says? The loop, its counts, its metrics, resume, determinism."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from datasets import load_dataset

import common
import sea

FILES = ("metrics.jsonl", "preferences.jsonl", "samples.jsonl")


def make(flags: dict, folder: Path, **more) -> sea.Config:
    return sea.Config(**flags | {"erm_backbone": str(folder / "erm_backbone"), "burn_in": 4} | more)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    files = [folder / name for name in FILES] + [folder / "model" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture
def trained(flags, folder):
    return sea.train(make(flags, folder))


def test_labels_counted_are_labels_used_and_the_budget_is_met_exactly(trained):
    pairs = rows(trained.folder / "preferences.jsonl")
    assert trained.oracle.queries == 12
    assert sum(pair["source"] == "oracle" for pair in pairs) == 12
    last = rows(trained.folder / "metrics.jsonl")[-1]
    assert last["queries"] == 12
    assert last["synthetic_pairs"] == sum(pair["source"] == "model" for pair in pairs)
    assert last["gradient_steps"] == last["rounds"] == 1 + max(pair["round"] for pair in pairs)
    assert last["candidates"] == last["decoder_streams"] == 20 * 4 * last["rounds"]


def test_evaluations_come_at_zero_at_each_step_and_at_the_end(trained):
    queries = [row["queries"] for row in rows(trained.folder / "metrics.jsonl")]
    assert queries[0] == 0 and queries[-1] == 12 and queries == sorted(set(queries))
    assert len({n // 4 for n in queries}) == len(queries) == 4  # --eval_every 4


def test_kl_is_zero_and_policy_is_reference_at_the_start(trained):
    assert rows(trained.folder / "metrics.jsonl")[0]["kl"] == 0.0


def test_the_reference_never_changes(trained, flags):
    fresh = transformers.AutoModelForCausalLM.from_pretrained(flags["model"]).state_dict()
    now = trained.ref_model.state_dict()
    assert all(torch.equal(now[name], fresh[name]) for name in fresh)
    moved = trained.policy.state_dict()
    assert any(not torch.equal(moved[name], fresh[name]) for name in fresh)


def test_each_metric_equals_its_definition_computed_by_loops_over_the_samples(trained):
    """From samples.jsonl, with plain one-row forwards: win rate and error, reward, KL, J, gold."""
    last = rows(trained.folder / "metrics.jsonl")[-1]
    samples = [s for s in rows(trained.folder / "samples.jsonl") if s["queries"] == 12]
    assert len(samples) == 5
    batch = trained.respond(
        lambda part: common.PackedDecoder(trained.policy, part, 1), trained.eval_prompts, 1,
        common.generator(0, "evaluation"), 1.0,
    )  # fmt: skip
    wins, probabilities, rewards, kls, golds, lengths = [], [], [], [], [], []
    for i, sample in enumerate(samples):
        assert batch.responses[i] == [sample["response"]]
        reward, baseline = (
            trained.oracle.score([sample["prompt"]], [[text]]).item()
            for text in (sample["response"], sample["baseline"])
        )
        assert reward == pytest.approx(sample["reward"], abs=1e-4)
        rewards.append(reward)
        wins.append(1.0 if reward > baseline else 0.5 if reward == baseline else 0.0)
        probabilities.append(1 / (1 + math.exp(baseline - reward)))
        prompt = trained.tokenizer(sample["prompt"])["input_ids"]
        length = int(batch.response_mask[i, 0].sum())
        response = batch.response_ids[i, 0, :length].tolist()
        ids = torch.tensor([prompt + response])
        ratio = 0.0
        for model, sign in ((trained.policy, 1), (trained.ref_model, -1)):
            with torch.no_grad():
                logps = model(ids).logits[0].double().log_softmax(-1)
            ratio += sign * sum(
                logps[len(prompt) + t - 1, token].item() for t, token in enumerate(response)
            )
        kls.append(ratio)
        lengths.append(length)
        words = sample["response"].lower().split()
        golds.append(sample["gold"])
        assert "cat" in words or sample["gold"] <= 0
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert last["win_rate"] == pytest.approx(mean(wins))
    spread = mean([(win - mean(wins)) ** 2 for win in wins])
    assert last["win_rate_stderr"] == pytest.approx(math.sqrt(spread / 5))
    assert last["win_probability"] == pytest.approx(mean(probabilities), abs=1e-4)
    assert last["reward"] == pytest.approx(mean(rewards), abs=1e-4)
    assert last["kl"] == pytest.approx(mean(kls), abs=1e-4)
    assert last["objective"] == pytest.approx(mean(rewards) - 0.1 * mean(kls), abs=1e-4)
    assert last["length"] == mean(lengths)
    assert last["gold"] == pytest.approx(mean(golds))


def test_online_metrics_are_those_of_both_duelled_responses_since_the_last_row(trained, folder):
    references = {row["prompt"]: row["reference"] for row in rows(folder / "train.jsonl")}
    table = rows(trained.folder / "metrics.jsonl")
    pairs = [p for p in rows(trained.folder / "preferences.jsonl") if p["source"] == "oracle"]
    for before, row in zip(table, table[1:]):
        duels = pairs[before["queries"] : row["queries"]]
        wins, probabilities = [], []
        for duel in duels:
            prompt = duel["prompt"]
            texts = [[duel["chosen"], duel["rejected"], references[prompt]]]
            *both, reference = trained.oracle.score([prompt], texts)[0].tolist()
            wins += [float(reward > reference) for reward in both]
            probabilities += [1 / (1 + math.exp(reference - reward)) for reward in both]
        assert row["online_win_rate"] == pytest.approx(sum(wins) / len(wins))
        mean = sum(probabilities) / len(probabilities)
        assert row["online_win_probability"] == pytest.approx(mean, abs=1e-4)


def test_the_output_folder_is_what_the_readme_says(trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {"config.json", "checkpoint.pt", "model", "timing.jsonl", *FILES}
    about = json.loads((trained.folder / "config.json").read_text())
    assert about["flags"] == dataclasses.asdict(trained.config)
    assert set(about["versions"]) == {"torch", "transformers", "datasets", "tqdm"}
    loaded = load_dataset("json", data_files=str(trained.folder / "preferences.jsonl"))["train"]
    assert loaded.column_names == ["round", "prompt", "chosen", "rejected", "source"]
    pipe = transformers.pipeline("text-generation", model=str(trained.folder / "model"))
    assert pipe("The cat", max_new_tokens=2)[0]["generated_text"].startswith("The cat")


@pytest.mark.parametrize("explore", ["bai", "ee", "uncertainty", "passive", "apl"])
def test_two_and_two_rounds_with_a_resume_equal_four(explore, flags, folder, tmp_path):
    more = dict(explore=explore, eval_every=4)
    whole = sea.train(make(flags, folder, **more, output_dir=str(tmp_path / "whole")))

    class Stopped(Exception):
        pass

    class Flaky(common.Oracle):
        def score(self, prompts, responses):
            if self.queries >= 6:
                raise Stopped  # in the middle of a round
            return super().score(prompts, responses)

    config = make(flags, folder, **more, output_dir=str(tmp_path / "halves"))
    with pytest.raises(Stopped):
        sea.train(config, Flaky(config))
    sea.train(dataclasses.replace(config, resume=True))
    assert contents(whole.folder) == contents(tmp_path / "halves")


def test_one_seed_twice_gives_the_same_files_and_another_seed_does_not(flags, folder, tmp_path):
    runs = [
        contents(sea.train(make(flags, folder, seed=seed, output_dir=str(tmp_path / name))).folder)
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert runs[0] == runs[1]
    assert runs[0]["preferences.jsonl"] != runs[2]["preferences.jsonl"]


def test_evaluation_changes_no_training_number(flags, folder, tmp_path):
    often, seldom = (
        sea.train(make(flags, folder, eval_every=every, output_dir=str(tmp_path / str(every))))
        for every in (4, 100)
    )
    a, b = contents(often.folder), contents(seldom.folder)
    assert a["preferences.jsonl"] == b["preferences.jsonl"]
    assert a["model.safetensors"] == b["model.safetensors"]


def test_more_padding_changes_no_metric(trained):
    plain, _ = trained.evaluate()
    prompts = trained.eval_prompts
    ids, mask = prompts.prompt_ids, prompts.prompt_mask
    wider = torch.zeros(len(ids), 9, dtype=ids.dtype)
    ids, mask = torch.cat([wider, ids], 1), torch.cat([wider, mask], 1)
    wider = dataclasses.replace(prompts, prompt_ids=ids, prompt_mask=mask)
    wider.select = lambda rows, picks=None: wider if len(rows) == len(wider) else None  # keep it
    trained.eval_prompts = wider
    padded, _ = trained.evaluate()
    assert padded.pop("compared_with") == plain.pop("compared_with")
    assert padded == pytest.approx(plain, abs=1e-4)


def test_evaluation_leaves_the_random_state_and_the_mode_alone(trained):
    state = torch.get_rng_state()
    for mode in (True, False):
        trained.policy.train(mode)
        first, _ = trained.evaluate()
        assert trained.policy.training is mode
        assert trained.evaluate()[0] == first
    assert torch.equal(torch.get_rng_state(), state)


def test_micro_batches_and_checkpointing_change_nothing_beyond_rounding(flags, folder, tmp_path):
    whole = sea.train(make(flags, folder, output_dir=str(tmp_path / "whole")))
    parts = sea.train(make(flags, folder, output_dir=str(tmp_path / "parts"), micro_batch_size=3,
                           gradient_checkpointing=True))  # fmt: skip
    a, b = (rows(run.folder / "preferences.jsonl") for run in (whole, parts))
    assert a == b
    a, b = (rows(run.folder / "metrics.jsonl")[-1] for run in (whole, parts))
    for name, value in a.items():
        assert b[name] == pytest.approx(value, abs=1e-3), name


def test_identical_duels_are_never_sent(flags, folder):
    """With one token a response nearly all passive duels are between equal texts."""

    class Strict(common.Oracle):
        def label(self, prompts, duels):
            assert all(a != b for a, b in duels)
            return super().label(prompts, duels)

    config = make(flags, folder, explore="passive", max_new_tokens=1)
    run = sea.train(config, Strict(config))
    assert run.oracle.queries == 12


def test_twenty_rounds_without_a_label_stop_the_run_saved(flags, folder):
    config = make(flags, folder, explore="passive", max_new_tokens=1, temperature=1e-3)
    with pytest.raises(common.UserError, match="20 rounds"):
        sea.train(config)
    assert (Path(config.output_dir) / "checkpoint.pt").exists()


def test_synthetic_pairs_never_reach_the_oracle_nor_the_ensemble(flags, folder):
    asked = []

    class Listening(common.Oracle):
        def label(self, prompts, duels):
            asked.extend(zip(prompts, map(tuple, duels)))
            return super().label(prompts, duels)

    config = make(flags, folder, gamma=0.5, burn_in=0)
    run = sea.train(config, Listening(config))
    pairs = rows(run.folder / "preferences.jsonl")
    assert {pair["source"] for pair in pairs} == {"oracle", "model"}
    known = {(prompt, frozenset(duel)) for prompt, duel in asked}
    for pair in pairs:
        key = (pair["prompt"], frozenset((pair["chosen"].strip(), pair["rejected"].strip())))
        assert (key in known) == (pair["source"] == "oracle")
    assert len(run.parts["ensemble"].pairs) == len(asked) == 12


def test_released_synthetic_labels_are_counted_honestly(flags, folder):
    run = sea.train(make(flags, folder, gamma=0.5, burn_in=0, synthetic_labels="oracle"))
    pairs = rows(run.folder / "preferences.jsonl")
    assert [pair["source"] for pair in pairs] == ["oracle"] * 12
    assert run.oracle.queries == 12


def test_a_rule_can_stand_in_for_the_oracle(flags, folder):
    class Shorter(common.Oracle):
        def score(self, prompts, responses):
            return torch.tensor([[-float(len(text)) for text in row] for row in responses])

    config = make(flags, folder, labels="argmax")
    run = sea.train(config, Shorter(config))
    pairs = [p for p in rows(run.folder / "preferences.jsonl") if p["source"] == "oracle"]
    assert all(len(p["chosen"].strip()) <= len(p["rejected"].strip()) for p in pairs)


def test_bernoulli_labels_have_the_bradley_terry_frequency(flags, folder):
    oracle = common.Oracle(make(flags, folder))
    oracle.score = lambda prompts, duels: torch.tensor([[1.0, 0.0]]).expand(len(prompts), 2)
    is_first, _ = oracle.label(["x"] * 20_000, [["a", "b"]] * 20_000)
    rate = 1 / (1 + math.exp(-1))
    assert is_first.double().mean().item() == pytest.approx(rate, abs=4 * 0.45 / 20_000**0.5)
    assert oracle.queries == 20_000


def test_without_references_the_initial_policy_stands_in_and_the_row_says_so(
    flags, folder, tmp_path
):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": f"The cat {i}"}) + "\n" for i in range(20)))
    run = sea.train(make(flags, folder, dataset=str(data), prompt_column="text"))
    table = rows(run.folder / "metrics.jsonl")
    assert {row["compared_with"] for row in table} == {"initial policy"}
    assert "online_win_rate" not in table[-1] and "gold" not in table[-1]
    assert len(run.prompts) == 15 and len(run.eval_prompts) == 5  # the last rows are held out
    assert run.eval_prompts.columns["prompt"] == [f"The cat {i}" for i in range(15, 20)]


def test_the_learning_rate_rises_linearly_and_stays(flags, folder, monkeypatch):
    rates, update = [], common.update
    monkeypatch.setattr(common, "update", lambda policy, optimizer, *rest: (
        rates.append(optimizer.param_groups[0]["lr"]), update(policy, optimizer, *rest),
    )[1])  # fmt: skip
    sea.train(make(flags, folder, explore="passive", num_queries=16, warmup_steps=2))
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4][: len(rates)]) and len(rates) >= 4


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_a_backbone_that_cannot_be_packed_is_read_one_row_a_response(
    family, flags, folder, tmp_path, capsys
):
    import conftest

    # a window of 44 tokens shows only in a row of full length, 48 + 6
    more = {"sliding_window": 44, "num_key_value_heads": 2} if family == "mistral" else {}
    backbone = conftest.make_model(transformers.AutoModel, family, 5, **more)
    backbone.save_pretrained(tmp_path / "backbone")
    conftest.make_tokenizer().save_pretrained(tmp_path / "backbone")
    run = sea.train(make(flags, folder, erm_backbone=str(tmp_path / "backbone")))
    assert "one row a response" in capsys.readouterr().out
    assert run.parts["ensemble"].pairs.shape == (12, 2, 32)


def test_the_reference_can_be_the_backbone(flags, folder):
    run = sea.train(make(flags, folder, erm_backbone="reference"))
    assert run.parts["ensemble"].pairs.shape == (12, 2, 32)


@pytest.mark.parametrize("loss", ["ipo", "slic"])
def test_the_other_losses_train(loss, flags, folder):
    run = sea.train(make(flags, folder, loss=loss, beta=0.5))
    assert rows(run.folder / "metrics.jsonl")[-1]["queries"] == 12


def test_offline_responses_come_from_the_reference(flags, folder, tmp_path):
    """Two runs that differ in the policy's learning rate collect the same duels."""
    runs = [
        sea.train(
            make(
                flags,
                folder,
                explore="passive",
                offline=True,
                learning_rate=rate,
                output_dir=str(tmp_path / str(rate)),
            )
        )  # fmt: skip
        for rate in (1e-3, 0.0)
    ]
    a, b = (contents(run.folder) for run in runs)
    assert a["preferences.jsonl"] == b["preferences.jsonl"]
    assert a["model.safetensors"] != b["model.safetensors"]
    assert rows(runs[1].folder / "metrics.jsonl")[-1]["gradient_steps"] == 0


def test_released_anchor_runs_and_learns_from_128_pairs_on(flags, folder):
    run = sea.train(make(flags, folder, anchor="released", num_queries=8))
    heads = run.parts["ensemble"]
    assert all(torch.equal(p, p0) for p, p0 in zip(heads.weights, heads.start))


def test_ensemble_disagreement_is_prior_std_at_first_and_falls(flags, folder):
    table = rows(sea.train(make(flags, folder, num_queries=64)).folder / "metrics.jsonl")
    values = [row["ensemble_disagreement"] for row in table if "ensemble_disagreement" in row]
    assert 0.1 < values[0] < 0.3 and values[-1] < values[0]


def test_clashes_are_logged(flags, folder):
    """Two heads and two candidates clash often; passive duels cannot."""
    more = dict(explore="ee", num_heads=2, num_candidates=2)
    last = rows(sea.train(make(flags, folder, **more)).folder / "metrics.jsonl")[-1]
    assert 0 < last["clashes"] <= last["rounds"] * 4
