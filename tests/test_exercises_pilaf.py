"""Do the checking cells of pilaf.ipynb accept right answers, refuse wrong ones, and wait?"""

import contextlib
import io
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CELLS = nbformat.read(ROOT / "notebooks" / "pilaf.ipynb", as_version=4).cells

# Exercise 1: p = (.5, .3, .2), q = (.2, .3, .5), c = 1: p^2 / q = (1.25, .3, .08), sum 1.63.
BY_HAND = "probabilities, hybrid_coefficients = [0.767, 0.184, 0.049], "
COIN = """
def exact_coin(pi, r):
    zz = (pi * r.exp()).sum() * (pi * (-r).exp()).sum()
    return zz / (1 + zz)
"""
ENDS = "pi_plus_at_the_reference, alpha_at_the_reference = "
RIGHT = {
    1: [BY_HAND + "(0, -1)"],
    2: ["def cost(p):\n    return 2 + 2 * p"],
    3: [COIN + ENDS + "'policy', 0.5"],
}
WRONG = {
    1: [
        BY_HAND + "(-1, 0)",
        BY_HAND + "(0.1, -0.1)",
        "probabilities, hybrid_coefficients = [0.2, 0.3, 0.5], (0, -1)",
        "probabilities, hybrid_coefficients = [1.25, 0.3, 0.08], (0, -1)",
    ],
    2: ["def cost(p):\n    return 3", "def cost(p):\n    return 4 * p"],
    3: [
        COIN + ENDS + "'uniform', 0.5",
        COIN + ENDS + "'policy', 1",
        "def exact_coin(pi, r):\n    return 0.5\n" + ENDS + "'policy', 0.5",
        COIN.replace("zz / (1 + zz)", "1 / (1 + zz)") + ENDS + "'policy', 0.5",
    ],
}
WAITING = {
    1: [BY_HAND + "None"],
    2: [],
    3: [COIN + ENDS + "'policy', None"],
}


def source(tag: str) -> str:
    return "\n".join(cell.source for cell in CELLS if tag in cell.metadata.get("tags", []))


@pytest.fixture(scope="module")
def namespace() -> dict:
    names = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(ROOT / "notebooks")
        exec(source("setup-exercise"), names)
    return names


def verdict(namespace: dict, number: int, answer: str | None = None) -> str:
    """What the checking cell prints; None: with the student's cell as it is shipped."""
    names, out = dict(namespace), io.StringIO()
    exec(source(f"exercise-{number}") if answer is None else answer, names)
    with contextlib.redirect_stdout(out):
        exec(source(f"check-{number}"), names)
    return out.getvalue().strip()


def cases(answers: dict[int, list[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "number, answer", [(number, answer) for number, some in answers.items() for answer in some]
    )


@cases(RIGHT)
def test_a_right_answer_is_told_so(namespace, number: int, answer: str) -> None:
    assert verdict(namespace, number, answer) == "right"


@cases(WRONG)
def test_a_wrong_answer_gets_a_hint(namespace, number: int, answer: str) -> None:
    assert verdict(namespace, number, answer).startswith("not yet: ")


@cases(WAITING | {number: [*some, None] for number, some in WAITING.items()})
def test_an_unfinished_answer_raises_nothing(namespace, number: int, answer: str | None) -> None:
    assert verdict(namespace, number, answer).startswith("not yet: ")
