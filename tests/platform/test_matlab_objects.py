"""Text of MATLAB's class string: what was written is read, in both versions, or left alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.hdf5 import read_matlab73
from fulgurite.matlab_objects import decode_strings
from fulgurite.testing.matlab import pack_strings, string_table, string_words, write_strings

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


def cells(*arrays):
    return [string_table(len(arrays)), np.zeros(0), *map(pack_strings, arrays)]


@settings(deadline=None)
@given(st.lists(st.lists(st.none() | texts, min_size=2, max_size=5), min_size=1, max_size=4))
def test_strings_come_back_and_missing_ones_are_empty(arrays):
    for number, array in enumerate(arrays, 1):
        decoded = decode_strings(string_words(number), cells(*arrays))
        assert decoded == [text or "" for text in array]


def test_a_single_string_is_text():
    assert decode_strings(string_words(2), cells(["a", "b"], ["surface"])) == "surface"


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (string_words(3), cells(["a"], ["b"])),
        (string_words(1)[:4], cells(["a"])),
        (string_words(1) + 1, cells(["a"])),
        (string_words(1), []),
        (string_words(1), cells(["a"])[:2]),
        (string_words(1), [string_table(1)[:90], *cells(["a"])[1:]]),
        (string_words(1), [np.zeros(200, np.uint8), *cells(["a"])[1:]]),
        (string_words(1), [*cells(["a"])[:2], pack_strings(["abcdefgh"])[:-1]]),
        (string_words(1), [*cells(["a"])[:2], np.ones(9)]),
        (string_words(1), [*cells(["a"])[:2], np.array([1, 2, 1 << 40, 1 << 40, 3], np.uint64)]),
    ],
)
def test_what_is_no_string_is_an_error(words, table):
    with pytest.raises(ValueError, match=r"\w"):
        decode_strings(words, table)


def test_strings_of_hdf5_files_and_what_stays_when_their_table_is_damaged(tmp_path):
    path = tmp_path / "a.mat"
    write_strings(path, {"x": np.arange(3.0)}, {"names": ["surface", "é", "𝄞"], "one": ["a"]})
    content = read_matlab73(path)
    assert content.keys() == {"x", "names", "one"}
    assert content["names"] == ["surface", "é", "𝄞"]
    assert content["one"] == "a"
    damaged = path.read_bytes().replace(string_table(2).tobytes(), bytes(len(string_table(2))))
    path.write_bytes(damaged)
    assert read_matlab73(path)["names"].dtype == np.uint32
