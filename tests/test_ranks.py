"""Do two processes under torchrun do what one does?"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, rows

BACKBONE = ["--erm_backbone", "reference"]
ARMS = {"selm": ["--num_iterations", "2", "--num_queries", "36"], "pilaf": ["--importance_weights"]}
ARMS["sea"] = ["--burn_in", "4", "--num_candidates", "4", "--num_heads", "3", *BACKBONE]


def words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def launch(script: str, flags: list[str], num: int) -> subprocess.CompletedProcess:
    command = [sys.executable, script, *flags]
    if num > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("script", ARMS)
@pytest.mark.parametrize("micro_batch_size", [3, 64])  # an uneven last part; fewer parts than two
def test_two_processes_give_the_metrics_and_pairs_of_one(script, micro_batch_size, flags, tmp_path):
    flags |= {"micro_batch_size": micro_batch_size, "eval_prompts": 5}
    outcomes = []
    for num in (1, 2):
        own = flags | {"output_dir": str(tmp_path / str(num))}
        done = launch(f"{script}.py", words(own) + ARMS[script], num)
        assert done.returncode == 0, done.stderr
        names = ("metrics", "preferences", "labels")
        outcomes += [rows(tmp_path / str(num) / f"{name}.jsonl") for name in names]
    alone, pairs, answers, together, same_pairs, same_answers = outcomes
    assert len(pairs) > 4 and pairs == same_pairs and len(answers) == len(same_answers)
    assert len(alone) == len(together) > 1
    for one, two in zip(alone, together):
        assert two == pytest.approx(one, abs=1e-4)


FAILING = """
import os, pathlib, signal, time, common, harness, sea

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
rank, folder = os.environ["RANK"], pathlib.Path(os.environ["CODES"])
(folder / f"pid{rank}").write_text(str(os.getpid()))

def fail_once(model, batch, real=common.response_logps):
    if rank == "1" and os.environ["HOW"] == "error":
        raise RuntimeError("this process alone is out of order")
    if rank == "1":
        time.sleep(2)  # the other one waits
        for n in (0, 1):
            os.kill(int((folder / f"pid{n}").read_text()), signal.SIGINT)
    return real(model, batch)

common.response_logps = fail_once
try:
    harness.main(sea.Config, sea.train, sea.__doc__)
except SystemExit as stop:
    (folder / f"code{rank}").write_text(str(stop.code))
    raise
"""


@pytest.mark.slow
@pytest.mark.parametrize("how, code, said", [
    ("error", "2", ["error: this process alone is out of order (", "another process failed"]),
    ("Ctrl-C", "130", ["stopped; --resume"]),
])  # fmt: skip
def test_an_error_of_one_process_or_ctrl_c_of_all_ends_all(
    how, code, said, flags, tmp_path, monkeypatch
):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setenv("CODES", str(tmp_path))
    monkeypatch.setenv("HOW", how)
    done = launch(str(tmp_path / "failing.py"), words(flags) + BACKBONE, 2)
    assert done.returncode != 0 and all(words in done.stderr for words in said), done.stderr
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == [code, code]
