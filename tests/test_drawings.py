"""The drawings of the admin: well-formed, harmless, told in words, and within their frame."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from django.utils.safestring import SafeString, mark_safe
from hypothesis import given, settings
from hypothesis import strategies as st

from django_saga.admin.drawings import Attempt, Mark, PlanStep, lanes_svg, plan_svg, sparkline
from django_saga.admin.drawings.lanes import NARROW, WIDE
from django_saga.admin.drawings.svg import legible, measure, shorten
from django_saga.admin.drawings.timeline import FOLD, FOLDS, TICKS, lay_out

NOW = datetime(2026, 11, 26, 3, 0)
YEAR = 366 * 86400.0
HOSTILE = [
    "<script>alert(1)</script>",
    "\"' onload='x' style=\"color:red\"",
    "]]><!-- &amp; &#x0; -->",
    "a\u202eb\u2066c\u200fd",
    "a\x00b\x1b[31m\x7f",
    "\ud800 alone \udfff",
    "\ufffe\uffff",
    "W" * 200,
    "日本" * 100,
    "one\r\ntwo\ttabs",
    "",
    mark_safe("<b>said to be safe</b>"),
    "%(step)s {0} {{ 7|add:7 }}",
]


def one_plan(name: str) -> SafeString:
    return plan_svg([PlanStep(name, Mark.DONE), PlanStep(name, Mark.FAILED, f"{name}!", name)])


def one_history(name: str) -> SafeString:
    return lanes_svg([an_attempt(step=name), an_attempt(step=name, ended=YEAR, number=2)], NOW)


def one_count(name: str) -> SafeString:
    return sparkline([1, 0, 3], name)


DRAWINGS = [one_plan, one_history, one_count]


def an_attempt(
    step: str = "Pay",
    action: str = "act",
    number: int = 1,
    mark: Mark = Mark.DONE,
    ended: float | None = 0.0,
    seconds: float | None = 1.0,
) -> Attempt:
    at = None if ended is None else NOW + timedelta(seconds=ended)
    return Attempt(step, action, number, mark, at, seconds)


def parsed(drawing: SafeString) -> Element:
    """The drawing as a strict reader of XML sees it, after it was sent over the wire."""
    assert isinstance(drawing, SafeString)
    return ElementTree.fromstring(drawing.encode())


def words(drawing: SafeString) -> str:
    return parsed(drawing).attrib["aria-label"]


def written(root: Element) -> list[str]:
    return [text.text or "" for text in root.iter("text")]


def marked(root: Element, css: str) -> list[Element]:
    return [e for e in root.iter() if css in e.attrib.get("class", "").split()]


# Harmless


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_hostile_name_stays_text(draw: Callable[[str], SafeString], name: str) -> None:
    """The elements and attributes are those of a plain name, and all that it says is shown."""
    hostile, plain = parsed(draw(name)), parsed(draw("Plain"))
    skeleton = [(e.tag, sorted(e.attrib)) for e in plain.iter()]
    assert [(e.tag, sorted(e.attrib)) for e in hostile.iter()] == skeleton
    if name:
        assert legible(name) in hostile.attrib["aria-label"]


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=())))
def test_no_name_breaks_a_drawing(name: str) -> None:
    for draw in DRAWINGS:
        assert parsed(draw(name)).tag == "svg"


@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_drawing_has_no_style_and_no_script(draw: Callable[[str], SafeString]) -> None:
    allowed = {
        *("class", "viewBox", "role", "aria-label", "text-anchor", "transform"),
        *("x", "y", "width", "height", "rx", "d"),
    }
    for part in parsed(draw("Pay")).iter():
        assert part.tag in {"svg", "title", "g", "rect", "path", "text"}
        assert set(part.attrib) <= allowed


@pytest.mark.parametrize("draw", DRAWINGS)
def test_a_screen_reader_meets_one_picture_with_words(draw: Callable[[str], SafeString]) -> None:
    root = parsed(draw("Pay"))
    assert root.attrib["role"] == "img"
    assert "Pay" in root.attrib["aria-label"]
    assert root[0].tag == "title"
    assert root[0].text


def test_what_would_turn_the_text_or_cannot_be_written_shows_as_a_sign() -> None:
    assert legible("a\u202eb\x00c\ud800d") == "a�b�c�d"
    assert legible(" one\r\ntwo\t ") == "one two"
    assert legible("\n") == "(no name)"
    assert legible("שלום Straße 日本 👩\u200d🚒") == "שלום Straße 日本 👩\u200d🚒"


@given(st.text(min_size=1), st.floats(30, 500))
def test_a_shortened_name_fits_and_keeps_its_ends(name: str, width: float) -> None:
    short = shorten(name, width, 13)
    assert measure(short, 13) <= width + 0.001 or short == "…"
    if short != name:
        start, end = short.split("…")[0], short.rsplit("…", 1)[1]
        assert name.startswith(start)
        assert name.endswith(end)


# Told in words


@pytest.mark.parametrize("mark", Mark)
def test_each_state_has_a_word_a_sign_and_a_class(mark: Mark) -> None:
    root = parsed(plan_svg([PlanStep("Pay", mark)]))
    box = marked(root, f"saga-mark-{mark}")
    assert len(box) == 1
    assert mark.word in written(box[0])
    assert marked(box[0], "saga-sign")
    assert f"Pay: {mark.word}" in root.attrib["aria-label"]


def test_no_two_states_share_a_word() -> None:
    assert len({mark.word for mark in Mark}) == len(Mark)


def test_the_plan_says_what_became_of_each_step() -> None:
    plan = [
        PlanStep("Reserve", Mark.STANDS, fate="stands: its compensation failed"),
        PlanStep("Card", Mark.FAILED),
        PlanStep("Wallet", Mark.UNDONE, fallback_of="Card"),
    ]
    assert words(plan_svg(plan)) == (
        "Plan of 2 steps: 1. Reserve: stands: its compensation failed; 2. Card: failed; "
        "2. Wallet, fallback of Card: undone."
    )
    assert words(plan_svg([])) == "Plan of 0 steps"


def test_a_long_name_is_whole_in_its_title() -> None:
    name = "Reserve" * 20
    box = marked(parsed(plan_svg([PlanStep(name, Mark.DONE)])), "saga-box")[0]
    assert name in (box[0].text or "")
    assert not [text for text in written(box) if name in text]


def test_the_lanes_say_each_attempt_and_each_folded_wait() -> None:
    drawn = lanes_svg(
        [
            an_attempt("Pack", ended=0),
            an_attempt("Pay", mark=Mark.FAILED, ended=2),
            an_attempt("Pay", number=2, mark=Mark.UNKNOWN, ended=86400),
            an_attempt("Pack", "compensate", mark=Mark.INTERRUPTED, ended=86402, seconds=None),
        ],
        NOW,
    )
    assert words(drawn) == (
        "4 attempts in 1 d 0 h. Pack: → act 1 done, ← compensate 1 interrupted. "
        "Pay: → act 1 failed, → act 2 unknown. "
        "The wait of 23 h 59 m before → act 2 of Pay is not drawn to scale."
    )


def test_the_counts_are_told_with_their_sum_and_their_maximum() -> None:
    assert words(sparkline([0] * 22 + [3, 1], "failed")) == (
        "failed, the latest 24 hours: 4 in all, at most 3 in an hour."
    )


def test_nothing_counted_is_a_flat_line() -> None:
    root = parsed(sparkline([0] * 24, "failed"))
    assert not list(root.iter("rect"))
    assert len(list(root.iter("path"))) == 1
    assert words(sparkline([], "failed")).startswith("failed, the latest 0 hours: 0 in all")


def test_one_among_many_can_be_seen() -> None:
    bars = list(parsed(sparkline([1, 10_000], "failed")).iter("rect"))
    assert [float(bar.attrib["height"]) >= 2 for bar in bars] == [True, True]


# Within the frame


def boxes(root: Element) -> Iterator[tuple[float, float, float, float]]:
    """Left, top, right and bottom of all that is drawn; of a text what it may need at most."""
    for part in root.iter():
        a = part.attrib
        if part.tag == "rect":
            x, y = float(a["x"]), float(a["y"])
            yield x, y, x + float(a["width"]), y + float(a["height"])
        elif part.tag == "path":
            yield outline(a["d"], a.get("transform", ""))
        elif part.tag == "text":
            x, y, wide = float(a["x"]), float(a["y"]), measure(part.text or "", 10)
            x -= wide / 2 if a["text-anchor"] == "middle" else 0
            yield x, y - 9, x + wide, y + 2


def outline(d: str, transform: str) -> tuple[float, float, float, float]:
    """The box around the ends of a path's lines."""
    x = y = 0.0
    points = []
    for command, rest in re.findall(r"([a-zA-Z])([^a-zA-Z]*)", d):
        n = [float(v) for v in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", rest)]
        if command in "aA" or command in "cC":
            n = n[-2:]
        for i in range(0, len(n), 1 if command in "hHvV" else 2):
            if command in "hH":
                x = n[i] + (x if command == "h" else 0)
            elif command in "vV":
                y = n[i] + (y if command == "v" else 0)
            else:
                x = n[i] + (x if command.islower() else 0)
                y = n[i + 1] + (y if command.islower() else 0)
            points.append((x, y))
    if transform:
        dx, dy, scale = (float(v) for v in re.findall(r"-?[\d.]+", transform))
        points = [(dx + px * scale, dy + py * scale) for px, py in points]
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def assert_within_the_frame(root: Element) -> None:
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    assert (left, top) == (0, 0)
    for x, y, right, bottom in boxes(root):
        assert x >= -0.01
        assert y >= -0.01
        assert right <= width + 0.01
        assert bottom <= height + 0.01


names = st.text(st.characters(codec="utf-8"), max_size=60)
steps = st.builds(PlanStep, names, st.sampled_from(Mark), st.sampled_from(["", "", "Other"]))


@settings(deadline=None, max_examples=40)
@given(st.lists(steps, min_size=1, max_size=30).filter(lambda plan: most_fallbacks(plan) <= 1))
def test_a_plan_stays_within_its_frame_and_no_box_meets_another(plan: list[PlanStep]) -> None:
    root = parsed(plan_svg(plan))
    assert_within_the_frame(root)
    drawn = [next(iter(boxes(box))) for box in marked(root, "saga-box")]
    assert len(drawn) == len(plan)
    for i, one in enumerate(drawn):
        assert not any(overlap(one, other) for other in drawn[:i])


def most_fallbacks(plan: list[PlanStep]) -> int:
    """The most fallbacks in a row; the machine's plans have one."""
    runs = "".join("f" if step.fallback_of else "s" for step in plan[1:]).split("s")
    return max(map(len, runs), default=0)


def overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


seconds = st.one_of(
    st.just(0.0), st.floats(0, 1e-3), st.floats(0, 100), st.floats(0, YEAR), st.just(YEAR)
)


@st.composite
def histories(draw: st.DrawFn) -> list[Attempt]:
    """Up to 50 attempts with odd times: none between them, a year, or backwards."""
    at, attempts = 0.0, []
    for number in range(draw(st.integers(0, 50))):
        at += draw(st.one_of(seconds, seconds.map(lambda s: -s)))
        attempts.append(
            an_attempt(
                draw(st.sampled_from(["Pack", "Pay", "Leave", "W" * 100])),
                draw(st.sampled_from(["act", "compensate"])),
                number + 1,
                draw(st.sampled_from(Mark)),
                ended=at,
                seconds=draw(st.one_of(st.none(), seconds)),
            )
        )
    if draw(st.booleans()):
        attempts.append(an_attempt(ended=None, seconds=draw(st.one_of(st.none(), seconds))))
    return attempts


@settings(deadline=None, max_examples=40)
@given(histories(), st.sampled_from([WIDE, NARROW]), seconds)
def test_lanes_stay_within_their_frame_and_no_arrow_meets_another(
    history: list[Attempt], width: int, since: float
) -> None:
    root = parsed(lanes_svg(history, NOW + timedelta(seconds=since), width=width))
    assert_within_the_frame(root)
    arrows = [next(iter(boxes(bar))) for bar in marked(root, "saga-bar")]
    assert len(arrows) == len(history)
    assert all(arrow[2] - arrow[0] >= 1.5 for arrow in arrows)
    for before, after in pairwise(arrows):
        assert before[2] <= after[0] + 0.02  # in time, so in no lane do two meet


@settings(deadline=None, max_examples=40)
@given(histories(), st.sampled_from([WIDE, NARROW]))
def test_an_arrow_lies_in_the_lane_of_its_step(history: list[Attempt], width: int) -> None:
    root = parsed(lanes_svg(history, NOW, width=width))
    rules = [outline(rule.attrib["d"], "")[1] for rule in marked(root, "saga-rule")]
    lanes = list(dict.fromkeys(attempt.step for attempt in history))
    for attempt, bar in zip(history, marked(root, "saga-bar"), strict=True):
        lane = lanes.index(attempt.step)
        above = rules[lane - 1] if lane else 0
        for _, top, _, bottom in boxes(bar):
            assert above <= top
            assert bottom <= rules[lane]


# To scale


def test_attempts_and_waits_are_drawn_to_scale() -> None:
    line = lay_out([(0, 10), (15, 35), (35, 40)], 400)
    assert [piece.width for piece in line.pieces] == pytest.approx([100, 50, 200, 50])
    assert [piece.x for piece in line.pieces] == pytest.approx([0, 100, 150, 350])
    assert [(tick.text, tick.x) for tick in line.ticks] == [
        (text, pytest.approx(x))
        for text, x in [("0", 0), ("10 s", 100), ("20 s", 200), ("30 s", 300), ("40 s", 400)]
    ]


def test_an_attempt_that_seems_to_begin_before_the_last_ended_is_drawn_after_it() -> None:
    line = lay_out([(0, 10), (5, 30), (20, 25)], 412)
    assert [round(piece.width) for piece in line.pieces] == [133, 267, 12]
    assert line.seconds == 30


def test_an_arrow_too_short_for_its_time_can_be_seen() -> None:
    line = lay_out([(0, 0.001), (30, 60), (60, 60)], 600)
    assert [round(piece.width) for piece in line.pieces] == [12, 288, 288, 12]


def test_a_wait_beside_which_nothing_can_be_seen_is_folded() -> None:
    line = lay_out([(0, 1), (YEAR, YEAR + 1)], 400)
    assert [piece.folded for piece in line.pieces] == [False, True, False]
    assert [piece.width for piece in line.pieces] == pytest.approx([172, FOLD, 172])
    assert [tick.text for tick in line.ticks] == ["0", "1 s", "366 d 0 h", "+1 s"]


def test_a_wait_between_long_attempts_is_not_folded() -> None:
    assert not lay_out([(0, 18), (82, 100)], 400).folds
    assert not lay_out([(0, 1), (2, 3), (4, 5)], 400).folds


@pytest.mark.parametrize(
    ("total", "texts"),
    [
        (0.004, ["0", "0.001 s", "0.002 s", "0.003 s", "0.004 s"]),
        (7, ["0", "2 s", "4 s", "6 s"]),
        (100, ["0", "30 s", "1 m", "90 s"]),
        (3600, ["0", "15 m", "30 m", "45 m", "1 h"]),
        (2 * 86400, ["0", "12 h", "1 d", "36 h", "2 d"]),
        (YEAR, ["0", "100 d", "200 d", "300 d"]),
    ],
)
def test_the_axis_has_round_times(total: float, texts: list[str]) -> None:
    assert [tick.text for tick in lay_out([(0, total)], 400).ticks] == texts


@given(st.floats(0.005, 100 * YEAR))
def test_the_axis_has_three_to_five_times(total: float) -> None:
    assert 3 <= len(lay_out([(0, total)], 400).ticks) <= TICKS


@given(st.lists(st.tuples(st.floats(0, YEAR), st.floats(0, YEAR)), min_size=1, max_size=50))
def test_the_axis_is_full_and_never_folded_to_nothing(times: list[tuple[float, float]]) -> None:
    line = lay_out([(end - length, end) for end, length in times], 330)
    assert len(line.folds) <= FOLDS
    assert sum(piece.width for piece in line.pieces) <= 330.01
    assert 1 <= len(line.ticks) <= TICKS


# What the arrows tell


def test_acts_point_right_and_compensations_left() -> None:
    drawn = lanes_svg([an_attempt(seconds=9), an_attempt(action="compensate", ended=20)], NOW)
    act, compensation = (shape.attrib["d"] for shape in marked(parsed(drawn), "saga-shape"))
    assert re.fullmatch(r"M[\d. ]+h[\d.]+l[\d.]+ 8l-[\d.]+ 8h-[\d.]+z", act)
    assert re.fullmatch(r"M[\d. ]+h-[\d.]+l-[\d.]+ 8l[\d.]+ 8h[\d.]+z", compensation)


@pytest.mark.parametrize(
    "attempt",
    [an_attempt(ended=None, seconds=5, mark=Mark.RUNNING), an_attempt(seconds=None)],
)
def test_what_has_no_known_begin_or_no_end_is_open(attempt: Attempt) -> None:
    drawn = lanes_svg([an_attempt(ended=-60), attempt], NOW)
    assert ["saga-open" in bar.attrib["class"] for bar in marked(parsed(drawn), "saga-bar")] == [
        False,
        True,
    ]


def test_attempts_are_numbered_where_there_is_room() -> None:
    spread = [an_attempt(number=n, ended=n * 2.0) for n in range(1, 6)]
    crowd = [an_attempt(number=n, ended=n / 10, seconds=0.1) for n in range(1, 51)]
    assert numbers(lanes_svg(spread, NOW)) == ["1", "2", "3", "4", "5"]
    some = numbers(lanes_svg(crowd, NOW, width=NARROW))
    assert some[0] == "1"
    assert 10 < len(some) < 50


def numbers(drawing: SafeString) -> list[str]:
    return [text.text or "" for text in marked(parsed(drawing), "saga-number")]
