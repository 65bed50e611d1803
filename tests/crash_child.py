"""Runs a saga and dies, as by SIGKILL, before or after its n-th SQL statement.

``python -m tests.crash_child ALIAS SAGA_ID LEDGER N before|after``; exit status 9 means it died, 0
that there was no n-th statement. What the steps do remotely is a line in the ledger file.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

if __name__ == "__main__":
    import django

    django.setup()

from django.contrib.auth.models import Group
from django.db import connections

from django_saga import Saga, SagaContext, SagaFailed, SagaStepHandler, current_step
from django_saga.storage import DjangoSagaStorage


@dataclass
class CrashContext(SagaContext):
    alias: str
    ledger: str
    fail: bool = False


def note(context: CrashContext) -> None:
    """The effect of a remote call: known outside at once, whatever becomes of us."""
    step = current_step()
    with Path(context.ledger).open("a") as ledger:
        ledger.write(f"{step.action} {step.step} {step.idempotency_key}\n")


class First(SagaStepHandler[CrashContext]):
    def act(self, context: CrashContext) -> None:
        note(context)

    def compensate(self, context: CrashContext) -> None:
        note(context)


class Write(SagaStepHandler[CrashContext]):
    atomic = True

    def act(self, context: CrashContext) -> None:
        Group.objects.using(context.alias).create(name=str(current_step().saga_id))

    def compensate(self, context: CrashContext) -> None:
        Group.objects.using(context.alias).filter(name=str(current_step().saga_id)).delete()


class Last(SagaStepHandler[CrashContext]):
    def act(self, context: CrashContext) -> None:
        if context.fail:
            raise RuntimeError("the last step fails")
        note(context)


class CrashSaga(Saga[CrashContext]):
    name = "tests.crash"
    steps = [First, Write, Last]


class Death:
    """Ends the process around the n-th statement."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after = at, after

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            os._exit(9)
        answer = execute(sql, params, many, context)
        if self.left == 0:
            os._exit(9)
        return answer


def main() -> None:
    alias, saga_id, ledger, at, when, fail = sys.argv[1:]
    connections[alias].ensure_connection()
    saga = CrashSaga(storage=DjangoSagaStorage(alias))
    with connections[alias].execute_wrapper(Death(int(at), when == "after")):
        try:
            saga.run(CrashContext(alias, ledger, fail == "fail"), saga_id=UUID(saga_id))
        except SagaFailed:
            assert fail == "fail"


if __name__ == "__main__":
    main()
