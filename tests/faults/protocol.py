"""The protocol as a model: all that two drivers and their faults can do to one execution.

A :class:`World` is everything there is at one moment: the row, its drivers, the statements that are
still on their way to the database, and the effects outside of it. :meth:`Protocol.moves` gives
every move that is possible there, and :func:`explore` makes them all, from everywhere, holding each
world that it comes to against the invariants. When to retry, fall back, undo or end is not modelled
here: that is :mod:`django_saga.machine` itself. What is modelled lies around it: checkpoints,
leases, tokens, calls and keys, and what goes wrong with them:

* a driver is killed: before its call, after it, before its checkpoint or after that;
* it freezes until its lease has run out, anywhere, and then goes on as if nothing had happened;
* it is asked to stop between two steps, or its consumer raises an error there;
* the reply to its checkpoint is lost, which was stored, or was not, or is yet to be;
* its call fails, or takes effect unheard, or leaves open whether it did;
* an operator retries what is stuck, by a statement that may be as late as any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from msgspec.structs import asdict, replace

from django_saga import machine
from django_saga.machine import Action, Error, Outcome, Plan, Report, State, Status, StepRules

ENDS = "L0: without a further fault it ends, however it goes on"
ONCE = "L1: an atomic step's effect stands once, or not at all when undone"
ONE_KEY = "L2: one key for each action"
TELLS = "L3: the status tells what stands"
ORDER = "L4: undone in the reverse order"
ONE_END = "L5: what has ended stays as it is"
TOKENS = "L5: tokens never decrease"
BACKWARD = "once compensating, never forward again"

MAX_RECOVERIES = 1
ENDED = (Status.COMPLETED, Status.FAILED)
TURNED = (Status.COMPENSATING, Status.FAILED, Status.STUCK)
WHY = Error("Error", "why")
FATES = {  # of a call: what its driver hears, and whether it took effect
    "done": (Outcome.DONE, True),
    "failed": (Outcome.FAILED, False),
    "unheard": (Outcome.UNKNOWN, True),
    "unknown": (Outcome.UNKNOWN, False),
}


class Rules(NamedTuple):
    """The rules of the protocol; each can be switched off."""

    one_transaction: bool = True  # an atomic step's writes commit together with its checkpoint
    stable_key: bool = True  # every attempt of an action has the same idempotency key
    write_ahead: bool = True  # the row says "in flight" before the call
    undo_unknown: bool = True  # what may have had an effect is undone too
    sweep: bool = True  # what nobody drives is found in the database
    after_lost_reply: str = "acquire"  # the lease again and look; or assume "failed", or "stored"
    alone: bool = True  # what is stored is one's own only if nobody had the lease meanwhile
    token: bool = True  # a checkpoint names the token of its lease
    compare_and_set: bool = True  # a checkpoint names the place that it leaves
    backward: bool = True  # once compensating, never forward again
    lease_check: bool = True  # a driver looks at its lease before each call


class Step(NamedTuple):
    """A step, and the fates that its calls may have."""

    name: str
    act: tuple[str, ...]
    compensate: tuple[str, ...]
    rules: StepRules


def step(name: str, act: str = "done", compensate: str = "done", **rules: Any) -> Step:
    """A step whose fates are separated by spaces; each action has one attempt unless told."""
    rules = {"compensation_retry": machine.ONCE, **rules}
    return Step(name, tuple(act.split()), tuple(compensate.split()), StepRules(**rules))


class Kept(State, frozen=True, kw_only=True, cache_hash=True):
    """A state that reckons its hash once; the machine hands on the kind that it is given."""


class Statement(NamedTuple):
    """A checkpoint: UPDATE ... SET after WHERE token and place are as in ``before``."""

    token: int
    before: State
    after: State
    write: tuple[str, Action] | None = None  # an atomic step's own, in the same transaction


READY, CHECKED, SAVING, DOUBT = "ready", "has checked its lease", "saving", "in doubt"


class Driver(NamedTuple):
    """A process that drives the execution, or believes that it does."""

    token: int
    state: State  # as it knows it
    at: str
    statement: Statement | None = None  # being saved, or in doubt
    lapsed: bool = False  # it froze, and its lease has run out


class World(NamedTuple):
    """Everything there is at one moment."""

    row: State
    token: int
    leased: bool  # the row's lease is neither free nor past
    drivers: tuple[Driver, ...]  # at most two
    under_way: tuple[Statement, ...]  # sent, and not in the database yet
    stands: tuple[int, ...]  # how often each step's effect stands, in the order of the steps
    answered: frozenset[tuple[str, Action, int]]  # step, action, key: the calls that took effect
    late: frozenset[str]  # steps that a late act affected, see Protocol._affect
    faults: int  # that may still happen
    retries: int  # that an operator may still order


class Move(NamedTuple):
    """Something that may happen next."""

    what: str
    world: World
    token: int = 0  # of the driver that it happens to
    fault: bool = False  # it may as well not happen
    breaks: str = ""  # an invariant


class Protocol(NamedTuple):
    """The moves of an execution of these steps, under these rules and with so many faults."""

    steps: tuple[Step, ...]
    plan: Plan
    rules: Rules = Rules()
    faults: int = 2
    retries: int = 0
    stops: bool = True  # drivers may be asked to stop
    freezes_before_calls: bool = True  # also after having checked its lease
    forgives_late: bool = True  # the judgement does
    refuses_late: bool = False  # services do, knowing the compensation

    def beginnings(self) -> Iterator[World]:
        """Started inline, by its driver; or stored, for whoever comes."""
        for pending in (False, True):
            state = Kept(**asdict(machine.start(self.plan, "{}", pending=pending)))
            drivers = () if pending else (Driver(1, state, READY),)
            none: frozenset[Any] = frozenset()
            stands = (0,) * len(self.steps)
            row, left = self._stored(state), (self.faults, self.retries)
            yield World(row, 1, not pending, drivers, (), stands, none, none, *left)

    def moves(self, world: World) -> Iterator[Move]:
        """Everything that may happen next."""
        for driver in world.drivers:
            for move in self._goes_on(world, driver):
                yield move._replace(token=driver.token)
            if world.faults:
                hit = world._replace(faults=world.faults - 1)
                for move in self._suffers(hit, driver):
                    yield move._replace(token=driver.token, fault=True)
        for statement in world.under_way:
            rest = tuple(other for other in world.under_way if other is not statement)
            arrived = world._replace(under_way=rest)
            yield Move("a statement arrives", heeded(self._land(arrived, statement) or arrived))
        if self.rules.sweep and len(world.drivers) < 2 and world.row.active and not world.leased:
            yield Move("a sweep takes it over", self._acquired(world))
        if world.row.status is Status.STUCK and world.retries:
            order = Statement(world.token, world.row, machine.compensate_again(world.row).state)
            under_way = (*world.under_way, order)
            ordered = world._replace(under_way=under_way, retries=world.retries - 1)
            yield Move("an operator orders a retry", ordered, fault=True)

    # A driver goes on

    def _goes_on(self, world: World, driver: Driver) -> Iterator[Move]:
        if driver.at is READY and driver.lapsed and self.rules.lease_check:
            yield Move("sees that its lease has run out", become(world, driver))
        elif driver.at is READY:
            yield Move("checks its lease", become(world, driver, driver._replace(at=CHECKED)))
        elif driver.at is CHECKED:
            yield from self._calls(world, driver)
        elif driver.at is SAVING:
            assert driver.statement is not None
            stored = self._land(world, driver.statement)
            lost = become(world, driver)  # its statement matched no row
            yield Move("saves", self._saved(stored, driver, driver.token) if stored else lost)
        else:
            yield Move("is no longer in doubt", self._resolved(world, driver))

    def _calls(self, world: World, driver: Driver) -> Iterator[Move]:
        """Call the handler; what an atomic step wrote waits for its checkpoint."""
        step, action = self._step(driver.state.step), driver.state.action
        for fate in step.act if action is Action.ACT else step.compensate:
            outcome, takes_effect = FATES[fate]
            after, breaks, write = world, "", None
            if takes_effect and step.rules.atomic and self.rules.one_transaction:
                write = step.name, action
            elif takes_effect:
                breaks = self._judge_order(world, driver)
                after = self._affect(world, driver, step)
            saving = driver._replace(at=SAVING, statement=self._settled(driver, outcome, write))
            what = f"calls {action} of {step.name}: {fate}"
            yield Move(what, become(after, driver, saving), breaks=breaks)

    def _affect(self, world: World, driver: Driver, step: Step) -> World:
        """What a call does outside of the database; a service does nothing twice for one key.

        An act from a driver that froze between its look at the lease and its call may come when
        others have compensated it already. Nothing on our side can come between that look and that
        call, so it cannot be fenced off here: what it leaves is called late, and forgiven.
        """
        action = driver.state.action
        called = step.name, action, 0 if self.rules.stable_key else driver.state.attempt
        if action is Action.ACT and called in world.answered and not step.rules.atomic:
            return world
        undone = any(known[:2] == (step.name, Action.COMPENSATE) for known in world.answered)
        late = action is Action.ACT and undone and driver.lapsed and self.freezes_before_calls
        if late and self.refuses_late:
            return world
        world = self._write(world, step.name, action)
        world = world._replace(answered=world.answered | {called})
        return world._replace(late=world.late | {step.name}) if late else world

    def _write(self, world: World, name: str, action: Action) -> World:
        stands, number = list(world.stands), self._number(name)
        if action is Action.ACT:
            stands[number] += 1
        elif stands[number] or self._step(name).rules.atomic:  # a service cancels what there is
            stands[number] -= 1
        return world._replace(stands=tuple(stands))

    # Checkpoints

    def _land(self, world: World, statement: Statement) -> World | None:
        """The statement comes to the database; None where it matches no row."""
        if self.rules.token and statement.token != world.token:
            return None
        if self.rules.compare_and_set and place(statement.before) != place(world.row):
            return None
        after = statement.after
        leased = after.active and after.in_flight  # not when it ended, or waits for a retry
        world = world._replace(row=self._stored(after), leased=leased)
        return self._write(world, *statement.write) if statement.write else world

    def _stored(self, state: State) -> State:
        return state if self.rules.write_ahead else replace(state, in_flight=False)

    def _saved(self, world: World, driver: Driver, token: int) -> World:
        """The driver goes on from what it saved, if its lease goes on."""
        assert driver.statement is not None
        after = driver.statement.after
        going = (Driver(token, after, READY),) if after.active and after.in_flight else ()
        return become(world, driver, *going)

    def _settled(
        self, driver: Driver, outcome: Outcome, write: tuple[str, Action] | None = None
    ) -> Statement:
        if outcome is Outcome.UNKNOWN and not self.rules.undo_unknown:
            outcome = Outcome.FAILED
        after = settle(driver.state, outcome, self._step(driver.state.step).rules)
        return Statement(driver.token, driver.state, after, write)

    def _acquired(self, world: World) -> World:
        """A newcomer takes the lease, and will save what became of the attempt in flight."""
        row, token = world.row, world.token + 1
        statement = Statement(token, row, self._taken_over(row))
        drivers = (*world.drivers, Driver(token, row, SAVING, statement))
        return world._replace(token=token, leased=True, drivers=drivers)

    def _taken_over(self, row: State) -> State:
        if row.status is Status.COMPENSATING and row.failed_step and not self.rules.backward:
            forward = replace(row, status=Status.RUNNING, action=Action.ACT, in_flight=True)
            return replace(forward, step=row.failed_step)
        if not row.in_flight:
            return machine.begin(row).state
        after = machine.interrupt(row, self._step(row.step).rules, MAX_RECOVERIES).state
        return after if self.rules.undo_unknown else replace(after, effects=row.effects)

    def _resolved(self, world: World, driver: Driver) -> World:
        """What a driver does about a checkpoint whose reply was lost."""
        statement = driver.statement
        assert statement is not None
        if self.rules.after_lost_reply == "stored":
            return self._saved(world, driver, driver.token)
        if self.rules.after_lost_reply == "failed":
            failed = self._settled(driver, Outcome.FAILED)
            return become(world, driver, driver._replace(at=SAVING, statement=failed))
        if world.row.active and world.leased and world.token != driver.token:
            return become(world, driver)  # others drive it now
        alone = world.token == driver.token or not self.rules.alone
        token = world.token + world.row.active  # what has ended is only read
        world = world._replace(token=token, leased=world.row.active)
        if alone and whole_place(world.row) == whole_place(self._stored(statement.after)):
            return self._saved(world, driver, token)
        if whole_place(world.row) != whole_place(self._stored(driver.state)):
            return become(world, driver)
        if statement.write:  # it was rolled back with its checkpoint: the attempt is lost
            statement = statement._replace(after=self._taken_over(driver.state), write=None)
        again = statement._replace(token=token)
        return become(world, driver, Driver(token, driver.state, SAVING, again))

    # Faults

    def _suffers(self, world: World, driver: Driver) -> Iterator[Move]:
        yield Move("is killed", become(world, driver))
        if not driver.lapsed and (self.freezes_before_calls or driver.at is not CHECKED):
            lapsed = become(world, driver, driver._replace(lapsed=True))
            yield Move("freezes until its lease has run out", lapsed)
        if driver.at is SAVING:
            assert driver.statement is not None
            doubt = become(world, driver, driver._replace(at=DOUBT))
            yield Move("loses the reply: it was not stored", doubt)
            under_way = (*world.under_way, driver.statement)
            yield Move("loses the reply: it is under way", doubt._replace(under_way=under_way))
            if stored := self._land(world, driver.statement):
                renewed = driver._replace(at=DOUBT, lapsed=False)
                yield Move("loses the reply: it was stored", become(stored, driver, renewed))
        if driver.at is READY and self.stops:
            gone = become(world, driver)
            if driver.token == world.token:
                gone = gone._replace(row=replace(world.row, in_flight=False), leased=False)
            yield Move("is asked to stop", gone)
        if driver.at is READY and driver.state.status is Status.RUNNING:
            turned = Statement(driver.token, driver.state, turn_back(driver.state))
            saving = driver._replace(at=SAVING, statement=turned)
            yield Move("has a consumer that raises", become(world, driver, saving))

    # The invariants

    def judge(self, world: World) -> Iterator[str]:
        """The invariants that do not hold in this world."""
        status, forgiven = world.row.status, self._forgiven(world)
        stands = {step.name: n for step, n in zip(self.steps, world.stands, strict=True)}
        atomic = {step.name for step in self.steps if step.rules.atomic}
        if any(stands[name] not in (0, 1) for name in atomic):
            yield ONCE
        if len(world.answered) != len({known[:2] for known in world.answered}):
            yield ONE_KEY
        if status in ENDED:
            for entry in self.plan:
                standing = sum(stands[name] for name in entry if name not in forgiven)
                if standing != (status is Status.COMPLETED):
                    yield ONCE if atomic.issuperset(entry) else TELLS
        if status is Status.STUCK:
            named = {effect.step for effect in machine.standing(world.row)}
            if {name for name in stands if stands[name]} - named - forgiven:
                yield TELLS

    def judge_change(self, before: World, after: World) -> Iterator[str]:
        """The invariants that a move breaks."""
        if before.token > after.token:
            yield TOKENS
        if before.row.status in ENDED and before.row != after.row:
            yield ONE_END
        if before.row.status in TURNED and after.row.status not in TURNED:
            yield BACKWARD

    def _judge_order(self, world: World, driver: Driver) -> str:
        """Nothing is undone while something later stands, unless that was given up."""
        if driver.state.status is not Status.COMPENSATING:
            return ""
        given_up = {
            e.step for e in driver.state.effects if e.undo is Outcome.FAILED
        } | self._forgiven(world)
        later = range(self._number(driver.state.step) + 1, len(self.steps))
        bad = any(world.stands[n] and self.steps[n].name not in given_up for n in later)
        return ORDER if bad else ""

    def _forgiven(self, world: World) -> frozenset[str]:
        return world.late if self.forgives_late else frozenset()

    def _number(self, name: str) -> int:
        return [step.name for step in self.steps].index(name)

    def _step(self, name: str) -> Step:
        return self.steps[self._number(name)]


def place(state: State) -> tuple[object, ...]:
    """What a checkpoint compares."""
    return state.status, state.step, state.action, state.attempt


def whole_place(state: State) -> tuple[object, ...]:
    """What a driver in doubt compares."""
    return *place(state), state.in_flight, state.effects


def become(world: World, driver: Driver, *after: Driver) -> World:
    """The driver goes on as another, or leaves."""
    drivers = (d for other in world.drivers for d in (after if other is driver else (other,)))
    return heeded(world._replace(drivers=tuple(drivers)))


def heeded(world: World) -> World:
    """The lease has run out if nobody is left who renewed it."""
    over = world.leased and all(driver.lapsed for driver in world.drivers)
    return world._replace(leased=False) if over else world


@cache
def settle(state: State, outcome: Outcome, rules: StepRules) -> State:
    error = None if outcome is Outcome.DONE else WHY
    return machine.settle(state, Report(outcome=outcome, context="{}", error=error), rules).state


@cache
def turn_back(state: State) -> State:
    return machine.turn_back(state, WHY).state


class Explored(NamedTuple):
    """What was found."""

    states: int
    edges: int
    broken: dict[str, str]  # invariant: the shortest way to break it, a move a line
    happened: set[str]  # what the moves were
    changes: set[tuple[State, State]]  # of the row


def explore(protocol: Protocol) -> Explored:
    """Make every move from every world that can be come to, nearest first."""
    came: dict[World, tuple[World, Move] | None] = dict.fromkeys(protocol.beginnings())
    number = {world: n for n, world in enumerate(came)}
    healing: dict[int, list[int]] = {}  # the worlds that may follow without a fault
    broken: dict[str, str] = {}
    happened, changes = set(), set()
    queue, edges = deque(came), 0
    while queue:
        world = queue.popleft()
        for invariant in protocol.judge(world):
            broken.setdefault(invariant, way(came, world))
        following = healing[number[world]] = []
        for move in protocol.moves(world):
            edges += 1
            happened.add(move.what)
            if move.world not in came:
                came[move.world] = world, move
                number[move.world] = len(number)
                queue.append(move.world)
            if not move.fault:
                following.append(number[move.world])
            if move.world.row is not world.row:
                changes.add((world.row, move.world.row))
            for invariant in (move.breaks, *protocol.judge_change(world, move.world)):
                if invariant:
                    broken.setdefault(invariant, f"{way(came, world)}\n{move.token} {move.what}")
        if not following and world.row.active:
            broken.setdefault(ENDS, way(came, world))
    try:
        TopologicalSorter(healing).prepare()
    except CycleError:
        broken.setdefault(ENDS, "it can go round in a circle")
    return Explored(len(came), edges, broken, happened, changes)


def way(came: dict[World, tuple[World, Move] | None], world: World) -> str:
    lines = []
    while (last := came[world]) is not None:
        world, move = last
        lines.append(f"{move.token} {move.what}")
    return "\n".join(reversed(lines))
