"""The contexts of an execution as its page shows them: masked, and what each step changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _

from django_saga import registry
from django_saga.admin.formats import pretty
from django_saga.changes import unmasked
from django_saga.exceptions import InvalidContext, SagaError
from django_saga.masking import mask_json, sensitive_values
from django_saga.models import SagaAuditEntry, SagaExecution, SagaStepRecord
from django_saga.texts import told

VALUE_LIMIT = 300  # characters of a value in the table of changes
UNKNOWN = "…"  # a value that was set before the part of the history that is shown


def sensitive_of(execution: SagaExecution) -> Collection[str]:
    """The context's sensitive fields; all of them, where the code cannot tell any more."""
    try:
        return registry.find_saga(execution.saga).definition.codec.sensitive
    except SagaError:
        return {*_fields(execution.context), *_fields(execution.initial_context)}


def _fields(stored: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        value = json.loads(stored)
        if isinstance(value, dict):
            return value
    return {}


def contexts_of(execution: SagaExecution, *, masked: bool) -> list[dict[str, Any]]:
    """The stored context, and the original where that is another, for reading; none if blanked."""
    if execution.blanked_at is not None:
        return []
    sensitive = sensitive_of(execution)

    def context(title: str, stored: str, **options: Any) -> dict[str, Any]:
        text, cut = pretty(mask_json(stored, sensitive) if masked else stored)
        return {"title": title, "text": text, "cut": cut, **options}

    contexts = [context(_("as stored now"), execution.context, open=True)]
    if execution.context != execution.initial_context:
        contexts.append(context(_("as it was at the start"), execution.initial_context))
    return contexts


# What each step changed


@dataclass(frozen=True)
class Changed:
    """What one attempt, or an operator, changed: a name, what it was, and what it became."""

    who: str
    fields: list[tuple[str, str, str]]


def changes_of(
    execution: SagaExecution,
    records: Sequence[SagaStepRecord],
    edits: Iterable[SagaAuditEntry],
    *,
    from_start: bool,
) -> list[Changed]:
    """The changes that these records tell, and edits by hand among them, oldest first."""
    said = [(record.created_at, _attempt(record), record.changes) for record in records]
    if records:
        first, last = records[0].created_at, None if from_start else records[-1].created_at
        said += [
            (edit.at, _("%(user)s, by hand") % {"user": edit.user_name or edit.source}, edit.detail)
            for edit in edits
            if edit.at >= first and (last is None or edit.at <= last)
        ]
        said.sort(key=lambda one: one[0])
    each = [_fields(changes) for _at, _who, changes in said]
    # Masked as one, so that the value of a sensitive field is found in all the others.
    whole = {"now": _fields(execution.context), "all": each}
    whole["was"] = _fields(execution.initial_context) if from_start else {}
    masked = json.loads(mask_json(json.dumps(whole), sensitive_of(execution)))
    missing = _("not set") if from_start else UNKNOWN
    values, rows = masked["was"], []
    for (_at, who, _changes), fields in zip(said, masked["all"], strict=True):
        lines = [
            (name, _short(values[name]) if name in values else missing, _short(value))
            for name, value in fields.items()
        ]
        values |= fields
        if lines:
            rows.append(Changed(who, lines))
    return rows


def _attempt(record: SagaStepRecord) -> str:
    arrow = "→" if record.action == SagaStepRecord.Action.ACT else "←"
    return f"{arrow} {record.step}, {record.attempt}."


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= VALUE_LIMIT else f"{text[:VALUE_LIMIT]}…"


# Editing


def stored_masked(execution: SagaExecution) -> str:
    """The stored context for editing, with a mask for each secret."""
    masked = mask_json(execution.context, sensitive_of(execution))
    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(masked), indent=2, ensure_ascii=False)
    return masked


def edited(execution: SagaExecution, text: str) -> str:
    """The JSON that somebody made of :func:`stored_masked`, with what was left masked as stored.

    Raises InvalidContext where it is no JSON, does not fit the saga's context, or has a mask where
    nothing was masked; SagaError where the code knows the saga no more.
    """
    codec = registry.find_saga(execution.saga).definition.codec
    whole = unmasked(text, execution.context, codec.sensitive)
    try:
        codec.decode(whole)
    except InvalidContext as error:
        secrets = sensitive_values(execution.context, codec.sensitive)  # it may quote them
        why = told(error.__cause__ or error, secrets)
        facts = {"type": codec.context_type.__qualname__, "error": why}
        raise InvalidContext(_("This is no %(type)s: %(error)s") % facts) from error
    return whole
