"""All SQL of the storage. Three dialects differ in the clock and in what one statement can do.

Every time is given in seconds from the database's own now, so no clock but the database's decides
about a lease or a wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

EXECUTIONS = "django_saga_sagaexecution"
RECORDS = "django_saga_sagasteprecord"
GROUPS = "django_saga_sagafailuregroup"

PAUSED = (
    "EXISTS (SELECT 1 FROM django_saga_sagapause pause "
    f"WHERE pause.saga = {EXECUTIONS}.saga AND pause.step IN ('', {EXECUTIONS}.step))"
)
# Of many rows: not NOT EXISTS, which PostgreSQL may make a join, and sort all that waits.
PAUSES = "(SELECT saga, step FROM django_saga_sagapause)"
UNPAUSED = f"(saga, '') NOT IN {PAUSES} AND (saga, step) NOT IN {PAUSES}"
ASKED = f"cancel_reason, {PAUSED} AS paused"  # what operators ask of whoever drives it

ACTIVE = "('PENDING', 'RUNNING', 'COMPENSATING')"

UNPLACED = "(limit_key IS NOT NULL AND slot IS NULL)"  # it does not go on before it has a place

TAKEABLE = f"token < {2**63 - 1}"  # one more would not fit, and fail for all others too

CREATED = (
    "id",
    "saga",
    "plan",
    "initial_context",
    "retry_of_id",
    "status",
    "step",
    "in_flight",
    "atomic",
    "context",
)
LIMITED = ("limit_key", "slot")
RECORD = ("step", "action", "attempt", "outcome", "duration", "token")
ERROR = ("error_type", "error_message", "traceback")
CAUSE = ("id", "saga", "step", "action", "outcome", "error_type", "frame", "message")


@dataclass(frozen=True)
class Dialect:
    """What a vendor's SQL looks like where it differs."""

    now: str
    after: str  # now and some seconds: {0} is a number or NULL
    age: str  # seconds since the latest checkpoint
    told: str = "{0}"  # a time as it is returned: seconds of the epoch are read the soonest
    greatest: str = "GREATEST"
    least: str = "LEAST"
    number: str = "%s"
    name: str = "%s"  # compared byte by byte
    leases: str = "(id, token) IN ({0})"
    skip_duplicate: str = ""
    given: str = "VALUES {0}"  # ids, contexts, limit keys: {0} is a "(%s, %s, %s)" for each
    arrays: bool = False  # given takes all ids in one parameter, all contexts, all keys
    returns_updates: bool = False
    one_statement: bool = False
    partial_indexes: bool = True
    skip_locked: str = ""
    readable: str = ""  # whether Python can read a row's times at all


_TIMES = (
    *("created_at", "updated_at", "finished_at", "settled_at", "blanked_at"),
    *("lease_until", "wake_at"),
)

DIALECTS = {
    "postgresql": Dialect(
        now="statement_timestamp()",
        after="statement_timestamp() + make_interval(secs => {0})",
        age="EXTRACT(EPOCH FROM statement_timestamp() - updated_at)::float8",
        told="EXTRACT(EPOCH FROM {0})::float8",
        number="%s::float8",
        skip_duplicate=" ON CONFLICT (id) DO NOTHING",
        given="SELECT * FROM unnest(%s::uuid[], %s::text[], %s::text[])",
        arrays=True,
        returns_updates=True,
        one_statement=True,
        skip_locked=" FOR UPDATE SKIP LOCKED",
        readable="".join(
            f" AND ({time} IS NULL OR {time} BETWEEN '0001-01-02' AND '9999-12-30')"
            for time in _TIMES
        ),
    ),
    "sqlite": Dialect(
        now="strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now')",
        after="strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now', {0} || ' seconds')",
        age="(julianday('now') - julianday(updated_at)) * 86400.0",
        greatest="MAX",
        least="MIN",
        leases="(id, token) IN (VALUES {0})",
        skip_duplicate=" ON CONFLICT (id) DO NOTHING",
        returns_updates=True,
    ),
    "mysql": Dialect(  # MariaDB; its INSERT IGNORE would also hide truncated values
        now="UTC_TIMESTAMP(6)",
        after="UTC_TIMESTAMP(6) + INTERVAL {0} SECOND",
        age="TIMESTAMPDIFF(MICROSECOND, updated_at, UTC_TIMESTAMP(6)) / 1e6",
        name="BINARY %s",  # its collations ignore case and trailing spaces
        partial_indexes=False,
        skip_locked=" FOR UPDATE SKIP LOCKED",
    ),
}


class Statements:
    """The statements in one dialect, built once; the comments name their parameters in order."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        now, after = dialect.now, dialect.after.format(dialect.number)
        free = f"(lease_until IS NULL OR lease_until <= {now})"
        self.row = f"*, {now} AS db_now, {PAUSED} AS paused"
        self.asked = f"SELECT {ASKED} FROM {EXECUTIONS} WHERE id = %s"

        self.create = self._create(CREATED)
        self.create_limited = self._create((*CREATED, *LIMITED))

        # dialect.given; saga, plan, step, grace
        self.create_many = (
            f"INSERT INTO {EXECUTIONS} (id, initial_context, context, limit_key, saga, plan, step, "
            "grace_until, status, in_flight, atomic, driver, token, effects, "
            "created_at, updated_at) WITH given (id, context, limit_key) AS ({0}) "
            f"SELECT id, context, context, limit_key, %s, %s, %s, {after}, "
            f"'PENDING', FALSE, FALSE, '', 1, '[]', {now}, {now} "
            f"FROM given WHERE TRUE{dialect.skip_duplicate} RETURNING id"
        )

        # ids; though this transaction began before they were there
        lock = "" if dialect.skip_duplicate else " LOCK IN SHARE MODE"
        self.taken = f"SELECT id FROM {EXECUTIONS} WHERE id IN ({{0}}){lock}"

        # lease, driver
        self.take = f"token = token + 1, grace_until = NULL, lease_until = {after}, driver = %s"
        # as take, then id, saga, any saga, though it is paused, token
        self.acquire = (
            f"UPDATE {EXECUTIONS} SET {self.take} WHERE id = %s "
            f"AND (saga = {dialect.name} OR %s) AND status IN {ACTIVE} AND {TAKEABLE} "
            f"AND (({free} AND (NOT ({PAUSED} OR {UNPLACED}) OR %s)) OR token = %s)"
        )
        # as take, then place, id
        self.acquire_place = (
            f"UPDATE {EXECUTIONS} SET {self.take}, slot = %s WHERE id = %s "
            f"AND {TAKEABLE} AND {free} AND NOT {PAUSED} AND {UNPLACED}"
        )
        held = f"FROM {EXECUTIONS} held WHERE saga = %s AND limit_key = %s AND slot IS NOT NULL"
        self.running = f"SELECT COUNT(*) {held}"
        # saga, limit key; both again; both again
        self.place = (
            f"SELECT MIN(n), ({self.running}) "
            f"FROM (SELECT 1 AS n UNION ALL SELECT slot + 1 {held}) numbers "
            f"WHERE NOT EXISTS (SELECT 1 {held} AND slot = n)"
        )
        # seconds, at most; what has waited long is left alone for as long again, so that a long
        # queue is not told of the same executions at every sweep
        longer = f"{dialect.greatest}({dialect.number}, COALESCE({dialect.age}, 0))"
        longer = f"{dialect.least}({longer}, {dialect.number})"
        self.leave_alone = f"grace_until = {dialect.after.format(longer)}"
        ready = (
            f"{TAKEABLE} AND {free} AND (wake_at IS NULL OR wake_at <= {now}) "
            f"AND (grace_until IS NULL OR grace_until <= {now}) AND {UNPAUSED}{dialect.readable}"
        )
        active = f"FROM {EXECUTIONS} WHERE status IN {ACTIVE}"
        due = f"SELECT id {active} AND {ready}"
        order = "ORDER BY saga, limit_key, created_at LIMIT"  # that of the index
        page = f"{order} %s{dialect.skip_locked}"
        # BETWEEN, or PostgreSQL takes the index on the time alone, and reads all other sagas too.
        unlimited = f"{due} AND limit_key IS NULL AND saga BETWEEN {{0}} AND {{0}}"
        # saga, saga, limit
        self.due = f"{unlimited.format(dialect.name)} {page}"
        # saga, limit key, limit
        self.due_placed = f"{due} AND saga = %s AND limit_key = %s AND slot IS NOT NULL {page}"
        self.due_unplaced = f"{due} AND saga = %s AND limit_key = %s AND slot IS NULL {page}"
        # saga, limit key, limit
        self.next_waiting = (
            f"SELECT id {active} AND saga = %s AND limit_key = %s AND slot IS NULL "
            f"AND (wake_at IS NULL OR wake_at <= {now}) AND {UNPAUSED} {order} %s"
        )
        # The sagas that have not ended, whether something without a limit is due of each, and its
        # first limit key. The index leads from one name to the next, and to its oldest.
        name, key = f"SELECT MIN(saga) {active}", f"SELECT MIN(limit_key) {active}"
        self.sagas = (
            f"WITH RECURSIVE names (name) AS ({name} UNION ALL "
            f"SELECT ({name} AND saga > name) FROM names WHERE name IS NOT NULL) "
            f"SELECT name, ({unlimited.format('name')} {order} 1) IS NOT NULL, "
            f"({key} AND saga = name AND limit_key IS NOT NULL) FROM names WHERE name IS NOT NULL"
        )
        # The limit keys of a saga, whether something with a place is due of each, whether something
        # waits for one, and how many have one. Parameters: saga, each time.
        of_key = "AND saga = %s AND limit_key = key"
        self.keys = (
            f"WITH RECURSIVE limits (key) AS ({key} AND saga = %s AND limit_key IS NOT NULL "
            f"UNION ALL SELECT ({key} AND saga = %s AND limit_key > key) FROM limits "
            f"WHERE key IS NOT NULL) SELECT key, ({due} {of_key} AND slot IS NOT NULL LIMIT 1) "
            f"IS NOT NULL, (SELECT id {active} {of_key} AND slot IS NULL {order} 1) IS NOT NULL, "
            f"(SELECT COUNT(*) {active} {of_key} AND slot IS NOT NULL) "
            "FROM limits WHERE key IS NOT NULL"
        )
        if not dialect.partial_indexes:
            self.sagas = (
                f"SELECT MIN(saga), SUM(limit_key IS NULL AND {ready}) > 0, MIN(limit_key) "
                f"{active} GROUP BY BINARY saga"
            )
            self.keys = (
                f"SELECT MIN(limit_key), SUM(slot IS NOT NULL AND {ready}) > 0, "
                f"SUM(slot IS NULL) > 0, SUM(slot IS NOT NULL) {active} "
                "AND saga = %s AND limit_key IS NOT NULL GROUP BY limit_key"
            )

        # lease; then dialect.leases, with id and token of each
        self.renew = (
            f"UPDATE {EXECUTIONS} SET lease_until = {after} "
            f"WHERE status IN {ACTIVE} AND lease_until IS NOT NULL AND "
        )
        # keep in flight, grace, id, token
        self.release = (
            f"UPDATE {EXECUTIONS} SET lease_until = NULL, in_flight = (in_flight AND %s), "
            f"grace_until = {after} WHERE id = %s AND token = %s AND status IN {ACTIVE}"
        )

    def _create(self, columns: tuple[str, ...]) -> str:
        """Parameters: columns, driver, lease, wake, grace; the others have their default."""
        now, after = self.dialect.now, self.dialect.after.format(self.dialect.number)
        return (
            f"INSERT INTO {EXECUTIONS} ({', '.join(columns)}, driver, token, effects, "
            "lease_until, wake_at, grace_until, created_at, updated_at) "
            f"VALUES ({', '.join(['%s'] * len(columns))}, %s, 1, '[]', {after}, {after}, {after}, "
            f"{now}, {now}){self.dialect.skip_duplicate} "
            f"RETURNING {self.dialect.told.format('created_at')}, {PAUSED}"
        )

    @lru_cache(maxsize=512)  # noqa: B019 - there is one instance for each vendor, for ever
    def update(self, changed: tuple[str, ...], wake: bool, grace: bool, final: bool) -> str:
        """Parameters: changed, lease, wake and grace if given; id, token, and where it was."""
        now, after = self.dialect.now, self.dialect.after.format(self.dialect.number)
        assignments = [f"{c} = %s" for c in changed]
        assignments += [
            f"lease_until = {after}",
            f"wake_at = {after if wake else 'NULL'}",
            f"grace_until = {after if grace else 'NULL'}",
            f"updated_at = {now}",
            f"finished_at = {now if final else 'NULL'}",
        ]
        return (
            f"UPDATE {EXECUTIONS} SET {', '.join(assignments)} "
            "WHERE id = %s AND token = %s AND status = %s "
            f"AND step = {self.dialect.name} AND action = %s AND attempt = %s"
        )

    @lru_cache(maxsize=4)  # noqa: B019
    def record(self, error: bool, changes: bool) -> str:
        """For after an update, in its transaction. Parameters: RECORD, ERROR, changes; id."""
        columns = _columns(error, changes)
        return (
            f"INSERT INTO {RECORDS} ({', '.join(columns)}, driver, execution_id, created_at) "
            f"SELECT {', '.join(['%s'] * len(columns))}, driver, id, updated_at "
            f"FROM {EXECUTIONS} WHERE id = %s RETURNING id, created_at"
        )

    @property
    def group(self) -> str:
        """For after an update, in its transaction. Parameters: CAUSE."""
        ignore = " IGNORE" if not self.dialect.skip_duplicate else ""
        return (
            f"INSERT{ignore} INTO {GROUPS} ({', '.join(CAUSE)}, first_seen) "
            f"VALUES ({', '.join(['%s'] * len(CAUSE))}, {self.dialect.now})"
            f"{self.dialect.skip_duplicate}"
        )

    @lru_cache(maxsize=1024)  # noqa: B019
    def checkpoint(
        self, kind: tuple[tuple[str, ...], bool, bool, bool], record: Kind | None, cause: bool
    ) -> str:
        """All in one statement, whose other parts do nothing where the update matched no row.

        Parameters: as update, then CAUSE if any, then RECORD, ERROR, changes, as there are any.
        """
        now, at = self.dialect.now, self.dialect.told.format(self.dialect.now)
        if record is None and not cause:
            return f"{self.update(*kind)} RETURNING NULL, {at}, {ASKED}"
        parts = f"WITH execution AS ({self.update(*kind)} RETURNING id, driver, {ASKED}) "
        if cause:
            typed = ", ".join(["%s::text"] * len(CAUSE))
            parts += (
                f", failure AS (INSERT INTO {GROUPS} ({', '.join(CAUSE)}, first_seen) "
                f"SELECT {typed}, {now} FROM execution ON CONFLICT (id) DO NOTHING) "
            )
        if record is None:
            return f"{parts} SELECT NULL, {at}, cancel_reason, paused FROM execution"
        columns = _columns(*record)
        typed = ", ".join(f"%s::{_TYPES.get(c, 'text')}" for c in columns)
        return (
            f"{parts}INSERT INTO {RECORDS} "
            f"({', '.join(columns)}, driver, execution_id, created_at) "
            f"SELECT {typed}, driver, id, {now} FROM execution RETURNING id, {at}, "
            "(SELECT cancel_reason FROM execution), (SELECT paused FROM execution)"
        )


Kind = tuple[bool, bool]  # of a record: whether it has an error, and changes of the context


def _columns(error: bool, changes: bool) -> tuple[str, ...]:
    return RECORD + (ERROR if error else ()) + (("changes",) if changes else ())


_TYPES = {"attempt": "int", "duration": "float8", "token": "bigint"}
STATEMENTS = {vendor: Statements(dialect) for vendor, dialect in DIALECTS.items()}
