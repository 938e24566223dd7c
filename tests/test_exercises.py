"""Do the notebooks' checking cells accept right answers, refuse wrong ones, and wait for none?"""

import contextlib
import io
import math
import re

import common
import pilaf
import sea
import selm

import nbformat
import pytest
import source
import torch
from conftest import ROOT

NOTEBOOKS = ROOT / "notebooks"
SUM = "def my_logps(token_logps, response_mask): return "
BAI = "def my_bai(rewards, first): return "
PAIRS = "def my_num_pairs(num_queries, burn_in, gamma): return "
KL = "def kl(ref_logps, logps): return "
HAND = "probabilities, hybrid_coefficients = "
COIN = """
def exact_coin(pi, r):
    zz = (pi * r.exp()).sum() * (pi * (-r).exp()).sum()
    return zz / (1 + zz)
pi_plus_at_the_reference, alpha_at_the_reference = """
WRONG = {  # (notebook, exercise): the right answers are in answers.md
    ("primer", 1): [
        SUM + "token_logps.sum(-1)",  # with padding
        SUM + "(token_logps * response_mask).sum(-1) / response_mask.sum(-1)",  # a mean
        SUM + "(token_logps * response_mask).sum()", SUM + "3",
    ],
    ("primer", 2): [
        "half_margin, half_factor = 0.881, 0.293",  # beta forgotten
        "half_margin, half_factor = 8.81, 0.707", "half_margin, half_factor = 8.81, None",
    ],
    ("primer", 3): [
        "g_sees, g_position = {1, 2, 3, 4, 5, 6, 7}, 4",  # a plain causal mask
        "g_sees, g_position = {1, 2, 3, 6, 7}, 7",  # positions that do not restart
    ],
    ("sea", 1): [BAI + "(rewards[:, [first]] - rewards).var(0).argmax()"],
    ("sea", 2): [
        "my_rewards = [[2, 1, 0]] * 3", "my_rewards = [[1, 0, -9], [0, 1, -9], [0, 1, -9]]",
        "my_rewards = [[1, 2], [2, 1]]",
    ],
    ("sea", 3): [PAIRS + "num_queries / gamma"],
    ("selm", 1): ["margin_1 = math.log(1 / 5e-4 - 1)", "margin_1 = math.log(1 / 1e-3) / 0.1"],
    ("selm", 2): ["slopes = {'chosen': -0.051, 'middle': -0.001, 'rejected': 0.049}"],  # y up
    ("selm", 3): [
        KL + "(logps.exp() * (logps - ref_logps)).sum()",  # the other direction
        KL + "(ref_logps.exp() * (logps - ref_logps)).sum()", KL + "(ref_logps - logps).mean()",
    ],
    ("pilaf", 1): [
        HAND + "[0.767, 0.184, 0.049], (-1, 0)", HAND + "[0.767, 0.184, 0.049], None",
        HAND + "[0.2, 0.3, 0.5], (0, -1)", HAND + "[1.25, 0.3, 0.08], (0, -1)",
    ],
    ("pilaf", 2): ["def cost(p): return 3", "def cost(p): return 4 * p"],
    ("pilaf", 3): [
        COIN + "'uniform', 0.5", COIN + "'policy', 1", COIN + "'policy', None",
        COIN.replace("zz / (1 + zz)", "1 / (1 + zz)") + "'policy', 0.5",
    ],
}  # fmt: skip
RIGHT = {}  # the indented code of each exercise of answers.md
for part in (NOTEBOOKS / "answers.md").read_text(encoding="utf-8").split("\n## ")[1:]:
    for number, words in enumerate(part.split("**Exercise ")[1:], 1):
        assert words.startswith(f"{number}.**")
        lines = re.findall(r"^    (.*)$", words, re.M)
        RIGHT[part.split("\n")[0], number] = "\n".join(lines)


def said(notebook: str, number: int, answer: str = "") -> str:
    """What the checking cell prints after the student's cell, and `answer` in its place."""
    cells, text = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells, io.StringIO()
    tagged = {tag: cell.source for cell in cells for tag in cell.metadata.get("tags", [])}
    names = dict(torch=torch, math=math, common=common, sea=sea, selm=selm, pilaf=pilaf)
    with contextlib.redirect_stdout(text):
        for source in (tagged[f"exercise-{number}"], answer, tagged[f"check-{number}"]):
            exec(source, names)
    return text.getvalue().strip()


@pytest.mark.parametrize("place", WRONG)
def test_the_answer_of_answers_md_is_right_and_a_wrong_one_and_the_shipped_cell_get_a_hint(place):
    assert set(RIGHT) == set(WRONG)
    assert said(*place, RIGHT[place]) == "right"
    for answer in ("", *WRONG[place]):
        assert said(*place, answer).startswith("not yet: "), answer


def test_what_the_tests_notice_is_seen_in_a_copy_without_environments(tmp_path, monkeypatch):
    """README's environment, .venv, is in the clone; copying it took minutes."""
    for path, text in (("sea.py", "x = 1"), (".venv/a", ""), ("env/a", ""), ("tests/test_sea.py",
        "import os\n\ndef test_x():\n    assert 'x = 1' in open('sea.py').read()\n\n"
        "def test_y():\n    assert sorted(os.listdir()) == ['sea.py', 'tests']\n")):  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(source, "ROOT", tmp_path)
    assert source.noticed("sea.py", "1", "2", "x or y") == "failed: test_x\npassed: 1"


def test_a_function_is_broken_in_a_copy_and_only_where_its_source_says_so_once():
    numbers = torch.tensor([2.0]), torch.tensor([1.0]), 0.5, 0.1
    turned = source.broken(selm.bonus_loss, "y_logps - y_ref_logps", "y_ref_logps - y_logps")
    assert turned(*numbers) == -selm.bonus_loss(*numbers) == pytest.approx(-0.05)
    for old in ("nothing of the kind", "alpha"):
        with pytest.raises(ValueError, match="times in the source"):
            source.broken(selm.bonus_loss, old, "")
