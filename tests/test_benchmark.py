"""Is the count of memory what a GPU has shown, and what README says?"""

import re
from functools import partial
from pathlib import Path

import benchmark
import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.parametrize(
    "size, micro_batch, measured",
    [("160m", 64, 22.24), ("410m", 64, 47.92), ("1b", 32, 47.10)],
)
def test_the_count_is_the_peak_that_an_h200_measured(size, micro_batch, measured):
    """GiB of sea.py's allocations, by `benchmark.py --size` with torch 2.11."""
    assert benchmark.computed_peak(size, micro_batch, 128) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("card", benchmark.CARDS)
def test_readmes_micro_batches_are_the_largest_that_fit(card):
    """A tenth of the card stays free, as in the benchmark's table."""
    row = re.search(rf"^\| {card} GB \|(.*)\|$", README.read_text(), re.MULTILINE)[1]
    for size, cell in zip(benchmark.MODELS, row.split("|"), strict=True):
        numbers = re.fullmatch(r" (-|\d+) \((-|\d+)\) ", cell).groups()
        for written, checkpointing in zip(numbers, (False, True)):
            peak = partial(benchmark.computed_peak, size, batch_size=128)
            fits = [2**i for i in range(8) if peak(2**i, checkpointing=checkpointing) <= 0.9 * card]
            assert written == (str(fits[-1]) if fits else "-")
