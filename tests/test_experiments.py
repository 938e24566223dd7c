"""Does the grid of experiments do each run once, and write down what the runs say?"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batch, rows

import harness
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
        kind, _, script, *words = words
        assert kind in oracles.ORACLES
    scripts = {"sea.py": sea, "selm.py": selm, "pilaf.py": pilaf}
    config_class = (scripts | {"notebooks/random_duels.py": random_duels})[script].Config
    parser = harness.Parser(config_class, allow_abbrev=False)
    return bool(config_class(**vars(parser.parse_args(words))).output_dir)


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "notebooks" / script), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_arm_of_the_grid_is_taken_by_the_real_parser(monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = {start: "./tiny" for start in experiments.STARTS}
    for arm, words in experiments.ARMS.items():
        assert parses(words.format(**folders)), arm


def test_compare_names_a_command_for_every_group_and_each_of_its_commands_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "notebooks" / "compare.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    commands = re.findall(r"`python ([^`]*)`", text)
    assert len(commands) >= 10 and all(parses(command) for command in commands)
    named = {word for command in commands if "--groups" in command for word in command.split()}
    assert set(experiments.GRID) <= named


def test_every_result_has_the_seeds_that_were_fixed_and_no_choice_was_made_on_them():
    seeds = {path.stem: sorted({row["seed"] for row in rows(path)})
             for path in experiments.RESULTS.glob("*.jsonl")}  # fmt: skip
    assert seeds and seeds == {arm: experiments.seeds_of(arm) for arm in seeds}
    chosen_on = {seed for arm in experiments.GRID["rates"] for seed in experiments.seeds_of(arm)}
    assert len(chosen_on) == 3 and chosen_on.isdisjoint(experiments.seeds_of("sea"))


@pytest.mark.slow
def test_a_run_begins_at_its_start_is_done_once_and_its_rows_are_collected(tmp_path):
    few = "--num_queries 6 --eval_prompts 4 --max_new_tokens 6 --warmup_steps 0"
    words = ["--arms", "hybrid", "--seeds", "0", "--jobs", "1", "--flags", few]
    words += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    times = []
    for _ in range(2):
        done = run("experiments.py", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        times.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")})
    assert times[0] == times[1] and len(times[0]) > 10
    collected = rows(tmp_path / "results" / "hybrid.jsonl")
    here = tmp_path / "runs" / "hybrid-0"
    own = rows(here / "metrics.jsonl")
    assert [row["queries"] for row in collected] == [row["queries"] for row in own] == [0, 6]
    assert own[-1].items() <= collected[-1].items()
    assert {(row["arm"], row["seed"]) for row in collected} == {("hybrid", 0)}
    assert all(sum(row["reward_histogram"]) == 4 for row in collected)
    flags = json.loads((here / "config.json").read_text())["flags"]
    assert flags["model"] == str(tmp_path / "runs" / "start-0" / "model")
    assert collected[0]["kl"] != 0  # the start has moved, and the reference is where it was


@pytest.mark.slow
@pytest.mark.parametrize("script", ["random_duels.py", "oracles.py flips 0.5 pilaf.py"])
def test_a_script_of_the_notebooks_trains_and_resumes_with_the_same_command(script, flags, folder):
    """The grid gives the words of the first time again, and --resume."""
    is_sea = dict(erm_backbone=str(folder / "erm_backbone"), num_candidates=4)
    flags |= is_sea if script == "random_duels.py" else {}
    words = [f"--{name}={value}" for name, value in flags.items()]
    for more in ([], ["--resume"]):
        done = run(*script.split(), *words, *more)
        assert done.returncode == 0, done.stderr[-2000:]
    labels = rows(Path(flags["output_dir"]) / "labels.jsonl")
    assert len(labels) == flags["num_queries"]


@pytest.fixture
def config(flags):
    return sea.Config(**flags | {"num_queries": 100})


@pytest.mark.parametrize(
    "kind, value, gap, share",  # of labels for the first; a gap of 180 is certain without flips
    [("flips", "0", 180, 1), ("flips", "0.2", 180, 0.8), ("flips", "1", 180, 0),
     ("temperature", "0.5", 1, 1 / (1 + 2.71828**-2)), ("temperature", "2", 4, 0.8808)],
)  # fmt: skip
def test_flips_and_temperatures_change_labels_as_often_as_they_say(config, kind, value, gap, share):
    rewards = torch.tensor([[gap / 2, -gap / 2]]).expand(4000, 2)
    is_first = oracles.ORACLES[kind](config, value).prefer([""] * 4000, [], rewards)
    assert is_first.double().mean().item() == pytest.approx(share, abs=0.025)


def test_a_shift_gives_the_other_reward_models_labels_until_half_of_the_budget(config, folder):
    config.labels = "argmax"
    oracle = oracles.Shift(config, str(folder / "erm_backbone"))
    prompts = [f"The cat test number {i}. TL;DR:" for i in range(10)]
    duels = [[f"cat {i}", f"a cat {2 * i}"] for i in range(10)]
    own, other = oracle.score(prompts, duels), oracle.before.score(prompts, duels)
    assert not torch.equal(own[:, 0] > own[:, 1], other[:, 0] > other[:, 1])
    for queries, rewards in ((0, other), (40, other), (50, own), (90, own)):
        oracle.queries = queries
        is_first, scores = oracle.label(prompts, duels)
        assert torch.equal(is_first, rewards[:, 0] > rewards[:, 1])
        assert torch.allclose(scores, own, atol=1e-5)  # metrics are the new one's all the time


@pytest.mark.parametrize(
    "words, code, said",
    [("flips 2 pilaf.py", 2, "probability"), ("temperature x sea.py", 2, "above 0"),
     ("flips 0.5 selm.py", 2, "rankings"), ("nobody", 1, "flips P"),
     ("flips 0.5 pilaf.py --sampler best_of_n_oracle", 2, "rankings")],
)  # fmt: skip
def test_an_oracle_that_cannot_be_is_refused(words, code, said):
    done = run("oracles.py", *words.split())
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_random_duels_are_the_first_two_candidates_and_synthetic_pairs_stay_seas():
    config, rng = sea.Config(), torch.Generator()
    rewards = torch.randn(3, 6, 5, generator=rng.manual_seed(0))
    batch = make_batch([3] * 6, [[2] * 5] * 6)
    is_synthetic = torch.tensor([True, False] * 3)
    found = random_duels.choose_duels(config, batch, rewards, is_synthetic, rng.manual_seed(1))
    own = sea.choose_duels(config, batch, rewards, is_synthetic, rng.manual_seed(1))
    for place in range(2):
        assert torch.equal(found[place][is_synthetic], own[place][is_synthetic])
        assert found[place][~is_synthetic].tolist() == [place] * 3
    assert not found[2].any()
