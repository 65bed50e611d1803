"""What changed outside between two snapshots of effects."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from typing import Any


def snapshot(effects: Any) -> Any:
    """The effects as they stand now; a query set, or whatever else is lazy, is read at once."""
    if isinstance(effects, Mapping):
        return {key: snapshot(value) for key, value in effects.items()}
    if isinstance(effects, Iterable) and not isinstance(effects, _KEPT):
        effects = list(effects)
    return copy.deepcopy(effects)


_KEPT = (str, bytes, list, tuple, set, frozenset)


def changes(before: Any, after: Any) -> Any:
    """What came and went; None where nothing did.

    Numbers are subtracted, dicts compared key by key, lists and sets by what was added and removed,
    whatever its place; of anything else the difference is what it was and what it is. What has no
    entry, or is None, such as the sum of no rows, is none yet: 0, an empty list, and so on.
    """
    before = _empty(after) if before is None else before
    after = _empty(before) if after is None else after
    if before == after:
        return None
    if _are(Mapping, before, after):
        found = {key: changes(before.get(key), after.get(key)) for key in {**before, **after}}
        return {key: change for key, change in found.items() if change is not None} or None
    if _are((list, tuple, Set), before, after):
        was, now = Counter(map(repr, before)), Counter(map(repr, after))
        told = {"added": sorted((now - was).elements()), "removed": sorted((was - now).elements())}
        return {key: items for key, items in told.items() if items} or None
    if _are((int, float, Decimal), before, after):
        return _difference(before, after)
    return {"was": before, "is": after}


def _difference(before: Any, after: Any) -> Any:
    if not (isinstance(before, float) or isinstance(after, float)):
        return after - before
    before, after = float(before), float(after)
    # To 12 digits of the larger: what floats lose beyond them is nobody's effect.
    digits = 12 - len(f"{max(abs(before), abs(after)):.0f}")
    return round(after - before, digits) or None


def _are(kinds: Any, *values: Any) -> bool:
    return all(isinstance(value, kinds) for value in values)


def _empty(like: Any) -> Any:
    return type(like)() if isinstance(like, (int, float, Decimal, list, tuple, Set, dict)) else None
