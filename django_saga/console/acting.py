"""What the command does: one verb, to each execution that is named or chosen."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from django.core.exceptions import PermissionDenied
from django.core.management import CommandError
from django.db import OperationalError

from django_saga.console.arguments import dashed
from django_saga.console.asking import USAGE, asked
from django_saga.console.choosing import FILTERS, filtered, possible
from django_saga.console.rehearsing import POSSIBLE, REFUSED, rehearse, undone
from django_saga.documents import Document
from django_saga.exceptions import SagaError, StorageUnavailable
from django_saga.models import SagaExecution
from django_saga.operations import Verb, pause, resume
from django_saga.operations.asking import permit
from django_saga.texts import told, traced
from django_saga.verdicts import Verdict

logger = logging.getLogger("django_saga.console")

DONE, FAILED = "done", "failed"
LOOKED_AT = 10_000  # executions that are left alone, up to which they are counted

Say = Callable[[Document], None]


def act(verb: Verb, options: dict[str, Any], say: Say) -> Document:
    """Do it, or rehearse it; ``say`` is called with each result as it comes."""
    _refuse_misuse(verb, options)
    given: dict[str, Any] = {**asked(options), **_own(verb, options)}
    dry = options["dry_run"]
    results = []
    for target in _targets(verb, options):
        result = (rehearse if dry else _do)(verb, {**given, **target})
        results.append(result)
        say(result)
    document = {"verb": verb.name, "dry_run": dry, "results": results, **_tally(results)}
    if dry and _by_filters(verb, options):
        document["left_alone"] = _left_alone(verb, options)
    return document


def _refuse_misuse(verb: Verb, options: dict[str, Any]) -> None:
    if verb.needs_reason and not options["dry_run"] and not options["reason"].strip():
        raise CommandError(f"{dashed(verb.name)} needs a --reason.", returncode=USAGE)
    if not verb.bulk:
        return
    named, chosen = bool(options["ids"]), _by_filters(verb, options)
    if named == chosen:
        which = ", ".join(f"--{name}" for name in FILTERS)
        raise CommandError(f"Name executions, or choose them by {which}.", returncode=USAGE)
    if named and options["limit"]:
        raise CommandError("--limit goes with filters, not with ids.", returncode=USAGE)


def _by_filters(verb: Verb, options: dict[str, Any]) -> bool:
    return verb.bulk and any(options.get(name) for name in FILTERS)


def _own(verb: Verb, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that only this verb takes."""
    return {name: options[name] for name in verb.takes}


def _targets(verb: Verb, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Which ones; those that a filter chose are refused if they change meanwhile."""
    if not _by_filters(verb, options):
        for saga_id in dict.fromkeys(options.get("ids") or [options["id"]]):
            yield {"saga_id": saga_id}
        return
    permit(asked(options).get("user"), "django_saga.view_sagaexecution")
    rows = possible(verb, options).values_list("pk", "token", "status")
    pace = 1 / options["rate"] if options["rate"] and not options["dry_run"] else 0.0
    for number, (saga_id, token, status) in enumerate(list(rows[: options["limit"]])):
        if number and pace:
            time.sleep(pace)
        yield {"saga_id": saga_id, "token": token, "status": status}


def _do(verb: Verb, given: dict[str, Any]) -> Document:
    try:
        execution: SagaExecution = verb.function(**given)
    except (StorageUnavailable, OperationalError):
        raise
    except (SagaError, PermissionDenied) as error:
        return _result(given, REFUSED, told(error))
    except Exception as error:
        logger.error("%s of %s failed\n%s", verb.name, given["saga_id"], traced(error))
        return _result(given, FAILED, f"{type(error).__name__}: {told(error)}")
    return {
        **_result(given, DONE, ""),
        "saga": execution.saga,
        "status": execution.status,
        "result_id": str(execution.pk),
    }


def _result(given: dict[str, Any], result: str, says: str) -> Document:
    return {"id": str(given["saga_id"]), "result": result, "says": says}


def _tally(results: list[Document]) -> Document:
    counts = Counter(result["result"] for result in results)
    return {name: counts[name] for name in (DONE, POSSIBLE, REFUSED, FAILED)}


def _left_alone(verb: Verb, options: dict[str, Any]) -> list[Document]:
    """Why the others that the filters choose are left alone, by verdict."""
    rows = filtered(options, default="all").annotate(verdict=verb.verdict())
    others = rows.exclude(verdict__in=verb.possible).order_by()
    counts = Counter(others.values_list("verdict", flat=True)[:LOOKED_AT])
    return [
        {"verdict": verdict, "says": Verdict(verdict).of(number), "number": number}
        for verdict, number in sorted(counts.items())
    ]


def act_on_saga(what: str, options: dict[str, Any]) -> Document:
    """Pause or resume a saga, or a step of it; or rehearse that."""
    saga, step, dry = options["saga"], options["step"], options["dry_run"]
    function = {"pause": pause, "resume": resume}[what]
    result, says = POSSIBLE if dry else DONE, ""
    if what == "resume":
        says = "What waits for it goes on with the next sweep of recovery."
    try:
        with undone() if dry else nullcontext():
            function(saga, step, **asked(options))
    except StorageUnavailable:
        raise
    except (SagaError, PermissionDenied) as error:
        result, says = REFUSED, told(error)
    return {
        "verb": what,
        "dry_run": dry,
        "saga": saga,
        "step": step,
        "result": result,
        "says": says,
    }
