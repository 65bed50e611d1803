"""A crowd of executions as a busy month leaves them, made by PostgreSQL itself, quickly."""

from __future__ import annotations

from django.db import connections

_BEGAN = "(%(now)s - interval '30 days' * (1 - n::float8 / %(executions)s))"
# As new_id() would have made it then; another call, at another time, makes others.
_ID = (
    f"(lpad(to_hex((extract(epoch FROM {_BEGAN}) * 1000)::bigint), 12, '0') || '7' || "
    "substr(md5('crowd' || n), 1, 3) || 'a' || substr(md5('crowd' || n), 4, 15))::uuid"
)
# Of each thousand executions: 3 unsettled failures, 1 stuck, 20 failures that were retried, 1 in
# flight; the others are completed. They began at even distances over the last 30 days.
_EXECUTIONS = f"""
INSERT INTO django_saga_sagaexecution
    (id, saga, plan, initial_context, context, created_at, updated_at, finished_at, status, step,
     action, attempt, in_flight, effects, failed_step, error_type, error_message, stuck_reason,
     failure_group, settled_at, token, driver, lease_until)
SELECT {_ID},
       'shop.OrderSaga', '[["ReserveStock"], ["ChargeCard"], ["BookCourier"]]'::jsonb,
       context, context, began, began + interval '2 seconds',
       CASE WHEN status <> 'RUNNING' THEN began + interval '2 seconds' END,
       status,
       CASE status WHEN 'RUNNING' THEN 'ChargeCard' WHEN 'STUCK' THEN 'ReserveStock' ELSE '' END,
       CASE WHEN status IN ('FAILED', 'STUCK') THEN 'compensate' ELSE 'act' END,
       1, status = 'RUNNING',
       CASE status WHEN 'STUCK' THEN '[["ReserveStock", "DONE", "FAILED"]]'
                   WHEN 'FAILED' THEN '[["ReserveStock", "DONE", "DONE"]]'
                   ELSE '[["ReserveStock", "DONE", null]]' END::jsonb,
       CASE WHEN status IN ('FAILED', 'STUCK') THEN 'ChargeCard' ELSE '' END,
       CASE WHEN status IN ('FAILED', 'STUCK') THEN 'CardDeclined' ELSE '' END,
       CASE WHEN status IN ('FAILED', 'STUCK') THEN 'card ' || n || ' was declined' ELSE '' END,
       CASE status WHEN 'STUCK' THEN 'The compensation of ReserveStock failed.' ELSE '' END,
       CASE WHEN status IN ('FAILED', 'STUCK') THEN md5('group' || n %% %(groups)s) ELSE '' END,
       CASE WHEN n %% 1000 BETWEEN 10 AND 29 THEN began + interval '1 hour' END,
       3, 'host:' || n %% 9,
       CASE status WHEN 'RUNNING' THEN statement_timestamp() + interval '1 minute' END
FROM (
    SELECT n,
           '{{"order_id": ' || n || ', "items": ["tea", "milk"], "payment_id": null}}' AS context,
           {_BEGAN} AS began,
           CASE WHEN n %% 1000 < 3 THEN 'FAILED' WHEN n %% 1000 = 3 THEN 'STUCK'
                WHEN n %% 1000 BETWEEN 10 AND 29 THEN 'FAILED'
                WHEN n %% 1000 = 4 THEN 'RUNNING' ELSE 'COMPLETED' END AS status
    FROM generate_series(%(first)s::int, %(last)s::int) AS n
) AS made
ON CONFLICT (id) DO NOTHING
"""

_RECORDS = f"""
INSERT INTO django_saga_sagasteprecord
    (execution_id, step, action, attempt, outcome, duration, token, driver, created_at)
SELECT {_ID},
       (ARRAY['ReserveStock', 'ChargeCard', 'BookCourier'])[1 + r %% 3], 'act', 1 + r / 3,
       CASE WHEN n %% 40 = 0 AND r = 1 THEN 'FAILED' ELSE 'DONE' END,
       0.01 * (1 + (n + r) %% 50), 3, 'host:' || n %% 9,
       {_BEGAN}
FROM generate_series(%(first)s::int, %(last)s::int) AS n,
     generate_series(0, %(records)s::int - 1) AS r
"""

_GROUPS = """
INSERT INTO django_saga_sagafailuregroup
    (id, saga, step, action, outcome, error_type, frame, message, first_seen)
SELECT md5('group' || n), 'shop.OrderSaga', 'ChargeCard', 'act', 'FAILED', 'CardDeclined',
       'shop.services.charge', 'card ' || n || ' was declined', statement_timestamp()
FROM generate_series(0, %(groups)s::int - 1) AS n
ON CONFLICT (id) DO NOTHING
"""

BATCH = 100_000


def gather(executions: int, *, records: int = 10, groups: int = 20, alias: str = "default") -> None:
    """Add so many executions with so many records each, of so many failure groups; analyze."""
    with connections[alias].cursor() as cursor:
        cursor.execute(_GROUPS, {"groups": groups})
        cursor.execute("SELECT statement_timestamp()")
        ((now,),) = cursor.fetchall()
        for first in range(0, executions, BATCH):
            last = min(first + BATCH, executions) - 1
            facts = {"first": first, "last": last, "now": now}
            facts |= {"executions": executions, "groups": groups}
            cursor.execute(_EXECUTIONS, facts)
            cursor.execute(_RECORDS, facts | {"records": records})
        for table in ("sagaexecution", "sagasteprecord", "sagafailuregroup"):
            cursor.execute(f"ANALYZE django_saga_{table}")
