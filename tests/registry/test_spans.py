from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from registry.spans import Spans

_SIZE = 40
_places = st.tuples(st.integers(0, _SIZE), st.integers(0, _SIZE))


@given(st.lists(st.tuples(st.booleans(), _places), max_size=30), _places)
def test_spans_are_a_set_of_numbers(steps: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    spans, numbers = Spans(), set[int]()
    for adds, (start, end) in steps:
        if adds:
            spans.add(start, end)
            numbers |= {*range(start, end)}
        else:
            spans.remove(start, end)
            numbers -= {*range(start, end)}
    within = {*range(*asked)}
    gaps = spans.gaps(*asked)
    assert {number for start, end in gaps for number in range(start, end)} == within - numbers
    assert gaps == sorted(gaps)
    assert all(end < start for (_, end), (start, _) in pairwise(gaps))
    assert spans.overlaps(*asked) == bool(within & numbers)
    after = next(number for number in range(asked[0], _SIZE + 1) if number not in numbers)
    assert spans.end_of(asked[0]) == after
