"""Does the grid of experiments do each run once, and write down what the runs say?"""

import json
import subprocess
import sys
from pathlib import Path

import transformers

import pilaf
import sea
import selm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import experiments  # noqa: E402


def test_every_arm_of_the_grid_parses_with_the_real_parser(monkeypatch):
    monkeypatch.chdir(ROOT)
    for arm, words in experiments.ARMS.items():
        script, *flags = words.format(start="./tiny").replace("./tiny/model", "./tiny/sft").split()
        config_class = {"sea.py": sea, "selm.py": selm, "pilaf.py": pilaf}[script].Config
        parser = transformers.HfArgumentParser(config_class, allow_abbrev=False)
        assert config_class(**vars(parser.parse_args(flags))), arm


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
    config = json.loads((tmp_path / "runs" / "hybrid-0" / "config.json").read_text())
    assert config["flags"]["model"] == str(tmp_path / "runs" / "start-0" / "model")
    assert rows[0]["kl"] != 0  # it begins at the moved start, and the reference is where it was
