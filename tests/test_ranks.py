"""Do two processes under torchrun do what one does?"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, rows

BACKBONE = ["--erm_backbone", "reference"]
ARMS = {
    "sea": ["--burn_in", "4", "--num_candidates", "4", "--num_heads", "3", *BACKBONE],
    "selm": ["--num_iterations", "2", "--num_queries", "36"],
    "pilaf": ["--importance_weights"],
}


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
        outcomes += [rows(tmp_path / str(num) / f"{x}.jsonl") for x in ("metrics", "preferences")]
    alone, pairs, together, same_pairs = outcomes
    assert len(pairs) > 4 and pairs == same_pairs
    assert len(alone) == len(together) > 1
    for one, two in zip(alone, together):
        assert two == pytest.approx(one, abs=1e-4)


FAILING = """
import os, common, harness, sea

def fail_once(model, batch, real=common.response_logps):
    if os.environ["RANK"] == "1":
        raise RuntimeError("this process alone is out of order")
    return real(model, batch)

common.response_logps = fail_once
try:
    harness.main(sea.Config, sea.train, sea.__doc__)
except SystemExit as stop:
    open(os.environ["CODES"] + os.environ["RANK"], "w").write(str(stop.code))
    raise
"""


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_exit_code_2(flags, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setenv("CODES", str(tmp_path / "code"))
    done = launch(str(tmp_path / "failing.py"), words(flags) + BACKBONE, 2)
    assert done.returncode != 0
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert "error: this process alone is out of order (RuntimeError" in done.stderr
    assert "error: another process failed" in done.stderr
