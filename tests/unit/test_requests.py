"""Requests out of rows and events: against the rules, row by row, and on stories of real servers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_oracle import Oracle

from moetrace.trace.record import EventCode
from moetrace.trace.requests import EVENT_INPUTS, REQUEST_TABLE, ROW_INPUTS, RequestAssigner

Story = tuple[list[dict[str, int]], list[dict[str, int]]]


class Server:
    """Tells the story of a context: what it computes and does to its sequences."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []
        self.events: list[dict[str, int]] = []
        self.serial = 0
        self.batch = 0

    def row(self, sequence: int, position: int, output: bool = False, trial: bool = False) -> None:
        self.rows.append(
            dict(
                zip(
                    ROW_INPUTS,
                    (self.serial, 10 * self.serial, self.batch, position, sequence, int(output) + 64 * trial),
                    strict=True,
                )
            )
        )
        self.serial += 1

    def prompt(self, sequence: int, start: int, n: int) -> None:
        for i in range(n):
            self.row(sequence, start + i, output=i == n - 1)
        self.batch += 1

    def decode(self, sequence: int, start: int, n: int) -> None:
        for i in range(n):
            self.row(sequence, start + i, output=True)
            self.batch += 1

    def event(self, code: EventCode, sequence: int, p0: int = -1, p1: int = -1, arg: int = 0) -> None:
        self.events.append(dict(zip(EVENT_INPUTS, (self.serial, code, sequence, p0, p1, arg), strict=True)))

    def lose(self, n: int) -> None:
        self.serial += n

    @property
    def story(self) -> Story:
        return self.rows, self.events


def columns(items: list[dict[str, int]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    dtypes = {"serial": "<u8", "time_ns": "<i8", "batch": "<u4", "flags": "<u4"}
    return {name: np.array([item[name] for item in items], dtypes.get(name, "<i4")) for name in names}


def assign(story: Story, cuts: list[int] | None = None) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    """Run the assigner over a story cut into pieces; events go with the rows that follow them."""
    rows, events = story
    assigner = RequestAssigner()
    ids: list[int] = []
    phases: list[int] = []
    tables = []
    start, fed = 0, 0
    for stop in [*sorted(set(cuts or [])), len(rows)]:
        piece = rows[start:stop]
        last = piece[-1]["serial"] if piece else -1
        end = (
            len(events)
            if stop == len(rows)
            else next((i for i, e in enumerate(events) if e["serial"] > last), len(events))
        )
        end = max(end, fed)
        a, b = assigner.feed(columns(piece, ROW_INPUTS), columns(events[fed:end], EVENT_INPUTS))
        ids += a.tolist()
        phases += b.tolist()
        tables.append(assigner.take_ended())
        start, fed = stop, end
    tables.append(assigner.finish())
    table = {name: np.concatenate([t[name] for t in tables]) for name in REQUEST_TABLE}
    requests = [{name: int(table[name][i]) for name in table} for i in range(len(table["request"]))]
    return ids, phases, sorted(requests, key=lambda r: r["request"])


def told(story: Story) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    oracle = Oracle()
    ids, phases = oracle.run(*story)
    return ids, phases, [{name: r[name] for name in REQUEST_TABLE} for r in oracle.requests]


def test_two_prompts_on_a_server_with_launches() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.SEQ_RM, 0, 0)
    s.prompt(0, 0, 5)
    s.decode(0, 5, 3)
    s.event(EventCode.LAUNCH, 0)  # the slot ends
    s.event(EventCode.LAUNCH, 0)  # and starts again
    s.event(EventCode.SEQ_RM, 0, 4)  # keeps four tokens of the old prompt
    s.prompt(0, 4, 2)
    s.decode(0, 6, 2)
    ids, phases, requests = assign(s.story)
    assert ids == [0] * 8 + [1] * 4
    assert phases == [0] * 5 + [1] * 3 + [0] * 2 + [1] * 2
    assert [r["n_cached"] for r in requests] == [0, 4]
    assert [r["n_rejected"] for r in requests] == [0, 0]
    assert [(r["n_prefill"], r["n_decode"]) for r in requests] == [(5, 3), (2, 2)]
    assert (requests[1]["first_serial"], requests[1]["last_serial"]) == (8, 11)


def test_two_prompts_without_launches() -> None:
    s = Server()
    s.prompt(0, 0, 5)
    s.decode(0, 5, 3)
    s.event(EventCode.SEQ_RM, 0, 4)
    s.prompt(0, 4, 2)
    ids, _, requests = assign(s.story)
    assert ids == [0] * 8 + [1] * 2
    assert requests[1]["n_cached"] == 4


def test_next_turn_that_only_appends_is_a_new_request() -> None:
    s = Server()
    s.prompt(0, 0, 3)
    s.decode(0, 3, 2)
    s.event(EventCode.SEQ_RM, 0, 5)
    s.prompt(0, 5, 3)
    assert assign(s.story)[0] == [0] * 5 + [1] * 3


def test_rejected_speculation_is_no_new_request() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    for p in (4, 5, 6):
        s.row(0, p, output=True)
    s.batch += 1
    s.event(EventCode.SEQ_RM, 0, 5)  # 5 and 6 were not accepted
    for p in (5, 6, 7):
        s.row(0, p, output=True)
    ids, _, requests = assign(s.story)
    assert set(ids) == {0}
    assert requests[0]["n_rejected"] == 2


def speculate(s: Server, start: int, n_drafts: int, n_accepted: int) -> int:
    """Decode a token and its drafts as llama-server does, and keep those accepted; gives the next position."""
    for p in range(start, start + 1 + n_drafts):
        s.row(0, p, output=True)
    s.batch += 1
    s.event(EventCode.SEQ_RM, 0, start + 1 + n_accepted)
    return start + 1 + n_accepted


def test_speculation_without_launches() -> None:
    """A server before llama_set_sampler that drafts: rejected drafts begin no request, a new task does."""
    s = Server()
    s.event(EventCode.SEQ_RM, 0, 0)
    s.prompt(0, 0, 4)
    position = 4
    for n_accepted in (0, 3, 1):
        s.decode(0, position, 1)
        position = speculate(s, position + 1, 3, n_accepted)
    first = len(s.rows)
    assert position == 14
    s.event(EventCode.SEQ_RM, 0, 13)  # the new task's prompt ends where the second to last token was
    s.prompt(0, 13, 1)
    s.decode(0, 14, 2)
    ids, phases, requests = assign(s.story)
    assert ids == [0] * first + [1] * 3
    assert phases == [0] * 4 + [1] * (first - 4) + [0, 1, 1]
    # what is removed right before the next task may be rejected, or only not shared with it: not counted
    assert [r["n_rejected"] for r in requests] == [3, 0]
    assert [r["n_cached"] for r in requests] == [0, 13]


def test_scored_prompts_that_begin_alike_are_no_speculation() -> None:
    """Prompts of which every row is an output, one after the other, each keeping what it shares."""
    s = Server()
    for start in (0, 3, 5):
        s.event(EventCode.SEQ_RM, -1, start)
        for p in range(start, 8):
            s.row(0, p, output=True)
        s.batch += 1
    assert assign(s.story)[0] == [0] * 8 + [1] * 5 + [2] * 3


def test_rejection_before_the_slot_ends_counts() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.decode(0, 4, 3)
    s.event(EventCode.SEQ_RM, 0, 6)
    s.event(EventCode.LAUNCH, 0)
    assert assign(s.story)[2][0]["n_rejected"] == 1


def test_clearing_a_slot_rejects_nothing() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.event(EventCode.SEQ_RM, 0, -1, -1)
    s.event(EventCode.LAUNCH, 0)
    assert assign(s.story)[2][0]["n_rejected"] == 0


@pytest.mark.parametrize("launches", [True, False])
def test_context_shift_goes_on(launches: bool) -> None:
    s = Server()
    if launches:
        s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 8)
    s.decode(0, 8, 2)
    s.event(EventCode.SEQ_RM, 0, 2, 6)
    s.event(EventCode.SEQ_ADD, 0, 6, 10, -4)
    s.decode(0, 6, 4)
    ids, _, requests = assign(s.story)
    assert set(ids) == {0}
    assert (requests[0]["n_shifts"], requests[0]["n_rejected"]) == (1, 0)


def test_slots_are_apart_and_numbers_follow_first_rows() -> None:
    s = Server()
    for slot in (3, 1, 2):
        s.event(EventCode.LAUNCH, slot)
    for slot in (3, 1, 2):
        s.prompt(slot, 0, 2)
    for i in range(3):
        for slot in (3, 1, 2):
            s.row(slot, 2 + i, output=True)
        s.batch += 1
    ids, _, requests = assign(s.story)
    assert ids[:6] == [0, 0, 1, 1, 2, 2]
    assert [r["sequence"] for r in requests] == [3, 1, 2]


def test_lost_rows_belong_to_whom_they_are_missing() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.LAUNCH, 1)
    s.prompt(0, 0, 4)
    s.prompt(1, 0, 4)
    s.lose(3)  # slot 0 computed positions 4 to 6
    s.row(1, 4, output=True)
    s.row(0, 7, output=True)
    assert [r["n_lost"] for r in assign(s.story)[2]] == [3, 0]


def test_first_row_lost_leaves_the_cached_count_unknown() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.lose(2)
    s.prompt(0, 2, 4)
    assert assign(s.story)[2][0]["n_cached"] == -1


def test_rows_without_sequence() -> None:
    s = Server()
    s.row(-1, 0, output=True)
    assert assign(s.story) == ([-1], [2], [])


def test_what_llama_cpp_computes_for_itself_is_no_request() -> None:
    s = Server()
    s.row(0, 0, output=True, trial=True)
    s.row(0, 1, output=True, trial=True)
    s.event(EventCode.CLEAR, -1)
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 2)
    ids, phases, requests = assign(s.story)
    assert (ids, phases) == ([-1, -1, 0, 0], [2, 2, 0, 0])
    assert len(requests) == 1


def test_images_that_share_a_position() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    for p in (0, 1, 1, 1, 1, 5, 6):
        s.row(0, p)
    s.event(EventCode.SEQ_RM, 0, 1)
    s.row(0, 1)
    requests = assign(s.story)[2]
    assert len(requests) == 1
    assert (requests[0]["n_rejected"], requests[0]["n_lost"]) == (6, 0)


def test_shared_numbers() -> None:
    numbers = iter([7, 9])
    a, b = (RequestAssigner(i, allot=lambda: next(numbers)) for i in (0, 1))
    s = Server()
    s.prompt(0, 0, 2)
    assert a.feed(columns(s.rows, ROW_INPUTS))[0].tolist() == [7, 7]
    assert b.feed(columns(s.rows, ROW_INPUTS))[0].tolist() == [9, 9]
    assert b.finish()["context"].tolist() == [1]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Servers doing likely and unlikely things, positions mostly going on from where they were."""
    s = Server()
    position = dict.fromkeys((-1, 0, 1, 2), 0)
    for _ in range(draw(st.integers(1, 25))):
        what = draw(
            st.sampled_from(["rows", "rows", "rows", "jump", "lose", "batch", "event", "event", "launch"])
        )
        sequence = draw(st.sampled_from([0, 0, 1, 2, -1]))
        if what == "rows":
            for _ in range(draw(st.integers(1, 6))):
                s.row(sequence, position[sequence], draw(st.booleans()), draw(st.integers(0, 9)) == 0)
                position[sequence] += draw(st.sampled_from([1, 1, 1, 1, 1, 0, 2]))
                s.batch += draw(st.sampled_from([0, 0, 1]))
        elif what == "jump":
            position[sequence] = draw(st.integers(-1, 12))
        elif what == "lose":
            s.lose(draw(st.integers(1, 4)))
        elif what == "batch":
            s.batch += 1
        elif what == "launch":
            if draw(st.integers(0, 2)) == 0:
                s.event(EventCode.LAUNCH, sequence)
        else:
            code = draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 9, 11]))
            p0 = draw(st.integers(-1, 12))
            p1 = draw(st.one_of(st.just(-1), st.integers(0, 14)))
            arg = draw(st.integers(1, 3) if code == 5 else st.integers(-4, 4))
            s.event(EventCode(code), sequence, p0, p1, arg)
            if code == 1 and p1 < 0 and draw(st.booleans()):
                position[sequence] = min(position[sequence], max(p0, 0))
    return s.story


@settings(max_examples=400, deadline=None)
@given(stories(), st.lists(st.integers(0, 60), max_size=4))
def test_any_story_in_any_pieces(story: Story, cuts: list[int]) -> None:
    """GIVEN any rows and events WHEN fed in any pieces THEN the answer is that of the rules, row by row."""
    want = told(story)
    assert assign(story, [c for c in cuts if c < len(story[0])]) == want
