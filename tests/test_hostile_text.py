"""Text from outside on every screen: it stays text, makes no line of a log, and no element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import accumulate
from uuid import UUID

import pytest
from django.contrib.auth.models import User
from django.test import Client

from django_saga.models import (
    SagaAuditEntry,
    SagaBatch,
    SagaBatchItem,
    SagaExecution,
    SagaFailureGroup,
    SagaHeartbeat,
    SagaPause,
    SagaStepRecord,
)
from tests.operated import WORLD, failed_trip, run_trip
from tests.screens import addresses, at, seed

pytestmark = pytest.mark.django_db(transaction=True)

MARKUP = [
    "<script>alert(1)</script>",
    "</script><script src=//evil.example></script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '"><script>alert(1)</script>',
    "'><b onmouseover=alert(1)>x</b>",
    "</textarea><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</pre></details><h1>owned</h1>",
    "</style><style>*{display:none}</style>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<base href=//evil.example/>",
    "<form action=//evil.example><input name=q>",
    "<!-- comment --><![CDATA[x]]>",
    "-->]]></svg><script>alert(1)</script>",
    "<a href=javascript:alert(1)>x</a>",
    "<math><mtext></mtext><mglyph>",
    "<%2fscript><%3Cscript%3E",
    "&lt;b&gt;&#60;i&#62;&amp;lt;",
    "&#x3C;script&#x3E;",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<details open ontoggle=alert(1)>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<template><slot></template>",
]
ATTRIBUTES = [
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "` onclick=`alert(1)",
    '" style="position:fixed;inset:0',
    "x onload=alert(1) y=",
    '\\" onclick=\\"alert(1)',
]
LANGUAGES = [
    "{{ settings.SECRET_KEY }}",
    "{% load os %}{% include '/etc/passwd' %}",
    "${7*7}#{7*7}<%= 7*7 %>",
    "%(user)s %s %d %",
    "{0.__class__} {}",
    "'; DROP TABLE django_saga_sagaexecution; --",
    "$(touch /tmp/x) `id` ; rm -rf ~",
    "graph TD; A-->B; click A javascript:alert(1)",
    "../../../../etc/passwd",
]
FORMULAS = ["=1+1", '=HYPERLINK("//evil.example")', "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)"]
CONTROLS = [
    "first\nERROR forged line",
    "first\r\nINFO forged\r\nSet-Cookie: a=b",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\\0 \\x00 %00 \\u0000",
    "\x01\x02\x08\x7f",
    "\x85\u2028\u2029next line",
    "\x0b\x0ctabs\tand",
]
ALPHABETS = [
    "\u202egnp.exe\u202c",
    "\u2066\u2067isolated\u2069",
    "zero\u200bwidth\u200d\ufeff",
    "\u0430dmin \u0440ay\u0440al",
    "Z\u0361\u0351\u0327\u0317a\u0334\u030al\u0321g\u0337o",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4",
    "\ufffd\ufffe\uffff\U0010ffff",
    "\uff1cscript\uff1e \u2039b\u203a",
    "l" * 4_000,
    "<b>" * 1_000,
]
FAMILIES = {
    "address": ["javascript:alert(1)"],  # by itself: as one it would count as its whole
    "data": ["data:text/html;base64,PHNjcmlwdD4="],
    "markup": MARKUP,
    "attributes": ATTRIBUTES,
    "languages": LANGUAGES,
    "formulas": FORMULAS,
    "controls": CONTROLS,
    "alphabets": ALPHABETS,
}
HOSTILE = [text for family in FAMILIES.values() for text in family]
HARMLESS = "harmless"
OURS = {("br",), ("wbr",)}  # how the pages break long words and lines
LOST = UUID(int=7)  # an execution of a saga that the code has lost
FEW = ("completed", "failed", "stuck", "lost", "driven")  # states whose screens are looked at


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    WORLD.reset()
    yield
    WORLD.reset()


def test_there_are_sixty_of_them() -> None:
    assert len(set(HOSTILE)) >= 60


class Structure(HTMLParser):
    """The elements of a page, each with the names of its attributes; and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *sorted(name for name, _ in attrs)))
        self.texts += [value or "" for _, value in attrs]
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements.append(("a comment",))

    def unknown_decl(self, data: str) -> None:
        self.elements.append(("a declaration",))


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_text_is_text_on_every_screen(family: str) -> None:
    """The pages have the elements and attributes that they have with harmless text, no more."""
    user = User.objects.create_superuser("root")
    client = Client()
    client.force_login(user)
    lose_one()
    screens = addresses(seed(user), FEW)
    screens["execution of no saga"] = at("sagaexecution", "change", LOST)
    plain: dict[str, set[tuple[str, ...]]] = {}
    plant(HARMLESS)
    for name, address in screens.items():
        plain[name] = set(Structure(read(client, address)).elements)
    wrong, shown = [], set[str]()
    for texts in some_at_once(FAMILIES[family]):
        plant("".join(texts))
        for name, address in screens.items():
            html = read(client, address)
            page = Structure(html)
            if more := set(page.elements) - plain[name] - OURS:
                wrong.append(f"{name}, {texts}: {sorted(more)}")
            if [link for link in page.links if re.match(r"\s*(javascript|data):", link)]:
                wrong.append(f"{name}, {texts}: a link")
            for text in texts:
                if any(text[:60].strip() in each for each in page.texts):
                    shown.add(text)
                if dangerous(text) and text in html:
                    wrong.append(f"{name}, {text[:40]!r}: as it is")
    assert not wrong, "\n".join(wrong)
    missing = {text for text in FAMILIES[family] if text.isprintable()} - shown
    assert not missing  # it is told, and not only left out


def some_at_once(texts: list[str]) -> Iterator[list[str]]:
    """As many as the name of a saga has room for."""
    while texts:
        sizes = accumulate(map(len, texts))
        many = sum(size <= 255 for size in sizes) or 1
        yield texts[:many]
        texts = texts[many:]


def dangerous(text: str) -> bool:
    return "<" in text or '"' in text


def read(client: Client, address: str) -> str:
    response = client.get(address)
    assert response.status_code == 200, (address, response.status_code)
    assert response["Content-Security-Policy"] == "default-src 'self'"
    assert "/sagaexecution/" not in address or "no-store" in response["Cache-Control"], address
    return response.content.decode()


def lose_one() -> None:
    records = failed_trip().pk
    SagaExecution.objects.filter(pk=records).update(settled_at=None)
    execution = SagaExecution.objects.get(pk=records)
    execution.pk = LOST
    execution.save(force_insert=True)
    SagaStepRecord.objects.filter(execution=records).update(execution=LOST)


def plant(text: str) -> None:
    """Put it wherever text can come from outside, in the rows as they are."""
    lost = SagaExecution.objects.filter(pk=LOST)
    saga = text[:255]
    step = text[:100]  # its name has room for so much, so each table gets another part
    further, last = text[78:178] or step, text[155:255] or step
    SagaExecution.objects.update(
        error_message=text,
        error_type=saga,
        driver=saga,
        context=json.dumps({"traveller": text, text: [text]}),
        initial_context=json.dumps({"traveller": text}),
    )
    SagaExecution.objects.filter(status="STUCK").update(stuck_reason=text)
    lost.update(
        saga=saga, plan=[[step], [f"{step[:99]}2"]], failed_step=step, effects=[[step, "act"]]
    )
    changes = json.dumps({"traveller": text, text: text})
    told = {"error_message": text, "error_type": saga, "traceback": text, "driver": saga}
    SagaStepRecord.objects.update(**told, changes=changes)
    SagaStepRecord.objects.filter(execution__in=lost).update(step=step)
    SagaFailureGroup.objects.update(
        message=text[:500], error_type=saga, frame=saga, note=text, saga=saga, step=further
    )
    why = text[:500]
    SagaBatch.objects.update(reason=text, title=why, why=why, user_name=saga, driver=saga)
    SagaBatchItem.objects.update(why=why)
    SagaPause.objects.update(reason=text, user_name=saga, saga=saga, step=last)
    SagaAuditEntry.objects.update(reason=text, detail=text, user_name=saga, saga=saga, step=last)
    SagaHeartbeat.objects.update(driver=saga)


def test_what_a_step_raises_makes_no_line_of_the_log_and_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also what no database holds: a NUL, half of a surrogate pair."""
    for text in (*HOSTILE, "nul\0byte", "half \ud800 a pair", "\udfff"):
        caplog.clear()
        execution = run_trip(act_Pay=text)
        assert execution.status == "FAILED"
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) >= 3
        for line in lines:
            assert line.isprintable(), repr(line)
            assert line.splitlines() == [line]


def test_reasons_and_notes_that_are_typed_are_kept_as_they_are_and_shown_as_text() -> None:
    user = User.objects.create_superuser("root")
    client = Client()
    client.force_login(user)
    for text in HOSTILE:
        if not text.isprintable() or len(text) > 2_000:
            continue
        failed = failed_trip()
        base = f"/admin/django_saga/sagaexecution/{failed.pk}"
        response = client.post(
            f"{base}/retry/", {"token": failed.token, "reason": text}, follow=True
        )
        assert response.status_code == 200
        entry = SagaAuditEntry.objects.filter(execution_id=failed.pk, verb="retry").get()
        assert entry.reason == text.strip() or "[masked]" in entry.reason
        page = Structure(client.get(f"{base}/change/").content.decode())
        assert any(text.strip()[:60] in each for each in page.texts), text
