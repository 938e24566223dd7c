"""Is a run what its folder says? Metrics, counts, determinism, resuming, the folder, the screen."""

import contextlib
import datetime
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import common
import harness
import pilaf
import sea
import selm

import datasets
import pytest
import torch
import transformers
from conftest import ROOT, contents, make_batch, plain_token_logps, real_ids, rows

SCRIPTS = {"sea": sea, "selm": selm, "pilaf": pilaf}
ITERATIONS = dict(num_iterations=2, num_epochs=2, batch_size=2)
ARMS = [
    ("sea", {}), ("selm", {}), ("pilaf", {}), ("pilaf", ITERATIONS),
    ("selm", dict(bonus="xpo", num_queries=12, batch_size=2)),
]  # fmt: skip


def own_flags(script: str, flags: dict) -> dict:
    """Of a run of a second: 12 labels, or SELM's 12 rankings of three texts, three labels each."""
    backbone = f"{flags['dataset']}/erm_backbone"
    own = {"sea": dict(erm_backbone=backbone, num_candidates=4, burn_in=4)}
    return flags | (own | {"selm": dict(num_queries=36), "pilaf": {}})[script]


def config_of(script: str, flags: dict, **more) -> harness.Config:
    return SCRIPTS[script].Config(**own_flags(script, flags) | more)


def train(script: str, flags: dict, oracle: type | None = None, **more) -> Path:
    """Train; the folder of the run."""
    config = config_of(script, flags, **more)
    SCRIPTS[script].train(config, oracle(config) if oracle else None)
    return Path(config.output_dir)


def write(path: Path, table: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Rule(harness.Oracle):
    """Scores the number of letters; keeps what labels ask; stops before one, or "at the end"."""

    stop_at, error = None, TimeoutError

    def __init__(self, config) -> None:
        super().__init__(config)
        self.asked = []

    def score(self, prompts, responses):
        is_question, is_last = len(responses[0]) > 1, self.queries == self.config.num_queries
        if is_question and len(self.asked) == self.stop_at:
            raise self.error
        if self.stop_at == "at the end" and is_last and "test" in prompts[0]:
            raise self.error
        self.asked += zip(prompts, map(tuple, responses)) if is_question else []
        return torch.tensor([[len(set(text)) / 4 for text in row] for row in responses])


def stops(at: int | str) -> type:
    return type("Stops", (Rule,), {"stop_at": at})


EOS = {0, *range(2, 300, 3)}  # as a list in the policy's generation config


def definitions(folder: Path, flags: dict, config: harness.Config) -> tuple[dict, list[dict]]:
    """A run's last metrics from the models on the disk, each text by an unpadded forward."""
    load, where = transformers.AutoModelForCausalLM.from_pretrained, str(folder / "model")
    policy, reference = load(where), load(flags["model"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(flags["reward_model"])

    def reward(prompt: str, text: str) -> float:
        ids = tokenizer(f"{prompt} {text.strip()}".strip())["input_ids"]
        return judge(torch.tensor([ids])).logits.item()

    _, held_out = harness.load_prompts(config, tokenizer)
    rng, num = common.generator(config.seed, "evaluation"), len(held_out)
    with torch.no_grad():
        batch = common.respond(policy, tokenizer, held_out, 1, rng, config, temperature=1.0)
        ratios = [plain_token_logps(m, batch).sum().item() for m in (policy, reference)]
    texts = list(zip(held_out.columns["prompt"], held_out.columns["reference"], batch.responses))
    samples = [dict(prompt=x, reference=z, response=y, reward=reward(x, y)) for x, z, [y] in texts]
    gaps = [row["reward"] - reward(row["prompt"], row["reference"]) for row in samples]
    words = [re.findall(r"\w+", row["response"].lower()) for row in samples]
    ids = [real_ids(batch, b, 0)[1] for b in range(num)]
    assert not any(EOS & set(row[:-1]) for row in ids)  # the first of them ended the response
    assert any(len(row) == config.max_new_tokens and row[-1] in EOS for row in ids)  # just in time
    sums = {
        "win_rate": sum(gap > 0 for gap in gaps),
        "reward": sum(row["reward"] for row in samples),
        "kl": ratios[0] - ratios[1],
        "gold": sum(1.5 * ("a" in w) - 1.5 * ("o" in w) - 0.5 * ("s" in w) for w in words)
        - 0.1 * sum(map(len, words)),
        "length": sum(map(len, ids)),
        "truncated": sum(row[-1] not in EOS for row in ids),
    }
    means = {name: total / num for name, total in sums.items()}
    means["win_rate_stderr"] = math.sqrt(means["win_rate"] * (1 - means["win_rate"]) / num)
    return means | {"objective": means["reward"] - config.beta * means["kl"]}, samples


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_metric_equals_its_definition_by_plain_loops(script, flags, tmp_path):
    """The reference is read from the disk: had training moved it, kl would differ."""
    path = shutil.copytree(flags["model"], tmp_path / "model") / "generation_config.json"
    change(path, eos_token_id=sorted(EOS))
    row = dict(other="a cat", wanted=["a"], wrong=["o"], clutter=["s"])
    table = [row | dict(prompt=f"The cat {i}:", reference=f"cat {i} Jack") for i in range(80)]
    data = write(tmp_path / "data.jsonl", table)
    flags |= dict(model=str(path.parent), max_new_tokens=3, eval_prompts=30)
    more = dict(dataset=data, beta=0.3, temperature=0.7)
    folder = train(script, flags, **more)
    expected, samples = definitions(folder, flags, config_of(script, flags, **more))
    first, *_, last = rows(folder / "metrics.jsonl")
    assert {name: last[name] for name in expected} == pytest.approx(expected, abs=2e-4)
    assert abs(last["kl"]) > 0.005 and 0 < last["truncated"] < 1 and 0 < last["win_rate"] < 1
    assert first["queries"] == first["kl"] == first["round"] == 0
    written = [row for row in rows(folder / "samples.jsonl") if row["queries"] == last["queries"]]
    for row, sample in zip(written, samples, strict=True):
        assert row["reward"] == pytest.approx(sample.pop("reward"), abs=1e-4)
        assert sample.items() <= row.items()


def test_online_win_rate_is_of_both_responses_and_a_tie_is_half_a_win(flags):
    duels = make_batch([1, 1], [[1, 1], [1, 1]])
    duels.responses = [["ab", "abc"], ["a", "abcd"]]
    duels.columns["reference"] = ["xy", "xyz"]
    _, metrics = Rule(config_of("pilaf", flags)).label(duels)
    assert metrics["online_win_rate"] == (0.5 + 1 + 0 + 1) / 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_row_holds_means_over_the_rounds_since_the_last_row_and_evaluating_changes_nothing(
    script, flags, tmp_path
):
    more = {"num_iterations": 1} if script == "selm" else {}
    often = train(script, flags, eval_every=1, **more)
    more |= dict(eval_every=1000, eval_prompts=3, output_dir=str(tmp_path / "seldom"))
    seldom = train(script, flags, **more)
    for name in ("preferences.jsonl", "labels.jsonl", "model/model.safetensors"):
        assert contents(often)[name] == contents(seldom)[name], name
    table, [_, last] = rows(often / "metrics.jsonl")[1:], rows(seldom / "metrics.jsonl")
    assert len(table) >= 3 and len({row["loss"] for row in table}) == len(table)
    online = {"online_win_rate"} if script != "selm" else set()
    for name in {"loss", "chosen_reward", "rejected_reward", "grad_norm"} | online:
        assert last[name] == pytest.approx(sum(row[name] for row in table) / len(table)), name


@pytest.mark.parametrize("script, arm", ARMS)
def test_counts_are_those_of_the_files_and_the_budget_is_met_exactly(script, arm, flags):
    folder, config = train(script, flags, **arm), config_of(script, flags, **arm)
    names = ("labels", "preferences", "metrics")
    labels, pairs, table = (rows(folder / f"{name}.jsonl") for name in names)
    last, costs = table[-1], {2: 1, 3: 3}  # a duel, and a ranking of three
    assert last["queries"] == sum(costs[len(row["texts"])] for row in labels) == config.num_queries
    rounds, sources = {pair["round"] for pair in pairs}, [pair["source"] for pair in pairs]
    assert sources.count("oracle") == len(labels) and rounds == set(range(last["round"]))
    steps = len(rounds) * (2 if arm is ITERATIONS else 1)
    assert (last["synthetic_pairs"], last["gradient_steps"]) == (sources.count("model"), steps)
    num = {"sea": 4, "selm": 2 if arm else 1, "pilaf": 2}[script]
    assert last["candidates"] == num * config.batch_size * len(rounds) <= last["decoder_streams"]
    queries = [row["queries"] for row in table]
    assert queries[0] == 0 and queries == sorted(set(queries)) and len(queries) > 2


def test_evaluation_is_at_temperature_1_and_leaves_mode_and_random_state_alone(flags, tmp_path):
    """Also of the initial policy, whose other samples replace references. Dropout is set to 0."""
    data = write(tmp_path / "data.jsonl", [{"prompt": f"The cat {i}"} for i in range(20)])
    folder = shutil.copytree(flags["model"], tmp_path / "model")
    change(folder / "config.json", hidden_dropout=0.5)
    flags |= dict(model=str(folder), dataset=data)
    state, found = torch.get_rng_state(), []
    for temperature, is_training, seed in ((1.0, True, 3), (0.01, False, 3), (1.0, True, 4)):
        config = config_of("pilaf", flags, temperature=temperature, seed=seed)
        task = harness.load(config, None)
        task.policy.train(is_training)
        found.append(harness.evaluate(task, config))
        assert task.policy.training is is_training
    assert found[0] == found[1] and torch.equal(torch.get_rng_state(), state)
    metrics, samples = found[0]
    assert metrics["compared_with"] == "initial policy" and "gold" not in metrics
    assert len(samples) == 5 and all(row["response"] != row["reference"] for row in samples)
    references = [[row["reference"] for row in own] for _, own in found]
    assert references[0] != references[2], "another seed"


@pytest.mark.parametrize("script, arm", ARMS)
def test_one_seed_twice_gives_the_same_bytes_and_another_seed_others(script, arm, flags, tmp_path):
    first, again, other = (
        contents(train(script, flags, seed=seed, output_dir=str(tmp_path / name), **arm))
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first == again
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("script, arm", ARMS)
@pytest.mark.parametrize("at, every", [(5, 1), (5, 1000), ("at the end", 1)])
def test_a_stopped_run_resumes_to_the_bytes_of_an_uninterrupted_one(
    script, arm, at, every, flags, tmp_path
):
    """3b94717 gave no final evaluation to a run that was stopped when all labels were given."""
    more = arm | dict(checkpoint_every=every, eval_every=5)
    whole = train(script, flags, Rule, **more, output_dir=str(tmp_path / "whole"))
    with pytest.raises(TimeoutError):
        train(script, flags, stops(at), **more)
    resumed = train(script, flags, Rule, **more, resume="")
    assert contents(resumed) == contents(whole) and not list(resumed.glob("*.tmp"))
    budget = config_of(script, flags, **more).num_queries
    assert rows(resumed / "metrics.jsonl")[-1]["queries"] == budget


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_gains_nothing_by_resuming_and_moved_goes_on_with_a_larger_budget_alone(
    script, flags, tmp_path
):
    config_class, folder = SCRIPTS[script].Config, train(script, flags, Rule)
    before = contents(folder)
    again = config_class(output_dir=str(folder), resume="")  # all other flags are the run's
    SCRIPTS[script].train(again, oracle := Rule(again))
    assert contents(folder) == before and not oracle.asked
    folder, budget = shutil.move(folder, tmp_path / "moved"), again.num_queries
    for name, old, new in (("num_queries", budget, 11), ("beta", 0.1, 0.2), ("seed", 3, 4)):
        with pytest.raises(common.UserError, match=f"--{name} {old}, not {new}"):
            config_class(resume=str(folder), **{name: new})
    more = config_class(resume=str(folder), num_queries=2 * budget)
    SCRIPTS[script].train(more, Rule(more))
    after, planned = contents(folder), json.loads((folder / "config.json").read_text())["flags"]
    for name in before.keys() - {"model/model.safetensors"}:
        assert after[name].startswith(before[name]) and len(after[name]) > len(before[name]), name
    assert rows(folder / "metrics.jsonl")[-1]["queries"] == planned["num_queries"] == 2 * budget
    assert planned["planned_queries"] == budget and not Path(flags["output_dir"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("script, arm", ARMS)
def test_a_run_killed_at_random_moments_resumes_to_the_bytes_of_an_uninterrupted_one(
    script, arm, flags, tmp_path
):
    def start(flags: dict, *words: str) -> subprocess.Popen:
        given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / f"{script}.py"), *given, *words]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    table = [dict(prompt=f"The cat {i}:", reference=f"cat {i}", other="a") for i in range(400)]
    given = own_flags(script, flags) | arm | {"dataset": write(tmp_path / "data.jsonl", table)}
    given |= dict(num_queries=300, eval_every=60, checkpoint_every=3)
    whole, about = tmp_path / "whole", Path(flags["output_dir"], "config.json")
    _, errors = start(given | {"output_dir": whole}).communicate(timeout=300)
    assert contents(whole), errors
    rng, num_kills = random.Random(f"{script} {arm}"), 0
    for _ in range(5):
        began = time.time()
        process = start(given, *["--resume"] * about.exists())
        while process.poll() is None and not (about.exists() and about.stat().st_mtime > began):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))  # after it has written config.json
        num_kills += process.poll() is None
        process.kill()
        process.communicate()
    _, errors = start(given, "--resume").communicate(timeout=300)
    assert num_kills >= 2 and contents(about.parent) == contents(whole), errors


def test_the_config_says_what_ran_and_the_model_works(flags):
    folder = train("pilaf", flags)
    about = json.loads((folder / "config.json").read_text())
    assert about["flags"] == vars(config_of("pilaf", flags))
    names = ("torch", "transformers", "datasets", "tqdm")
    assert about["versions"] == {name: sys.modules[name].__version__ for name in names}
    assert about["flags"]["device"] == "cpu" and re.fullmatch("[0-9a-f]{40}|", about["git_commit"])
    pipe = transformers.pipeline("text-generation", model=str(folder / "model"))
    assert pipe("The cat", max_new_tokens=2)[0]["generated_text"].startswith("The cat")


@pytest.mark.parametrize("script, arm", ARMS[2:])
def test_a_checkpoint_needs_no_trust_and_neither_dates_nor_line_separators_do_harm(
    script, arm, flags, tmp_path
):
    """Only columns that are read are kept; U+2028 and U+0085 end lines in Python, not in files."""
    text = "cat\u2028sat\x85on\x1c a\x0bmat \U0001f408"
    row = dict(reference=text, other="a" + text, day=datetime.date(2024, 1, 1))
    table = [row | {"prompt": f"{text} {i}"} for i in range(60)]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "data.parquet")
    more = arm | {"dataset": str(tmp_path / "data.parquet"), "max_prompt_length": 100}
    whole = train(script, flags, Rule, **more, output_dir=str(tmp_path / "whole"))
    with pytest.raises(TimeoutError):
        train(script, flags, stops(5), **more)
    state = torch.load(Path(flags["output_dir"], "checkpoint.pt"), weights_only=True)
    assert "'day'" not in str(state) and {"policy", "counts", "labels"} <= state.keys()
    assert contents(train(script, flags, Rule, **more, resume="")) == contents(whole)


def test_a_run_is_overwritten_only_when_asked_for_and_what_is_no_run_never(flags, tmp_path):
    """A slip of the pen in --output_dir must not cost a folder of other things."""
    folder = train("pilaf", flags)
    before = contents(folder)
    with pytest.raises(common.UserError, match="--overwrite.*--resume.*--output_dir"):
        train("pilaf", flags, seed=1)
    assert contents(folder) == before
    after = contents(train("pilaf", flags, seed=1, overwrite=True))
    assert all(after[name] != before[name] for name in before)
    for name in ("config.json", "labels.jsonl"):  # a checkpoint alone is not continued
        (folder / name).unlink()
    assert contents(train("pilaf", flags, seed=1)) == after
    (tmp_path / "thesis.txt").write_text("mine")
    with contextlib.suppress(common.UserError):
        train("pilaf", flags, output_dir=str(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    model = shutil.copytree(flags["model"], tmp_path / "other")  # it has a config.json too
    for more in ({}, {"overwrite": True}, {"resume": ""}):
        with pytest.raises(common.UserError, match="holds no run"):
            train("pilaf", flags, output_dir=str(model), **more)
    names = [path.name for path in sorted(Path(flags["model"]).iterdir())]
    assert [path.name for path in sorted(model.iterdir())] == names
    assert (model / "config.json").read_bytes() == Path(flags["model"], names[0]).read_bytes()


def test_the_default_folder_names_script_arm_changed_flags_and_seed():
    assert SCRIPTS["pilaf"].Config().output_dir == "runs/pilaf-pilaf-0"
    assert sea.Config(explore="ee", seed=3, debug=True).output_dir == "runs/sea-ee-3"
    assert "~" not in sea.Config(output_dir="~/a").output_dir
    changed = sea.Config(gamma=1.0, model="~/a b/c")
    assert changed.output_dir == "runs/sea-bai-model=_a_b_c-gamma=1.0-0"
    both = [sea.Config(dataset=letter * 300, seed=seed) for letter in "ab" for seed in (1, 2)]
    assert len({c.output_dir for c in both}) == 4 and len(both[0].output_dir) < 250


@pytest.mark.parametrize("device, size, selms", [("cpu", 64, 64), ("cuda", 8, 4), ("cuda:1", 8, 4)])
def test_micro_batches_are_small_on_a_gpu_unless_somebody_says_otherwise(device, size, selms):
    assert sea.Config(device=device).micro_batch_size == size
    assert selm.Config(device=device).micro_batch_size == selms
    assert sea.Config(device=device, micro_batch_size=3).micro_batch_size == 3


def test_the_start_says_what_the_run_uses(flags, capsys):
    data = flags["dataset"]
    names = (flags["model"], flags["reward_model"], f"{data}/erm_backbone", f"{data}, 40 to train")
    numbers = ("5 held out", "48 tokens", "at most 6", "20 heads", "12 labels")
    train("sea", flags)
    out = capsys.readouterr().out
    assert all(said in out for said in (*names, *numbers, "against the reference"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert "./tiny" not in out and flags["output_dir"] in out.splitlines()[-1]


@pytest.mark.parametrize("sampler", ["vanilla", "best_of_n", "best_of_n_oracle"])
def test_twenty_rounds_that_asked_and_brought_no_label_stop_the_run(sampler, flags):
    """All candidates of a prompt read the same at such a temperature."""
    with pytest.raises(common.UserError, match="20 rounds"):
        train("pilaf", flags, sampler=sampler, temperature=1e-4, num_queries=80, checkpoint_every=1)
    state = torch.load(Path(flags["output_dir"], "checkpoint.pt"), weights_only=True)
    assert state["run"]["round"] == 20
