"""JSON from strangers: what is read is what json reads, and everything beyond the bounds is refused in a few words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.serve import strict_json

TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**31), 10**31)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet='a"\\\n{}[]\u4f60\U0001f600', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='k"\\\u4f60', max_size=3), inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(TREES, st.booleans())
def test_what_json_writes_is_read(tree, ascii_only):
    assert strict_json.parse(json.dumps(tree, ensure_ascii=ascii_only).encode()) == tree


DEEP = strict_json.MAX_DEPTH
LIMIT = 1000


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[" * (DEEP + 1), "nested too deeply"),
        (b'{"a":' * (DEEP + 1), "nested too deeply"),
        (b"[{}," * (strict_json.MAX_PARTS // 2 + 1), "more than 20000 strings"),
        (b"[" * (strict_json.MAX_PARTS + 1), "more than 20000 strings"),
        (b"[" + b"{}," * strict_json.MAX_PARTS, "more than 20000 strings"),
        (b"[" + b'"",' * strict_json.MAX_PARTS, "more than 20000 strings"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "the number 1e999 is out of range"),
        (b"[1, -1E+0400]", "the number -1E\\+0400 is out of range"),
        (b"[" + b"9" * 33 + b"]", "a number has 33 digits"),
        (b"9" * 5000, "a number has 5000 digits"),
        (b"[0." + b"1" * 401 + b"]", "a number has 401 digits"),
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice in one object"),
        (b'{"b": {"\\u0061": 1, "a": 1}}', "the key 'a' appears twice in one object"),
        (b'{"' + b"k" * 100 + b'": 1, "' + b"k" * 100 + b'": 1}', "^the key 'k{60}' appears"),
        (b'["\\ud83d"]', r"^\[0\]: has half of a surrogate pair \(U\+D83D at character 0\)"),
        (b'{"a": [{"b": "x\\ude00"}]}', r"^a\[0\].b: has half of a surrogate pair \(U\+DE00 at character 1\)"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b'"' + b"x" * 4 * LIMIT + b'xxxx"', "a string of 1001 characters or more"),
        (b'"' + b'\\"' * 6 * LIMIT + b'\\"xxxxxxxxxx"', "a string of 1001 characters or more"),
        (b'"\\', "not valid JSON"),
        (b'["a\\"]', "not valid JSON: Unterminated string"),
        (b"", "not valid JSON: Expecting value"),
        (b"\xff", "invalid start byte"),
    ],
    ids=range(25),
)
def test_bounds(raw, says):
    with pytest.raises(ValueError, match=says) as caught:
        strict_json.parse(raw, LIMIT)
    assert len(str(caught.value)) < 200


def test_what_is_just_within_the_bounds_is_read():
    assert strict_json.parse(b"[" * DEEP + b"]" * DEEP)
    assert strict_json.parse(b"[" + b"9" * 32 + b"]") == [10**32 - 1]
    assert strict_json.parse(b"[0." + b"1" * 399 + b", 1e300, 1e-999]") == [float("0." + "1" * 399), 1e300, 0.0]
    assert strict_json.parse(b'["' + b"9" * 5000 + b'", "\\ud83d\\ude00"]') == ["9" * 5000, "\U0001f600"]
    assert strict_json.parse(b'"' + b"x" * 4 * LIMIT + b'"', LIMIT) == "x" * 4 * LIMIT, "its bytes might be fewer signs"
    assert len(strict_json.parse(b"[" + b"1," * 200_000 + b"1]")) == 200_001
