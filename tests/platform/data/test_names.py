"""Names that differ, and look alike."""

import pytest

from fulgurite.data.names import find_alike, find_repeated


@pytest.mark.parametrize(
    "names",
    [("Cat", "cat"), ("cat", "cat "), ("1 µM", "1 \u03bcM"), ("\u00e9", "e\u0301"), ("2", "2.0")],
)
def test_spellings_of_one_name_are_found(names):
    assert find_alike(["other", *names]) == [names]


def test_other_names_are_not_alike():
    assert find_alike(["1.0", "10", "1.01", "a", "b", "NA", "a1", "a1.0"]) == []
    assert find_alike(["a", "a"]) == []


def test_a_name_that_comes_twice():
    assert find_repeated(iter("abcb")) == "b"
    assert find_repeated(()) is None
