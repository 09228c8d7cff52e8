"""Identity: the key of a stage is a hash of what can change its result, and of nothing else."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical(value: Any, where: str = "") -> str:
    """`value` as JSON with one spelling: sorted keys, no spaces, no NaN.

    Raises:
        TypeError: something in it has no fingerprint (only mappings with string keys, lists,
            strings, numbers, booleans and None do); names its place.
    """
    if not _plain(value):
        _check(value, where)
    return _CANONICAL.encode(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_ATOMS = frozenset({type(None), str, bool, int, float})


def _plain(value: Any) -> bool:
    """Whether all of it is of the built-in types; a quick look that spares most values `_check`."""
    kind = type(value)
    if kind in _ATOMS:
        return True
    if kind is dict:
        for name, inner in value.items():
            if type(name) is not str or not (type(inner) in _ATOMS or _plain(inner)):
                return False
        return True
    if kind is list or kind is tuple:
        return all(type(inner) in _ATOMS or _plain(inner) for inner in value)
    return False


def _check(value: Any, where: str) -> None:
    if value is None or isinstance(value, (str, bool, int, float)):
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{where}: key {name!r} is not a string and has no fingerprint")
            _check(inner, f"{where}.{name}")
        return
    if isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check(inner, f"{where}[{index}]")
        return
    raise TypeError(
        f"{where}: {type(value).__name__} has no fingerprint; turn it into plain data first"
    )


def stage_key(
    kind: str,
    version: int,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    sources: Mapping[str, str],
) -> str:
    """The key of a stage (32 hex digits).

    Args:
        kind: stage kind.
        version: version of the stage's code; raised when its results change.
        params: every parameter that can change the result, as plain data.
        inputs: the keys of what it depends on, by role.
        sources: fingerprints of data and weights from outside the store, by role.
    """
    identity = {
        "kind": kind,
        "version": version,
        "params": params,
        "inputs": inputs,
        "sources": sources,
    }
    return hashlib.sha256(canonical(identity, kind).encode()).hexdigest()[:32]
