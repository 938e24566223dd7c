"""Does the grid of experiments do each run once, and write down what the runs say?"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import common
import pilaf
import sea
import selm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import experiments  # noqa: E402
import oracles  # noqa: E402
import random_duels  # noqa: E402


def parses(command: str) -> bool:
    """Do the real parsers take it? "SCRIPT WORDS", run in the root."""
    script, *words = shlex.split(command)
    if script == "notebooks/experiments.py":
        kind, *names = words
        return set(names) <= set({"--groups": experiments.GRID, "--arms": experiments.ARMS}[kind])
    if script == "notebooks/oracles.py":
        kind, value, script, *words = words
        assert kind in oracles.ORACLES and value
    scripts = {"sea.py": sea, "selm.py": selm, "pilaf.py": pilaf}
    config_class = (scripts | {"notebooks/random_duels.py": sea})[script].Config
    parser = transformers.HfArgumentParser(config_class, allow_abbrev=False)
    return bool(config_class(**vars(parser.parse_args(words))))


def test_every_arm_of_the_grid_parses_with_the_real_parser(monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = {start: "./tiny" for start in experiments.STARTS}
    for arm, words in experiments.ARMS.items():
        assert parses(words.format(**folders).replace("./tiny/model", "./tiny/sft")), arm


def test_compare_names_a_command_for_every_group_and_each_of_its_commands_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "notebooks" / "compare.ipynb").read_text())["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    commands = re.findall(r"`python ([^`]*)`", text)
    assert all(parses(command) for command in commands)
    named = {word for command in commands if "--groups" in command for word in command.split()}
    assert set(experiments.GRID) <= named


def test_every_result_has_the_seeds_that_were_fixed_and_no_choice_was_made_on_them():
    for path in experiments.RESULTS.glob("*.jsonl"):
        seeds = {json.loads(line)["seed"] for line in path.open()}
        assert sorted(seeds) == experiments.seeds_of(path.stem), path.name
    chosen_on = {seed for arm in experiments.GRID["rates"] for seed in experiments.seeds_of(arm)}
    assert len(chosen_on) == 3 and chosen_on.isdisjoint(experiments.seeds_of("sea"))


def test_a_run_is_done_once_and_its_rows_are_collected(tmp_path):
    few = "--num_queries 6 --eval_prompts 4 --max_new_tokens 6"
    words = ["--arms", "hybrid", "--seeds", "0", "--jobs", "1", "--flags", few]
    command = [sys.executable, str(ROOT / "notebooks" / "experiments.py"), *words]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    written = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        paths = sorted(tmp_path.glob("results/*.jsonl")) + sorted(
            tmp_path.glob("runs/*/config.json")
        )
        written.append({path: path.read_bytes() for path in paths})
        times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
        written.append(times)
    assert written[0] == written[2] and written[1] == written[3]
    rows = [json.loads(line) for line in (tmp_path / "results" / "hybrid.jsonl").open()]
    run = tmp_path / "runs" / "hybrid-0" / "metrics.jsonl"
    assert len(rows) == len(run.read_text().splitlines()) == 2
    assert {(row["arm"], row["seed"]) for row in rows} == {("hybrid", 0)}
    assert json.loads(run.read_text().splitlines()[-1]).items() <= rows[-1].items()
    assert all(sum(row["reward_histogram"]) == 4 for row in rows)
    config = json.loads((tmp_path / "runs" / "hybrid-0" / "config.json").read_text())
    assert config["flags"]["model"] == str(tmp_path / "runs" / "start-0" / "model")
    assert rows[0]["kl"] != 0  # it begins at the moved start, and the reference is where it was


def test_a_histogram_counts_each_reward_in_the_bin_that_holds_it():
    edges = [-4 + n / 2 for n in range(21)]
    rewards = [-9.0, -4, -3.51, -3.5, 0, 0.49, 0.5, 5.99, 6, 40]
    expected = [0] * 20
    for reward in rewards:
        inside = [n for n in range(20) if edges[n] <= reward < edges[n + 1]]
        expected[inside[0] if inside else 0 if reward < 0 else 19] += 1
    assert experiments.histogram(rewards) == expected


@pytest.fixture
def config(flags):
    return common.Config(**flags | {"num_queries": 100})


def test_flips_turn_labels_round_with_their_probability(config):
    """Of rewards so far apart that the clean label is certain."""
    rewards, texts = torch.tensor([[90.0, -90.0]]).expand(4000, 2), [""] * 4000
    for share in (0.0, 0.2, 1.0):
        is_first = oracles.Flips(config, str(share)).prefer(texts, [], rewards)
        assert is_first.float().mean().item() == pytest.approx(1 - share, abs=0.025)


def test_a_temperature_divides_rewards(config):
    rewards = torch.tensor([[1.0, -1.0]]).expand(4000, 2)
    for temperature in (0.5, 2):
        is_first = oracles.Temperature(config, str(temperature)).prefer([""] * 4000, [], rewards)
        expected = 1 / (1 + 2.718281828 ** (-2 / temperature))
        assert is_first.float().mean().item() == pytest.approx(expected, abs=0.03)


def test_a_shift_gives_the_other_reward_models_labels_until_half_of_the_budget(config, folder):
    config.labels = "argmax"
    oracle = oracles.Shift(config, str(folder / "erm_backbone"))
    flags = vars(config) | {"reward_model": str(folder / "erm_backbone")}
    other = common.Oracle(common.Config(**flags))
    prompts = [f"The cat test number {i}. TL;DR:" for i in range(10)]
    duels = [[f"cat {i}", f"a cat {2 * i}"] for i in range(10)]
    own, before = oracle.score(prompts, duels), other.score(prompts, duels)
    assert not torch.equal(own[:, 0] > own[:, 1], before[:, 0] > before[:, 1])
    for queries, rewards in ((0, before), (49, before), (50, own), (99, own)):
        oracle.queries = queries
        is_first, scores = oracle.label(prompts, duels)
        assert torch.equal(is_first, rewards[:, 0] > rewards[:, 1])
        assert torch.equal(scores, own)  # metrics are the new one's all the time


def test_another_oracle_trains_by_one_command_and_says_what_it_was_given(folder, flags, tmp_path):
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(ROOT / "notebooks" / "oracles.py")]
    done = subprocess.run(
        [*command, "flips", "0.5", "pilaf.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model").is_dir()
    for bad in (
        ["flips", "2", "pilaf.py"],
        ["flips", "x", "pilaf.py"],
        ["temperature", "0", "sea.py"],
    ):
        done = subprocess.run([*command, *bad], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in (["selm.py"], ["pilaf.py", "--sampler", "best_of_n_oracle"]):
        done = subprocess.run(
            [*command, "flips", "0.5", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and "rankings" in done.stderr
    assert subprocess.run([*command, "nobody"], capture_output=True, text=True).returncode == 1


def test_random_duels_are_the_first_two_candidates_and_synthetic_pairs_stay_seas():
    config, rng = sea.Config(), torch.Generator()
    rewards = torch.randn(3, 6, 5, generator=rng.manual_seed(0))
    texts = [[f"{i} {n}" for n in range(5)] for i in range(6)]
    batch = type("Batch", (), {"responses": texts, "__len__": lambda self: 6})()
    is_synthetic = torch.tensor([True, False] * 3)
    found = random_duels.choose_duels(config, batch, rewards, is_synthetic, rng.manual_seed(1))
    own = sea.choose_duels(config, batch, rewards, is_synthetic, rng.manual_seed(1))
    for place in range(2):
        assert torch.equal(found[place][is_synthetic], own[place][is_synthetic])
        assert found[place][~is_synthetic].tolist() == [place] * 3
    assert not found[2].any()


def test_random_duels_train_seas_loop_with_their_own_choice(flags, monkeypatch):
    seen = []
    monkeypatch.setattr(sea, "choose_duels", sea.choose_duels)  # put back after the test
    monkeypatch.setattr(sea, "train", lambda config: seen.append(sea.choose_duels))
    random_duels.train(sea.Config(**flags))
    assert seen == [random_duels.choose_duels]


def test_random_duels_train_by_one_command(flags, tmp_path):
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(ROOT / "notebooks" / "random_duels.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pairs = [json.loads(line) for line in (tmp_path / "run" / "preferences.jsonl").open()]
    assert {pair["source"] for pair in pairs} >= {"oracle"}
    assert (tmp_path / "run" / "model").is_dir()
