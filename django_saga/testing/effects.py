"""What changed outside between two snapshots of effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from decimal import Decimal
from typing import Any


def changes(before: Any, after: Any) -> Any:
    """What came and went; None where nothing did.

    Numbers are subtracted, dicts compared key by key, lists and sets by what was added and removed,
    whatever its place; of anything else the difference is what it was and what it is.
    """
    if before == after:
        return None
    if _are(Mapping, before, after):
        found = {}
        for key in {**before, **after}:
            one, other = before.get(key), after.get(key)
            # What has no entry is none yet: 0, an empty list, and so on.
            one = _empty(other) if key not in before else one
            other = _empty(one) if key not in after else other
            found[key] = changes(one, other)
        return {key: change for key, change in found.items() if change is not None} or None
    if _are((list, tuple, Set), before, after):
        was, now = Counter(map(repr, before)), Counter(map(repr, after))
        told = {"added": sorted((now - was).elements()), "removed": sorted((was - now).elements())}
        return {key: items for key, items in told.items() if items} or None
    if _are((int, float, Decimal), before, after):
        return after - before
    return {"was": before, "is": after}


def _are(kinds: Any, *values: Any) -> bool:
    return all(isinstance(value, kinds) for value in values)


def _empty(like: Any) -> Any:
    return type(like)() if isinstance(like, (int, float, Decimal, list, tuple, Set, dict)) else None
