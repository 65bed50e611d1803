"""The words on the screens, and their translations.

    python run.py python .ci/messages.py update   take the words out of the code, into each .po
    python run.py python .ci/messages.py check    fail where one is not translated, or not compiled

Babel reads Python alone; a template is first turned into Python, as Django's makemessages does it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_python
from babel.messages.mofile import read_mo, write_mo
from babel.messages.pofile import read_po, write_po
from django.conf import settings
from django.utils.translation.template import templatize

APP = Path(__file__).resolve().parent.parent / "django_saga"
LOCALES = APP / "locale"
Spec = tuple[int | tuple[int, str], ...] | None
KEYWORDS: dict[str, Spec] = {
    "_": None,
    "gettext": None,
    "gettext_lazy": None,
    "gettext_noop": None,
    "ngettext": (1, 2),
    "ngettext_lazy": (1, 2),
    "pgettext": ((1, "c"), 2),
    "pgettext_lazy": ((1, "c"), 2),
    "npgettext": ((1, "c"), 2, 3),
    "npgettext_lazy": ((1, "c"), 2, 3),
}


def messages() -> Catalog:
    """All words of the code and the templates, with the places where they stand."""
    catalog = Catalog(project="django-saga", charset="utf-8", fuzzy=False)
    for path in sorted((*APP.rglob("*.py"), *APP.rglob("*.html"))):
        for line, function, words in _extracted(path):
            add(catalog, KEYWORDS[function], words, (str(path.relative_to(APP.parent)), line))
    return catalog


def _extracted(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        source = re.sub(r"(?<=\()u(?=['\"])", "", templatize(source, origin=str(path)))
        # What is not Python there is filled up with X; only the calls count.
        source = "\n".join("; ".join(_CALL.findall(line)) for line in source.split("\n"))
    for line, function, words, _ in extract_python(BytesIO(source.encode()), KEYWORDS, [], {}):
        yield line, function, words if isinstance(words, tuple) else (words,)


_CALL = re.compile(
    r"""\b(?:gettext|ngettext|pgettext|npgettext|_)\((?:[^'")]|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")*\)"""
)


def add(catalog: Catalog, spec: Spec, words: tuple[str, ...], place: tuple[str, int]) -> None:
    """Add one message to the catalog, with its context and its plural if it has them."""
    context, message = None, words[0]
    if spec and isinstance(spec[0], tuple):
        context, *words = words
        message, spec = words[0], spec[1:]
    if message:
        plural = spec is not None and len(spec) == 2
        catalog.add(tuple(words[:2]) if plural else message, locations=[place], context=context)


def update(path: Path, fresh: Catalog) -> None:
    """Bring a translation up to the code, keeping what is translated."""
    with path.open("rb") as file:
        catalog = read_po(file, locale=path.parent.parent.name)
    catalog.update(fresh, no_fuzzy_matching=True)
    catalog.obsolete.clear()
    with path.open("wb") as file:
        write_po(file, catalog, width=100, no_location=True, ignore_obsolete=True)
    path.with_suffix(".mo").write_bytes(compiled(catalog))


def compiled(catalog: Catalog) -> bytes:
    """What Django reads."""
    file = BytesIO()
    write_mo(file, catalog)
    return file.getvalue()


def words_of(catalog: Catalog) -> set[str]:
    """What it says; its header names Babel's version, which may be another."""
    return {repr((m.id, m.context, m.string)) for m in catalog if m.id}


def faults(path: Path, fresh: Catalog) -> Iterator[str]:
    """What is wrong with a translation."""
    with path.open("rb") as file:
        catalog = read_po(file, locale=path.parent.parent.name)
    for message in fresh:
        if not message.id:
            continue
        known = catalog.get(message.id, message.context)
        words = known.string if known else ""
        if not all([words] if isinstance(words, str) else words) or (known and known.fuzzy):
            yield f"not translated: {message.id!r}"
        else:
            yield from (f"{message.id!r}: {error}" for error in known.check(catalog))
    for message in catalog:
        if message.id and not fresh.get(message.id, message.context):
            yield f"no longer in the code: {message.id!r}"
    with path.with_suffix(".mo").open("rb") as file:
        stored = read_mo(file)
    if words_of(stored) != words_of(read_mo(BytesIO(compiled(catalog)))):
        yield f"{path.with_suffix('.mo')} is not what {path.name} says: run update"


def main(what: str) -> None:
    settings.configure(USE_I18N=True)
    fresh, paths = messages(), sorted(LOCALES.glob("*/LC_MESSAGES/django.po"))
    if what == "update":
        for path in paths:
            update(path, fresh)
    found = [f"{path}: {fault}" for path in paths for fault in faults(path, fresh)]
    print(f"{len(fresh)} messages, {len(paths)} translations, {len(found)} faults")
    sys.exit("\n".join(found) if found else None)


if __name__ == "__main__":
    main(sys.argv[1])
