"""Do the checking cells of notebooks/selm.ipynb accept right answers and refuse wrong ones?"""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CELLS = nbformat.read(ROOT / "notebooks" / "selm.ipynb", as_version=4).cells
TAGGED = {tag: cell.source for cell in CELLS for tag in cell.metadata.get("tags", [])}

KL = "def kl(ref_logps, logps):\n    return "
RIGHT = {
    1: "margin_1 = math.log(1 / 5e-4 - 1) / 0.1",
    2: "slopes = {'chosen': -0.049, 'middle': 0.001, 'rejected': 0.051}",
    3: KL + "(ref_logps.exp() * (ref_logps - logps)).sum()",
}
WRONG = {
    "with beta": (1, "margin_1 = math.log(1 / 5e-4 - 1)", "not 1"),
    "no -1 and another alpha": (1, "margin_1 = math.log(1 / 1e-3) / 0.1", "not 1"),
    "bonus raises y": (
        2,
        "slopes = {'chosen': -0.051, 'middle': -0.001, 'rejected': 0.049}",
        "not yet: chosen, rejected, middle (its sign)",
    ),
    "alpha without beta": (
        2,
        "slopes = {'chosen': -0.04, 'middle': 0.01, 'rejected': 0.06}",
        "not yet: chosen, rejected, middle",
    ),
    "one missing": (2, "slopes = {'chosen': -0.049, 'middle': 0.001}", "not yet: rejected"),
    "reverse": (3, KL + "(logps.exp() * (logps - ref_logps)).sum()", "other direction"),
    "negative": (3, KL + "(ref_logps.exp() * (logps - ref_logps)).sum()", "mind the sign"),
    "mean": (3, KL + "(ref_logps - logps).mean()", "it should be"),
}


def said(number: int, answer: str, monkeypatch, capsys) -> str:
    """What the check prints after the imports and the answer."""
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for source in (TAGGED["setup-exercise"], answer, TAGGED[f"check-{number}"]):
        exec(source, names)
    return capsys.readouterr().out


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_answer_is_right_and_the_starting_point_is_not_yet(number, monkeypatch, capsys):
    assert said(number, RIGHT[number], monkeypatch, capsys) == "right\n"
    start = said(number, TAGGED[f"exercise-{number}"], monkeypatch, capsys)
    assert start.startswith("not yet")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_not_yet_and_is_told_why(name, monkeypatch, capsys):
    number, answer, why = WRONG[name]
    text = said(number, answer, monkeypatch, capsys)
    assert text.startswith("not yet") and why in text
