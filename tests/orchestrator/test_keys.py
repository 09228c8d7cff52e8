"""Keys change exactly when results can."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.keys import canonical, stage_key

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BASE = {
    "kind": "heal",
    "version": 1,
    "params": {"steps": 60, "block": {"start": 3, "depth": 2}},
    "inputs": {"base": "a" * 32},
    "sources": {"decoder": "folder:1"},
}


def test_the_same_stage_has_the_same_key_in_another_process():
    code = f"from orchestrator.keys import stage_key; print(stage_key(**{BASE!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == stage_key(**BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "adapt"},
        {"version": 2},
        {"params": {"steps": 61, "block": {"start": 3, "depth": 2}}},
        {"params": {"steps": 60, "block": {"start": 4, "depth": 2}}},
        {"params": {"steps": 60, "block": None}},
        {"inputs": {"base": "b" * 32}},
        {"inputs": {"other": "a" * 32}},
        {"sources": {"decoder": "folder:2"}},
    ],
)
def test_whatever_can_change_a_result_changes_the_key(change):
    assert stage_key(**{**BASE, **change}) != stage_key(**BASE)


@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_order_of_settings_does_not_matter(params):
    backwards = dict(reversed(params.items()))
    assert canonical(params) == canonical(backwards)


@given(PLAIN, PLAIN)
def test_different_settings_have_different_text(one, other):
    if canonical(one) == canonical(other):
        assert one == other


@pytest.mark.parametrize("value", [object(), {1: "x"}, {"a": [{"b": {2, 3}}]}, b"bytes"])
def test_what_has_no_fingerprint_is_refused_with_its_place(value):
    with pytest.raises(TypeError, match="no fingerprint"):
        canonical({"params": value}, "heal")


def test_nan_has_no_fingerprint():
    with pytest.raises(ValueError, match="JSON"):
        canonical({"lr": float("nan")})
