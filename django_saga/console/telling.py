"""Documents as lines for people. What comes from outside can neither end a line nor steer one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from django_saga.console.arguments import dashed
from django_saga.documents import Document

SHORT = 200  # characters of a message in a list


def plain(text: Any) -> str:
    """One line, with whatever is not printable as its escape."""
    return "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in str(text if text else "")
    )


def tell(what: str, document: Document) -> Iterator[str]:
    """The lines for the answer to a subcommand."""
    lines = {
        "list": _list,
        "show": _show,
        "groups": _groups,
        "pauses": _pauses,
        "audit": _audit,
        "doctor": _doctor,
        "pause": _pause,
        "resume": _pause,
    }
    yield from lines.get(what, _verb)(document)


def _list(document: Document) -> Iterator[str]:
    for row in document["executions"]:
        step = row["step"] or row["failed_step"]
        error = f"{row['error_type']}: {row['error_message']}" if row["error_type"] else ""
        why = row["stuck_reason"] or error
        yield _line(_moment(row["created_at"]), row["status"], row["id"], row["saga"], step, why)
    yield from _more(document, "executions")


def _more(document: Document, what: str) -> Iterator[str]:
    if not document[what]:
        yield "Nothing."
    elif document.get("more"):
        yield "There are more: see --limit."


def _line(*cells: Any) -> str:
    return "  ".join(plain(cell)[:SHORT] for cell in cells if cell)


def _moment(at: str | None) -> str:
    return at[:19].replace("T", " ") if at else ""


def _show(document: Document) -> Iterator[str]:
    row = document["execution"]
    yield _line(row["saga"], row["id"], row["status"])
    yield plain(document["happened"])
    yield f"Next: {plain(document['next'])}"
    for error in document["errors"]:
        where = f"{error['action']} of {error['step']}: " if error["step"] else ""
        what = f"{error['error_type']}: {error['error_message']}"
        # An attempt that was lost with its process raised nothing.
        yield f"Error: {plain(where)}{plain(what if error['error_type'] else 'interrupted')}"
    if row["failure_group"]:
        yield f"Group: {plain(row['failure_group'])}"
    yield f"Effects that stand, or may stand: {plain(', '.join(document['standing'])) or 'none'}"
    yield from _section("Steps", [_step(step) for step in document["steps"]])
    yield from _section("History (UTC)", [_record(record) for record in document["history"]])
    yield from _section("Retries", [_line(r["id"], r["status"]) for r in document["retries"]])
    yield from _section("What operators did", [_entry(entry) for entry in document["audit"]])
    if row["blanked_at"]:
        yield f"Contexts, their changes and what errors said: removed at {row['blanked_at']}"
    elif "context" in document:
        yield from _section("Context", [plain(json.dumps(document["context"]))])
    yield from _section("What can be done", [dashed(verb) for verb in document["possible"]])


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield f"{title}:"
        yield from (f"  {line}" for line in lines)


def _step(step: Document) -> str:
    tries = f"{step['acts']} act" + (
        f", {step['compensations']} compensate" * bool(step["compensations"])
    )
    return _line(f"{step['step']}: {step['fate']}", f"({tries})" if step["acts"] else "")


def _record(record: Document) -> str:
    what = f"{record['action']} of {record['step']}, attempt {record['attempt']}"
    error = f"{record['error_type']}: {record['error_message']}" if record["error_type"] else ""
    return _line(_moment(record["created_at"]), what, record["outcome"], error)


def _groups(document: Document) -> Iterator[str]:
    for group in document["groups"]:
        count = f"{group['count']}+" if group["count_is_more"] else group["count"]
        what = f"{group['action']} of" if group["step"] else "between two steps of"
        where = f"{what} {group['saga']} {group['step']}".rstrip()
        error = f"{group['error_type']}: {group['message']}"
        known = "" if group["outcome"] == "FAILED" else f"outcome {group['outcome']}"
        yield _line(count, group["id"], where, error, group["frame"], known)
        yield f"    {plain(group['next'])}"
    yield from _more(document, "groups")


def _pauses(document: Document) -> Iterator[str]:
    for pause in document["pauses"]:
        step = pause["step"] or "(every step)"
        who = f"since {_moment(pause['created_at'])} UTC by {pause['user_name']}"
        yield _line(pause["saga"], step, who, pause["reason"])
    yield from _more(document, "pauses")


def _audit(document: Document) -> Iterator[str]:
    yield from map(_entry, document["entries"])
    yield from _more(document, "entries")


def _entry(entry: Document) -> str:
    who = f"{entry['user_name']} ({entry['source']})" if entry["user_name"] else entry["source"]
    on = entry["execution_id"] or f"{entry['saga']} {entry['step']}"
    texts = (entry["reason"] and f"“{entry['reason']}”", entry["detail"])
    return _line(_moment(entry["at"]), who, entry["verb"], entry["result"], on, *texts)


def _doctor(document: Document) -> Iterator[str]:
    for finding in document["findings"]:
        yield f"{finding['level'].upper():8}{plain(finding['what'])}"
        if finding["todo"]:
            yield f"{'':8}→ {plain(finding['todo'])}"


def result_line(result: Document) -> str:
    """What came of one execution."""
    other = result.get("result_id", result["id"]) != result["id"]
    anew = f"as {result['result_id']}" if other else ""
    status = result.get("would_be") or result.get("status")
    now = f"{anew} now {status}".strip() if result["result"] == "done" else ""
    return (
        f"{plain(result['id'])}  {_line(result['result'], now)}  {plain(result['says'])}".rstrip()
    )


def _verb(document: Document) -> Iterator[str]:
    """What is left to say when each result has been told."""
    counts = [f"{document[name]} {name}" for name in _RESULTS if document[name]]
    yield f"{dashed(document['verb'])}: {', '.join(counts) or 'there was nothing to do'}."
    for left in document.get("left_alone", []):
        yield f"  left alone: {left['number']} {plain(left['says'])}"
    if document["dry_run"]:
        yield "Nothing was touched."


_RESULTS = ("done", "possible", "refused", "failed")


def _pause(document: Document) -> Iterator[str]:
    what = plain(f"{document['saga']} {document['step']}".strip())
    yield f"{document['verb']} of {what}: {document['result']}. {plain(document['says'])}".rstrip()
    if document["dry_run"]:
        yield "Nothing was touched."
