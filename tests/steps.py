"""Step handlers and contexts that tests share."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from django_saga import SagaContext, SagaStepHandler, current_step


@dataclass
class Log(SagaContext):
    """Notes in the context what was done, so that it is stored and compensated with it."""

    done: list[str] = field(default_factory=list)
    number: int = 0


class Calls(list[str]):
    """What handlers were called, noted outside of every context and storage."""

    def note(self, extra: str = "") -> None:
        step = current_step()
        self.append(f"{step.action} {step.step}{extra}")


Handler = Callable[[Log], Any]


def make_step(
    name: str,
    calls: Calls,
    *,
    act: Handler | None = None,
    compensate: Handler | None = None,
    is_async: bool = False,
    **attributes: Any,
) -> type[SagaStepHandler[Log]]:
    """A handler class that notes its calls and then does what it is told."""

    def run(handler: Handler | None, context: Log) -> Any:
        calls.note()
        context.done.append(calls[-1])
        return handler(context) if handler else name

    def sync_act(self: Any, context: Log) -> Any:
        return run(act, context)

    def sync_compensate(self: Any, context: Log) -> Any:
        return run(compensate, context)

    async def async_act(self: Any, context: Log) -> Any:
        return run(act, context)

    async def async_compensate(self: Any, context: Log) -> Any:
        return run(compensate, context)

    body = {
        "act": async_act if is_async else sync_act,
        "compensate": async_compensate if is_async else sync_compensate,
        **attributes,
    }
    return types.new_class(name, (SagaStepHandler[Log],), {}, lambda ns: ns.update(body))


def raises(error: BaseException, *, times: int | None = None) -> Handler:
    """Raises the first ``times`` times, or always."""
    left = [times]

    def handler(context: Log) -> None:
        if left[0] is None:
            raise error
        if left[0] > 0:
            left[0] -= 1
            raise error

    return handler
