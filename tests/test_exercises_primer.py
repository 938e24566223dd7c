"""Do the primer's checking cells accept right answers, refuse wrong ones, and bear none?"""

import contextlib
import io
import math
from pathlib import Path

import nbformat
import pytest
import torch

import common

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "primer.ipynb"
SUM = "def my_logps(token_logps, response_mask):\n    return "
HALF = -10 * math.log(math.sqrt(2) - 1)  # -log sigmoid(0.1 m) = log(2) / 2
FACTOR = 1 - 1 / math.sqrt(2)
CASES = {  # exercise: right answers, wrong answers
    1: (
        [
            SUM + "(token_logps * response_mask).sum(-1)",
            SUM + "token_logps.masked_fill(response_mask == 0, 0).sum(-1)",
        ],
        [
            SUM + "token_logps.sum(-1)",  # with padding
            SUM + "(token_logps * response_mask).sum(-1) / response_mask.sum(-1)",  # a mean
            SUM + "(token_logps[..., :-1] * response_mask[..., 1:]).sum(-1)",  # without the end
            SUM + "(token_logps * response_mask).sum()",  # one number
            SUM + "(token_logps * response_mask).sum(-2)",
            SUM + "3",
        ],
    ),
    2: (
        [
            f"half_margin, half_factor = {HALF}, {FACTOR}",
            "half_margin, half_factor = 8.81, 0.293",
        ],
        [
            "half_margin, half_factor = 0.881, 0.293",  # beta forgotten
            "half_margin, half_factor = 8.81, 0.5",
            "half_margin, half_factor = 8.81, 0.707",
            "half_margin, half_factor = -8.81, 0.707",
            "half_margin, half_factor = 8.81, None",
            "half_margin, half_factor = 0, 0.5",
        ],
    ),
    3: (
        ["g_sees, g_position = {1, 2, 3, 6, 7}, 4", "g_sees, g_position = [7, 6, 3, 2, 1], 4"],
        [
            "g_sees, g_position = {1, 2, 3, 4, 5, 6, 7}, 4",  # a plain causal mask
            "g_sees, g_position = {0, 1, 2, 3, 6, 7}, 4",  # with padding
            "g_sees, g_position = {1, 2, 3, 6}, 4",  # without itself
            "g_sees, g_position = {1, 2, 3, 6, 7}, 7",  # positions that do not restart
            "g_sees, g_position = {1, 2, 3, 6, 7}, 5",  # with padding counted
            "g_sees, g_position = {1, 2, 3, 6, 7}, None",
        ],
    ),
}


def said(number: int, answer: str | None) -> str:
    """What the checking cell prints after the student's cell, or `answer` in its place."""
    tagged = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        tagged |= {tag: cell.source for tag in cell.metadata.get("tags", [])}
    names = {"torch": torch, "math": math, "common": common}  # what the notebook has imported
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(tagged[f"exercise-{number}"], names)
        exec(answer or "", names)
        exec(tagged[f"check-{number}"], names)
    return text.getvalue().strip()


@pytest.mark.parametrize("number", CASES)
def test_a_checking_cell_says_not_yet_to_the_cell_as_it_is_shipped(number):
    assert said(number, None).startswith("not yet: ")


ANSWERS = [(n, answer, i == 0) for n, kinds in CASES.items() for i in (0, 1) for answer in kinds[i]]


@pytest.mark.parametrize(("number", "answer", "is_right"), ANSWERS)
def test_a_checking_cell_accepts_right_answers_and_refuses_wrong_ones(number, answer, is_right):
    text = said(number, answer)
    assert text == "right" if is_right else text.startswith("not yet: ")
