"""The annotators' rule behind the labels that the embedded world's oracle was trained on."""

import re


def gold_score(response: str, wanted: list[str], wrong: list[str], clutter: list[str]) -> float:
    """1.5 for each wanted fact that the response states, -1.5 for each wrong version of one, -0.5
    for anything else that the row lists, -0.1 a word. Case and punctuation do not count, nor do
    facts of kinds not in a post."""

    def plain(text: str) -> str:
        return " " + " ".join(re.findall(r"\w+", text.lower())) + " "

    text, kinds = plain(response), (wanted, wrong, clutter)
    right, false, other = (sum(plain(fact) in text for fact in facts) for facts in kinds)
    return 1.5 * right - 1.5 * false - 0.5 * other - 0.1 * len(text.split())
