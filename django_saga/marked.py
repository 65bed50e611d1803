"""Which fields of a context are marked as sensitive, however deep in it they are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from msgspec import inspect


@lru_cache(maxsize=256)
def sensitive_fields(context_type: Any) -> frozenset[str]:
    """Their names, as JSON has them."""
    names: set[str] = set()
    _note_marked(inspect.type_info(context_type), names, set())
    return frozenset(names)


def _note_marked(info: inspect.Type, names: set[str], seen: set[int]) -> bool:
    """Note the names of marked fields; whether it is marked itself, or holds what has no name."""
    if id(info) in seen:  # a dataclass may hold itself
        return False
    seen.add(id(info))
    if isinstance(info, _WITH_KEYS):
        names |= {f.encode_name for f in info.fields if _note_marked(f.type, names, seen)}
        return False
    marked = isinstance(info, inspect.Metadata) and bool((info.extra or {}).get("sensitive"))
    inner = [_note_marked(inner, names, seen) for inner in _inner_types(info)]
    return marked or any(inner)


def _inner_types(info: inspect.Type) -> list[inspect.Type]:
    """Of a list, a dict, a union, ..."""
    found = []
    for name in info.__struct_fields__:
        value = getattr(info, name)
        for one in value if isinstance(value, tuple) else (value,):
            found.append(one.type if isinstance(one, inspect.Field) else one)
    return [one for one in found if isinstance(one, inspect.Type)]


_WITH_KEYS = (inspect.DataclassType, inspect.StructType, inspect.TypedDictType)
