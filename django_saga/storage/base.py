"""What a storage does: its verbs, each one atomic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from uuid import UUID

from msgspec import Struct

from django_saga.causes import Cause
from django_saga.machine import Record, State

if TYPE_CHECKING:
    from datetime import datetime

    from django_saga.models import SagaExecution, SagaStepRecord


class Claim(Struct):
    """An execution as it was read, and the fencing token under which it may be driven."""

    id: UUID
    saga: str
    token: int
    state: State
    at: datetime  # the storage's clock, UTC
    wait: float = 0.0  # seconds until the next attempt may begin
    driver: str = ""
    retry_of: UUID | None = None
    cancel_reason: str = ""  # an operator asked for it
    paused: bool = False  # its saga or its step is
    limit_key: str | None = None  # of a saga with max_running
    place: bool | None = None  # whether it has one; None: it needs none
    execution: SagaExecution | None = None  # the row, where it was read or asked for


class Creation(Struct, frozen=True, kw_only=True, gc=False):
    """A new execution, as :meth:`SagaStorage.create` takes it."""

    id: UUID
    saga: str
    state: State
    driver: str = ""
    lease: float | None = None  # seconds, as the others
    wake: float | None = None
    grace: float | None = None
    retry_of: UUID | None = None
    limit_key: str | None = None


class Checkpoint(Struct, frozen=True, kw_only=True, gc=False):
    """One transition, and what goes with it on the row; all times in seconds from now."""

    id: UUID
    token: int
    before: State
    after: State
    record: Record | None = None
    duration: float | None = None  # of the attempt
    lease: float | None = None  # None: let the lease go
    wake: float | None = None  # the next attempt may not begin earlier
    grace: float | None = None  # recovery leaves it alone until then
    cause: Cause | None = None  # why it turned back or got stuck, where it just did
    place: bool | None = None  # as the claim's: it is given back where the execution ends
    changes: str = ""  # JSON: what its attempt changed in the context


class Saved(Struct, frozen=True, gc=False):
    """What a checkpoint left behind."""

    at: datetime  # the storage's clock, UTC
    record_id: int | None = None
    cancel_reason: str = ""  # an operator asked for it meanwhile
    paused: bool = False  # its saga is, or the step that comes next


Written = Saved | Claim | None | Exception


class SagaStorage(ABC):
    """Keeps executions and their history.

    Every method raises :class:`~django_saga.exceptions.StorageUnavailable` where it cannot tell
    whether its statement took effect.
    """

    blocking: bool = True
    """Whether the methods may block, so that the async driver must call them in a thread."""

    @abstractmethod
    def create(
        self,
        saga_id: UUID,
        saga: str,
        state: State,
        *,
        driver: str = "",
        lease: float | None = None,
        wake: float | None = None,
        grace: float | None = None,
        retry_of: UUID | None = None,
        limit_key: str | None = None,
    ) -> Claim | None:
        """Store a new execution in a state of machine.start's; None where the id is taken.

        With ``lease`` it is leased for so many seconds, and refused in a caller's transaction;
        without, it joins that. Of a saga with ``max_running`` it has a ``limit_key``; with
        ``lease`` it takes a place too, or SagaLimitReached is raised.
        """

    @abstractmethod
    def create_many(
        self,
        saga: str,
        state: State,
        contexts: Mapping[UUID, str],
        *,
        grace: float | None = None,
        limit_keys: Mapping[UUID, str] | None = None,
    ) -> list[UUID]:
        """Store new executions that differ in id, context and limit_key alone, in one statement.

        ``state`` is a pending one, whose own context does not matter. Returns the ids that were not
        taken, in their order; joins a caller's transaction.
        """

    @abstractmethod
    def acquire(
        self,
        saga_id: UUID,
        *,
        driver: str,
        lease: float,
        saga: str | None = None,
        token: int | None = None,
        by_hand: bool = False,
    ) -> Claim:
        """Lease an execution if its lease is free or past, or is held under ``token``.

        An execution that has ended is returned as it is. Raises SagaNotFound (also when it belongs
        to another ``saga``), SagaAlreadyRunning, SagaPaused, SagaLimitReached where one that goes
        forward has no place and there is none, and InsideTransaction. ``by_hand``: for an operator,
        who may do so within a transaction, while it is paused, and without a place.
        """

    @abstractmethod
    def checkpoint(self, checkpoint: Checkpoint, *, inside: bool = False) -> Saved:
        """Make a transition durable; raises LeaseLost, having written nothing.

        ``inside``: within an open :meth:`atomic` block; else InsideTransaction is raised in one.
        """

    def write(self, what: Checkpoint | Creation) -> Saved | Claim | None:
        """As :meth:`checkpoint` or :meth:`create`."""
        if isinstance(what, Checkpoint):
            return self.checkpoint(what)
        return self.create(
            what.id,
            what.saga,
            what.state,
            driver=what.driver,
            lease=what.lease,
            wake=what.wake,
            grace=what.grace,
            retry_of=what.retry_of,
            limit_key=what.limit_key,
        )

    def write_together(self, writes: Sequence[Checkpoint | Creation]) -> list[Written]:
        """As :meth:`write` of each, in one transaction where that can be.

        Returns what came of each: what it returned, or the error that it raised.
        """
        return [self._written(write) for write in writes]

    def _written(self, what: Checkpoint | Creation) -> Written:
        try:
            return self.write(what)
        except Exception as error:
            return error

    @abstractmethod
    def renew(self, leases: Sequence[tuple[UUID, int]], *, lease: float) -> set[UUID]:
        """Extend the leases (execution and token) that still hold; returns those executions."""

    @abstractmethod
    def release(
        self, saga_id: UUID, token: int, *, unstarted: bool = False, grace: float | None = None
    ) -> None:
        """Let a lease go, if it is still held; ``unstarted``: the attempt in flight never began."""

    @abstractmethod
    def due(
        self,
        limit: int,
        *,
        driver: str = "",
        lease: float | None = None,
        grace: float | None = None,
        saga: str | None = None,
    ) -> list[Claim]:
        """Claim what nobody drives and may go on now: of each saga an equal share, its oldest.

        With ``lease`` each is leased to the caller; with ``grace`` each is only left alone by
        further calls for as long as it has waited, at least ``grace`` and at most ten times that,
        since its backend is about to be told.
        """

    @abstractmethod
    def next_waiting(self, saga: str, limit_key: str, limit: int) -> list[UUID]:
        """Who waited longest for the places that are free now, and could begin."""

    @abstractmethod
    def running(self, saga: str, limit_key: str) -> int:
        """How many places are taken."""

    @abstractmethod
    def history(self, saga_id: UUID) -> list[SagaStepRecord]:
        """The step records, oldest first."""

    @abstractmethod
    def atomic(self, lease: float) -> AbstractContextManager[None]:
        """The transaction that an atomic step shares with its checkpoint."""

    @abstractmethod
    def on_commit(self, function: Callable[[], object]) -> None:
        """Call after the caller's transaction committed, or now where there is none."""

    @abstractmethod
    def refuse_transaction(self) -> None:
        """Raise InsideTransaction where a transaction of the caller's is open."""

    @abstractmethod
    def end_transaction(self) -> None:
        """Roll back the transaction that a handler left open in this thread."""

    @abstractmethod
    def execution(self, claim: Claim, state: State, at: datetime, leased: bool) -> SagaExecution:
        """The model instance of a claim as it stands, without reading it again."""
