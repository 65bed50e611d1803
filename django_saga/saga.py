"""Sagas: what a user declares, and the ways to run it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin
from uuid import UUID

from asgiref.sync import sync_to_async
from django.apps import apps
from django.utils.module_loading import import_string

from django_saga import bulk, engine, limits, machine, registry
from django_saga.backends import Backend, get_backend
from django_saga.conf import conf
from django_saga.context import ContextT
from django_saga.definition import Definition, define
from django_saga.drivers import AsyncDriver, drive, refuse_running_loop
from django_saga.exceptions import InvalidDefinition, InvalidSettings, SagaAlreadyRunning, SagaError
from django_saga.steps import Fallback, StepType
from django_saga.texts import shown
from django_saga.transaction import SagaTransaction

if TYPE_CHECKING:
    from django_saga.models import SagaExecution
    from django_saga.storage import DjangoSagaStorage, SagaStorage


class _DefaultName:
    """App label and class name, asked for only once the apps are known."""

    def __get__(self, instance: object, owner: type[Saga[Any]]) -> str:
        name = registry.default_name(owner)
        if apps.apps_ready:
            owner.name = name
        return name


class Saga(Generic[ContextT]):
    """A business transaction over several services, as a list of steps.

    Declare a class, ``class OrderSaga(Saga[OrderContext])`` with ``steps``, in an app's
    ``sagas.py``; or make one ad hoc, ``Saga(steps=[...])``, which only the code that made it can
    resume: recovery finds no class of its name, and ends it as STUCK.
    """

    name: ClassVar[str] = _DefaultName()  # type: ignore[assignment]
    """What rows call this saga; default: app label and class name. Keep it when the class moves."""

    steps: ClassVar[Sequence[StepType | Fallback]] = ()
    """The steps, in order."""

    retired_steps: ClassVar[Sequence[StepType]] = ()
    """Steps that are no longer in ``steps``, but in plans of executions that have not ended."""

    context_editable: ClassVar[bool] = False
    """Whether operators may edit the stored context of an execution."""

    queue: str | None = None
    """The django-rq queue of its jobs; default: the setting ``QUEUE``."""

    max_running: ClassVar[int | None] = None
    """How many executions may run at once, by ``limit_key``; default: any number.

    One runs from when it begins until it has ended or is stuck, also while it waits for a retry.
    What more is enqueued waits, PENDING, for its turn.
    """

    storage: SagaStorage
    """Where executions are kept; default: the project's database."""

    definition: Definition

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = _DefaultName()  # type: ignore[assignment]
        if not cls.steps and "steps" not in cls.__dict__:
            return
        owner = f"Saga {cls.__qualname__}"
        if not isinstance(cls.__dict__["name"], _DefaultName):
            _check_name(owner, cls.__dict__["name"])
        _check_queue(owner, cls.queue)
        most = cls.max_running
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise InvalidDefinition(f"{owner}: max_running must be 1 or more, not {most!r}.")
        cls.definition = define(owner, cls.steps, cls.retired_steps, _context_of(cls))
        registry.register(cls)

    def __init__(
        self,
        *,
        steps: Sequence[StepType | Fallback] | None = None,
        container: Any = None,
        storage: SagaStorage | None = None,
        queue: str | None = None,
        name: str | None = None,
    ) -> None:
        if name is not None:
            _check_name(f"Saga {type(self).__qualname__}", name)
            self.name = name  # type: ignore[misc]
        if steps is not None:
            self.steps = steps  # type: ignore[misc]
            owner = f"Saga {name or type(self).__qualname__}"
            self.definition = define(owner, steps, self.retired_steps, _context_of(type(self)))
        elif not hasattr(self, "definition"):
            raise InvalidDefinition(f"Saga {type(self).__qualname__} has no steps.")
        if storage is not None:
            self.storage = storage
        elif not hasattr(self, "storage"):
            self.storage = default_storage()
        if queue is not None:
            _check_queue(f"Saga {type(self).__qualname__}", queue)
            self.queue = queue
        self._container = container

    @property
    def container(self) -> Any:
        """What makes the handlers: an object with ``resolve(type)``; None: they are just called."""
        return self._container if self._container is not None else default_container()

    @property
    def backend(self) -> Backend:
        """Where this saga is driven when its caller does not drive it."""
        return get_backend()

    @classmethod
    def context_of(cls, execution: SagaExecution) -> ContextT:
        """The context that an execution stored last, typed; raises InvalidContext."""
        return cls.definition.codec.decode(execution.context)  # type: ignore[no-any-return]

    def limit_key(self, context: ContextT) -> str:
        """Those of one key count together for ``max_running``; asked once, when it is stored.

        A text of up to 255 characters. By default there is one key: all executions of the saga.
        """
        return ""

    def run(self, context: ContextT, *, saga_id: UUID | None = None) -> SagaExecution:
        """Drive the saga in this thread and return its execution, completed.

        Where it has to wait longer than ``INLINE_WAIT`` it is handed over to the backend, and the
        execution returned is not final. With the ``saga_id`` of an execution that exists, that one
        is resumed, with its stored context, or its recorded outcome returned.

        Raises SagaFailed (all is compensated), SagaStuck, SagaAlreadyRunning, SagaNotFound (the id
        belongs to another saga), InvalidContext, InsideTransaction, LeaseLost, SagaLimitReached (as
        many run as ``max_running`` allows; nothing is stored).
        """
        return drive(engine.start_and_finish(self, context, _uuid(saga_id)))

    async def arun(self, context: ContextT, *, saga_id: UUID | None = None) -> SagaExecution:
        """As :meth:`run`, in the running event loop.

        Cancelled, it lets the step in flight finish, hands the execution over, compensates nothing.
        """
        driver = AsyncDriver()
        start = engine.start(self, context, _uuid(saga_id))
        run = await driver.drive(start, give_up=engine.give_up)
        return await driver.drive(engine.finish(run), run)

    def enqueue(
        self, context: ContextT, *, saga_id: UUID | None = None, delay: float = 0.0
    ) -> SagaExecution:
        """Store the saga and have the backend drive it, in ``delay`` seconds at the earliest.

        Inside ``atomic()`` it joins the transaction: the saga is stored if that commits, and starts
        then. Returns the execution as it was stored, PENDING; refresh_from_db() tells how it goes.
        The in-process backend drives it before this returns, or on commit, and logs a failure.
        Raises InvalidContext, and SagaAlreadyRunning for a ``saga_id`` that is taken.
        """
        refuse_running_loop("await aenqueue()")
        return enqueue(self, context, saga_id=_uuid(saga_id), delay=delay)

    async def aenqueue(
        self, context: ContextT, *, saga_id: UUID | None = None, delay: float = 0.0
    ) -> SagaExecution:
        """As :meth:`enqueue`, from async code."""
        return await sync_to_async(self.enqueue)(context, saga_id=saga_id, delay=delay)

    def enqueue_many(
        self, contexts: Iterable[ContextT], *, saga_ids: Iterable[UUID] | None = None
    ) -> list[UUID]:
        """Store a saga for each context, and have the backend drive them; for imports.

        Both iterables are read as it goes, a thousand at a time: these are stored in one statement,
        and handed over together. Returns the ids of the executions that are new, in their order;
        one whose id is taken, by an earlier call or an earlier context, is left as it is.

        Nothing is lost when it raises: the thousands before are stored and are driven; nothing of
        the one at hand is stored, nor what would follow. With ``saga_ids`` call it again with all
        of them, and what is missing is stored. Inside ``atomic()`` it joins the transaction: all of
        them are stored if that commits, none if not, and they start then.

        As with :meth:`enqueue`, the in-process backend drives each thousand before it stores the
        next, or all on commit, and logs a failure.

        Raises InvalidContext, which names the position of the context, from 0 on; SagaError where
        ``saga_ids`` are more or fewer than ``contexts``.
        """
        refuse_running_loop("await aenqueue_many()")
        if self.backend.queues:
            _refuse_out_of_reach(self)
        ids = None if saga_ids is None else map(_uuid, saga_ids)
        return bulk.enqueue_many(self, contexts, ids)

    async def aenqueue_many(
        self, contexts: Iterable[ContextT], *, saga_ids: Iterable[UUID] | None = None
    ) -> list[UUID]:
        """As :meth:`enqueue_many`, from async code; the iterables are read in a thread."""
        return await sync_to_async(self.enqueue_many)(contexts, saga_ids=saga_ids)

    def transaction(
        self, context: ContextT, *, saga_id: UUID | None = None
    ) -> SagaTransaction[ContextT]:
        """The saga step by step: ``with`` and ``for``, or ``async with`` and ``async for``."""
        return SagaTransaction(self, context, _uuid(saga_id))


def enqueue(
    saga: Saga[Any],
    context: Any,
    *,
    saga_id: UUID | None = None,
    delay: float = 0.0,
    retry_of: UUID | None = None,
) -> SagaExecution:
    """See :meth:`Saga.enqueue`; ``retry_of`` links the execution that this one repeats."""
    from django_saga.models import new_id

    delay = _delay(delay, "enqueue()")
    encoded = saga.definition.codec.encode(context, limit=conf.CONTEXT_LIMIT)
    state = machine.start(saga.definition.plan, encoded, pending=True)
    storage, backend = saga.storage, saga.backend
    if backend.queues:
        _refuse_out_of_reach(saga)
    claim = storage.create(
        saga_id or new_id(),
        saga.name,
        state,
        wake=delay or None,
        grace=backend.grace(delay),
        retry_of=retry_of,
        limit_key=limits.key_of(saga, context),
    )
    if claim is None:
        raise SagaAlreadyRunning(
            f"There is an execution with the id {saga_id} already; run() with that id resumes it, "
            "or returns its outcome."
        )
    storage.on_commit(partial(backend.hand_over, saga, claim.id, delay))
    return storage.execution(claim, state, claim.at, leased=False)


def _refuse_out_of_reach(saga: Saga[Any]) -> None:
    """A worker gets an id, looks into the project's database, and for the saga by its name."""
    registry.find_saga(saga.name)
    ours, theirs = default_storage(), saga.storage
    if "queue" in vars(saga):
        return  # its workers are those of that database, says who made it
    if type(ours) is not type(theirs) or ours.alias != theirs.alias:
        raise SagaError(
            f"Saga {saga.name} has a storage of its own, where no worker looks: "
            f"run() it, leave it in the project's database to enqueue() it, or give it the queue "
            "of workers whose database that is."
        )


@cache
def default_storage() -> DjangoSagaStorage:
    """The project's database; one for all, so that the keeper renews all their leases in one go."""
    from django_saga.storage.django import DjangoSagaStorage

    return DjangoSagaStorage()


def default_container() -> Any:
    """The container of the settings, or None; raises InvalidSettings."""
    container = conf.CONTAINER
    try:
        container = import_string(container) if isinstance(container, str) else container
    except ImportError as error:
        raise InvalidSettings(f"DJANGO_SAGA['CONTAINER'] cannot be imported: {error}") from error
    if container is not None and not hasattr(container, "resolve"):
        raise InvalidSettings(f"DJANGO_SAGA['CONTAINER'] {container!r} has no resolve(type).")
    return container


def _check_queue(owner: str, queue: object) -> None:
    if queue is not None and not (isinstance(queue, str) and queue):
        raise InvalidDefinition(f"{owner}: its queue must be a name, not {queue!r}.")


def _check_name(owner: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 255:
        raise InvalidDefinition(f"{owner}: its name must be 1 to 255 characters, not {name!r}.")


def _context_of(saga: type[Saga[Any]]) -> Any:
    for base in saga.__mro__:
        for generic in getattr(base, "__orig_bases__", ()):
            origin = get_origin(generic)
            if isinstance(origin, type) and issubclass(origin, Saga):
                argument = get_args(generic)[0]
                if not isinstance(argument, TypeVar):
                    return argument
    return None


def _delay(seconds: object, what: str) -> float:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= 366 * 86400:
        raise SagaError(f"{what} takes a delay between 0 seconds and a year, not {shown(seconds)}.")
    return float(seconds)


def _uuid(saga_id: object) -> UUID | None:
    if saga_id is None or isinstance(saga_id, UUID):
        return saga_id
    try:
        return UUID(str(saga_id))
    except Exception:  # also from its __str__
        raise SagaError(f"A saga_id is a UUID, not {shown(saga_id)}.") from None
