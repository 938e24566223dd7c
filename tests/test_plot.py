"""Does the plot command draw what metrics.jsonl holds, and only that?"""

import json
import subprocess
import sys
from pathlib import Path

import drawing
import plot
import pytest


def write_run(folder: Path, seed: int, rates: list[float], **flags) -> str:
    rows = [{"queries": 10 * n, "kl": n % 2, "win_rate": rate, "win_rate_stderr": 0.1,
             "compared_with": "reference"} for n, rate in enumerate(rates)]  # fmt: skip
    folder.mkdir()
    flags = {"explore": "bai", "beta": 0.1, "output_dir": str(folder), "seed": seed} | flags
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_runs_that_differ_in_the_seed_alone_are_an_arm_and_points_are_evaluations(tmp_path):
    one, two = (write_run(tmp_path / f"a-{n}", n, [0.1, 0.2 + n, 0.3]) for n in (1, 2))
    other = write_run(tmp_path / "other", 1, [0.5, 0.6], beta=0.2)
    again = write_run(tmp_path / "again", 1, [0.5, 0.6], beta=0.2)  # the same seed: no second one
    arms = plot.grouped([one, two, other, again])
    assert {arm: len(runs) for arm, (_, runs) in arms.items()} == {"a": 2, "other": 1, "again": 1}
    own = write_run(tmp_path / "my_rule-bai-1", 1, [0.5, 0.6])  # another script, the same flags
    assert [arm for arm, _ in plot.grouped([own, other]).values()] == ["my_rule-bai", "sea-bai"]
    x, y, error = drawing.points(arms["a"][1], "win_rate")
    assert x.tolist() == [0, 10, 20] and y == pytest.approx([0.1, 1.7, 0.3])
    assert error == pytest.approx([0, 0.5, 0])  # two seeds: half their distance
    assert drawing.points(arms["other"][1], "win_rate")[2] == pytest.approx([0.1, 0.1])
    assert drawing.points(arms["other"][1], "kl")[2] is None


def test_an_arm_looks_the_same_in_every_figure_and_no_two_look_alike():
    every = [*drawing.ARMS, "one", "two", "three", "sea-bai"]
    looks = drawing.looks(every)
    assert len({(look["color"], look["marker"]) for look in looks}) == len(every)
    assert looks[: len(drawing.ARMS)] == [drawing.look(arm) for arm in drawing.ARMS]
    assert drawing.look("passive") == drawing.look("sea-passive") != drawing.look("sea")


@pytest.mark.parametrize("words, said", [
    ("a-1 --output {}/x.png", ""),
    ("a-1 --against kl --output {}/x.png", ""),
    ("a-1 --output {}/x.xyz", "--output"),
    ("a-1", "--output curves.png"),
    ("a-1 --metric gold", "kl, queries, win_rate, win_rate_stderr"),
    ("a-1 --metric compared_with", "no metric compared_with"),
    ("nowhere", "no config.json"),
])  # fmt: skip
def test_the_command_draws_a_file_or_says_in_one_line_why_not(words, said, tmp_path):
    write_run(tmp_path / "a-1", 1, [0.1, 0.2, 0.3])
    command = [sys.executable, plot.__file__, *words.format(tmp_path).split()]
    options = dict(cwd=tmp_path, capture_output=True, text=True, env={"MPLBACKEND": "agg"})
    done = subprocess.run(command, **options)
    assert (done.returncode, done.stderr.count("\n")) == ((2, 1) if said else (0, 0)), done.stderr
    assert said in done.stderr and (tmp_path / "x.png").exists() == (not said)
