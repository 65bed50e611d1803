"""DBOS: a workflow of three steps, that undoes what is done where one fails, and raises."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from dbos import DBOS

from benchmarks.names import WAIT
from benchmarks.pace import at_once, in_sequence
from benchmarks.peers.line import database_url, serve

Context = dict[str, Any]


class Refused(Exception):
    pass


def order() -> Context:
    return {"order_id": 1, "items": ["a", "b"], "total": "12.50", "reservation_id": None}


@DBOS.step()
def s0(context: Context) -> None:
    pass


@DBOS.step()
def s1(context: Context) -> None:
    pass


@DBOS.step()
def s2(context: Context) -> None:
    pass


@DBOS.step()
def refusing(context: Context) -> None:
    raise Refused("no")


@DBOS.step()
def undo_s0(context: Context) -> None:
    pass


@DBOS.step()
def undo_s1(context: Context) -> None:
    pass


@DBOS.workflow()
def success(context: Context) -> None:
    for step in (s0, s1, s2):
        step(context)


@DBOS.workflow()
def failure(context: Context) -> None:
    undo: list[Callable[[Context], None]] = []
    try:
        for step, compensation in ((s0, undo_s0), (s1, undo_s1)):
            step(context)
            undo.append(compensation)
        refusing(context)
    except Refused:
        for compensation in reversed(undo):
            compensation(context)
        raise


@DBOS.step()
async def a0(context: Context) -> None:
    pass


@DBOS.step()
async def a1(context: Context) -> None:
    pass


@DBOS.step()
async def a2(context: Context) -> None:
    pass


@DBOS.workflow()
async def async_success(context: Context) -> None:
    for step in (a0, a1, a2):
        await step(context)


@DBOS.step()
async def w0(context: Context) -> None:
    await asyncio.sleep(WAIT)


@DBOS.step()
async def w1(context: Context) -> None:
    await asyncio.sleep(WAIT)


@DBOS.step()
async def w2(context: Context) -> None:
    await asyncio.sleep(WAIT)


@DBOS.workflow()
async def waits(context: Context) -> None:
    for step in (w0, w1, w2):
        await step(context)


def fail() -> None:
    with contextlib.suppress(Refused):
        failure(order())


def main() -> None:
    logging.disable(logging.CRITICAL)
    DBOS(
        config={
            "name": "benchmarks",
            "system_database_url": database_url("postgresql"),
            "log_level": "CRITICAL",
        }
    )
    DBOS.launch()
    runner = asyncio.Runner()
    serve(
        ["dbos"],
        {
            "success": lambda _, seconds: in_sequence(lambda: success(order()), seconds),
            "failure": lambda _, seconds: in_sequence(fail, seconds),
            "async": lambda tasks, seconds: runner.run(
                at_once([lambda: async_success(order())] * tasks, seconds)
            ),
            "waits": lambda tasks, seconds: runner.run(
                at_once([lambda: waits(order())] * tasks, seconds)
            ),
        },
    )
    DBOS.destroy()


if __name__ == "__main__":
    main()
