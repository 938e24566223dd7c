"""Does the lab sheet say what its commands do? Every command, in order, in a copy; every figure."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, rows

LAB = (ROOT / "notebooks" / "lab.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(words) for words in re.findall(r"^    python (.*)$", LAB, re.M)]
FIGURES = re.findall(r"^\| `(\S+)` \| `(\w+)` \| (\S+) ± (\S+) \|$", LAB, re.M)


def test_the_sheet_fits_a_page_and_a_lesson():
    assert len(LAB.splitlines()) < 140 and len(COMMANDS) >= 10 and len(FIGURES) >= 12
    spans = [tuple(map(int, span)) for span in re.findall(r"^## (\d+) to (\d+):", LAB, re.M)]
    assert spans[0][0] == 0 and spans[-1][1] == 90
    assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:]))
    numbers = [re.findall(r"^(\d+)\. ", part, re.M) for part in LAB.split("## Answers")]
    assert numbers[0] == numbers[1] == [*map(str, range(1, 13))]


@pytest.mark.slow
def test_every_command_shows_what_is_to_be_seen_and_every_figure_is_in_its_file(tmp_path):
    folder, printed = tmp_path / "copy", {}
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "*env", "runs", "results"))
    options = dict(cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    for words in COMMANDS:
        printed[" ".join(words)] = subprocess.check_output([sys.executable, *words], **options)
    for run, name, expected, width in FIGURES:
        value = rows(folder / run / "metrics.jsonl")[-1][name]
        assert abs(value - float(expected)) <= float(width), (run, name, value)
    for name in re.findall(r"Pictures? `(\S+)`", LAB):
        assert (folder / name).stat().st_size > 10_000
    numbers = [len(rows(folder / "runs" / "lab-sea" / f"{name}.jsonl"))
               for name in ("labels", "preferences")]  # fmt: skip
    assert numbers[0] == 576 and abs(numbers[1] - 718) < 60
    wanted = {"sea.py": "win_rate kl online_win_rate", "selm.py": "y_reward forward_kl",
              "pilaf.py": "sampling_cost"}  # fmt: skip
    for words, text in printed.items():
        assert all(name + " " in text for name in wanted.get(words.split()[0], "").split()), words
    broken = [text.count("failed: ") for words, text in printed.items() if "source.py" in words]
    assert broken == [3, 1]
