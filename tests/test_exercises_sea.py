"""Do the checking cells of notebooks/sea.ipynb accept right answers and refuse wrong ones?"""

import contextlib
import io
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

RIGHT = {
    1: """
def my_bai(rewards, first):
    variance = (rewards[:, [first]] - rewards).sigmoid().var(0)  # (E, N) -> (N,)
    variance[first] = -1
    return variance.argmax()
""",
    # bai: candidate 2, about which heads 1 and 2 quarrel; ee: candidate 1, head 1's favourite.
    2: "my_rewards = [[1.0, 0.5, 0.0], [1.0, 1.5, -3.0], [1.5, 1.0, 1.4]]",
    3: """
def my_num_pairs(num_queries, burn_in, gamma):
    return burn_in + (num_queries - burn_in) / gamma
""",
}
WRONG = {
    1: {
        "raw gaps": """
def my_bai(rewards, first):
    return (rewards[:, [first]] - rewards).var(0).argmax()
""",
        "the smallest": """
def my_bai(rewards, first):
    return (rewards[:, [first]] - rewards).sigmoid().var(0).argmin()
""",
        "mean": "def my_bai(rewards, first): return rewards.mean(0).argmax()",
    },
    2: {
        "a clash": "my_rewards = [[2, 1, 0]] * 3",
        "both alike": "my_rewards = [[1, 0, -9], [0, 1, -9], [0, 1, -9]]",
        "of another shape": "my_rewards = [[1, 2], [2, 1]]",
    },
    3: {
        "no burn-in": "def my_num_pairs(num_queries, burn_in, gamma): return num_queries / gamma",
        "multiplied": """
def my_num_pairs(num_queries, burn_in, gamma):
    return burn_in + (num_queries - burn_in) * gamma
""",
    },
}


def cells(tag: str) -> list[str]:
    notebook = nbformat.read(ROOT / "notebooks" / "sea.ipynb", as_version=4)
    return [cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def verdict(number: int, answer: str | None, monkeypatch) -> str:
    """What the checking cell prints for the student's cell, or for this answer in its place."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (starting_point,), (check,) = cells(f"exercise-{number}"), cells(f"check-{number}")
    names, printed = {}, io.StringIO()
    for source in (*cells("setup-exercise"), answer or starting_point):
        exec(source, names)
    with contextlib.redirect_stdout(printed):
        exec(check, names)
    return printed.getvalue()


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_answer_is_right(number: int, monkeypatch) -> None:
    assert verdict(number, RIGHT[number], monkeypatch) == "right\n"


@pytest.mark.parametrize(("number", "name"), [(n, name) for n in WRONG for name in WRONG[n]])
def test_a_wrong_answer_is_not_yet_right(number: int, name: str, monkeypatch) -> None:
    assert verdict(number, WRONG[number][name], monkeypatch).startswith("not yet: ")


@pytest.mark.parametrize("number", RIGHT)
def test_the_starting_point_is_not_yet_right_and_raises_nothing(number: int, monkeypatch) -> None:
    assert verdict(number, None, monkeypatch).startswith("not yet: ")
