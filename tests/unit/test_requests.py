"""Requests out of rows and events: against the rules, row by row, and on stories of real servers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_oracle import NumberedOracle, Oracle

from moetrace.trace.record import EventCode, RowFlag
from moetrace.trace.requests import (
    EVENT_INPUTS,
    NUMBERED_EVENT_INPUTS,
    NUMBERED_ROW_INPUTS,
    REQUEST_TABLE,
    ROW_INPUTS,
    Following,
    RequestAssigner,
    allot_again,
    replay,
)

Story = tuple[list[dict[str, int]], list[dict[str, int]]]


class Server:
    """Tells the story of a context: what it computes and does to its sequences.

    Rows and events are numbered as a host does; ``assign`` shows that only if it is told to. ``skip`` counts events
    without keeping them: they are lost.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []
        self.events: list[dict[str, int]] = []
        self.serial = 0
        self.batch = 0
        self.n_events = 0
        self.tasks: dict[int, int] = {}

    def row(
        self,
        sequence: int,
        position: int,
        output: bool = False,
        trial: bool = False,
        *,
        token: int | None = None,
        generated: bool = False,
    ) -> None:
        self.rows.append(
            {
                "serial": self.serial,
                "time_ns": 10 * self.serial,
                "batch": self.batch,
                "position": position,
                "sequence": sequence,
                "flags": output * RowFlag.OUTPUT | trial * RowFlag.TRIAL | generated * RowFlag.GENERATED,
                "token": position if token is None else token,
                "task": self.tasks.get(sequence, 0),
                "events_before": self.n_events,
            }
        )
        self.serial += 1

    def prompt(self, sequence: int, start: int, n: int) -> None:
        for i in range(n):
            self.row(sequence, start + i, output=i == n - 1)
        self.batch += 1

    def decode(self, sequence: int, start: int, n: int) -> None:
        for i in range(n):
            self.row(sequence, start + i, output=True, generated=True)
            self.batch += 1

    def verify(self, sequence: int, start: int, tokens: list[int]) -> None:
        """Decode a sampled token and drafts behind it."""
        for i, token in enumerate(tokens):
            self.row(sequence, start + i, output=True, generated=i == 0, token=token)
        self.batch += 1

    def event(
        self,
        code: EventCode,
        sequence: int = -1,
        p0: int = -1,
        p1: int = -1,
        arg: int = 0,
        *,
        lost: bool = False,
    ) -> None:
        if code == EventCode.LAUNCH and sequence >= 0:
            arg = self.tasks[sequence] = self.tasks.get(sequence, 0) + 1
        number, self.n_events = self.n_events, self.n_events + 1
        if not lost:
            values = (self.serial, code, sequence, p0, p1, arg, number)
            self.events.append(dict(zip((*EVENT_INPUTS, *NUMBERED_EVENT_INPUTS), values, strict=True)))

    def lose(self, n: int) -> None:
        self.serial += n

    @property
    def story(self) -> Story:
        return self.rows, self.events


def columns(items: list[dict[str, int]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    dtypes = {"serial": "<u8", "time_ns": "<i8"} | dict.fromkeys(
        ("batch", "flags", "events_before", "number"), "<u4"
    )
    return {name: np.array([item[name] for item in items], dtypes.get(name, "<i4")) for name in names}


def assign(
    story: Story, cuts: list[int] | None = None, *, numbered: bool = False
) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    """Run the assigner over a story cut into pieces; events go with the rows that follow them."""
    rows, events = story
    row_inputs = (*ROW_INPUTS, *(NUMBERED_ROW_INPUTS if numbered else ()))
    event_inputs = (*EVENT_INPUTS, *(NUMBERED_EVENT_INPUTS if numbered else ()))
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
        a, b = assigner.feed(columns(piece, row_inputs), columns(events[fed:end], event_inputs))
        ids += a.tolist()
        phases += b.tolist()
        tables.append(assigner.take_ended())
        start, fed = stop, end
    tables.append(assigner.finish())
    table = {name: np.concatenate([t[name] for t in tables]) for name in REQUEST_TABLE}
    requests = [{name: int(table[name][i]) for name in table} for i in range(len(table["request"]))]
    return ids, phases, sorted(requests, key=lambda r: r["request"])


def told(story: Story, *, numbered: bool = False) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    oracle = NumberedOracle() if numbered else Oracle()
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
    assert numbered(s)[0] == ids
    assert ids == [0] * 8 + [1] * 2
    assert requests[1]["n_cached"] == 4


def test_next_turn_that_only_appends_is_a_new_request() -> None:
    s = Server()
    s.prompt(0, 0, 3)
    s.decode(0, 3, 2)
    s.event(EventCode.SEQ_RM, 0, 5)
    s.prompt(0, 5, 3)
    for ids in (assign(s.story)[0], numbered(s)[0]):
        assert ids == [0] * 5 + [1] * 3


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
    assert numbered(s)[:2] == (ids, phases)
    assert [r["n_recomputed"] for r in numbered(s)[2]] == [3, 0]  # of these drafts all tokens are the same
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
    for ids in (assign(s.story)[0], numbered(s)[0]):
        assert ids == [0] * 8 + [1] * 5 + [2] * 3


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
    assert len(requests) == len(numbered(s)[2]) == 1
    assert (requests[0]["n_rejected"], requests[0]["n_lost"]) == (6, 0)


def test_shared_numbers() -> None:
    numbers = iter([7, 9])
    a, b = (RequestAssigner(i, allot=lambda: next(numbers)) for i in (0, 1))
    s = Server()
    s.prompt(0, 0, 2)
    assert a.feed(columns(s.rows, ROW_INPUTS))[0].tolist() == [7, 7]
    assert b.feed(columns(s.rows, ROW_INPUTS))[0].tolist() == [9, 9]
    assert b.finish()["context"].tolist() == [1]


def numbered(s: Server) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    return assign(s.story, numbered=True)


@pytest.mark.parametrize("lost", [(), (0,), (1,), (0, 1)])
def test_a_lost_launch_is_made_good_by_the_task(lost: tuple[int, ...]) -> None:
    """GIVEN two requests WHEN the LAUNCHes between them are lost THEN they are still two, and it is said."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 5)
    s.decode(0, 5, 3)
    for i in range(2):
        s.event(EventCode.LAUNCH, 0, lost=i in lost)
    s.event(EventCode.SEQ_RM, 0, 4)
    s.prompt(0, 4, 2)
    s.decode(0, 6, 2)
    ids, phases, requests = numbered(s)
    assert ids == [0] * 8 + [1] * 4
    assert phases == [0] * 5 + [1] * 3 + [0] * 2 + [1] * 2
    assert [r["n_events_lost"] for r in requests] == [0, len(lost)]
    assert [r["n_cached"] for r in requests] == [0, 4]
    # whether the rows that went were the first one's drafts is known only if its end is
    assert requests[0]["n_undecided"] == (-1 if 0 in lost else 0)


def test_the_same_story_without_numbers_takes_one_request_into_the_other() -> None:
    """What made numbers necessary: the test above would notice if it did not look at them."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 5)
    s.event(EventCode.LAUNCH, 0, lost=True)
    s.event(EventCode.SEQ_RM, 0, 4)
    s.prompt(0, 4, 2)
    assert set(assign(s.story)[0]) == {0}
    assert set(numbered(s)[0]) == {0, 1}


def test_events_lost_of_another_sequence_count_too() -> None:
    """Nobody knows whose they were."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.LAUNCH, 1)
    s.prompt(0, 0, 3)
    s.prompt(1, 0, 3)
    s.event(EventCode.SEQ_RM, 1, 2, lost=True)
    s.decode(0, 3, 1)
    assert [r["n_events_lost"] for r in numbered(s)[2]] == [1, 0]


def test_a_prompt_of_outputs_is_prefill_until_the_host_samples() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    for batch in range(3):
        for i in range(4):
            s.row(0, 4 * batch + i, output=True)
        s.batch += 1
    s.decode(0, 12, 2)
    assert numbered(s)[1] == [0] * 12 + [1] * 2
    assert assign(s.story)[1] == [0] * 4 + [1] * 10  # what a recording without the flag can say


def test_drafts_are_decode_though_nothing_was_sampled_before_them() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 2)
    s.verify(0, 2, [7, 8, 9])
    assert numbered(s)[1] == [0, 0, 1, 1, 1]


def test_a_copied_prompt_begins_with_decode() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.LAUNCH, 1)
    s.prompt(0, 0, 3)
    s.event(EventCode.SEQ_CP, 0, 0, -1, arg=1)
    s.row(0, 3, output=True, generated=True)
    s.row(1, 3, output=True)
    _, phases, requests = numbered(s)
    assert phases == [0, 0, 0, 1, 1]
    assert [(r["n_cached"], r["n_prefill"]) for r in requests] == [(0, 3), (3, 0)]


def test_recording_comes_on_within_a_request() -> None:
    s = Server()
    s.event(EventCode.PAUSE)
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.RESUME, p1=40)
    s.decode(0, 40, 3)
    _, phases, requests = numbered(s)
    assert phases == [1, 1, 1]
    assert (requests[0]["n_cached"], requests[0]["n_unrecorded"]) == (-1, 0)


def test_a_task_that_begins_after_recording_came_on_is_known_from_its_beginning() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.event(EventCode.PAUSE)
    s.event(EventCode.RESUME, p1=30)
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.SEQ_RM, 0, 3)
    s.prompt(0, 3, 2)
    s.event(EventCode.LAUNCH, 1)
    s.prompt(1, 2, 2)  # whose memory was restored
    assert [r["n_cached"] for r in numbered(s)[2]] == [0, 3, 2]


def test_recording_goes_off_and_on_within_a_request() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.event(EventCode.LAUNCH, 1)
    s.prompt(0, 0, 4)
    s.prompt(1, 0, 4)
    s.event(EventCode.PAUSE)
    s.event(EventCode.RESUME, p1=9)
    s.decode(0, 9, 1)  # five of the nine were its own
    s.decode(1, 4, 1)
    ids, _, requests = numbered(s)
    assert ids == [0] * 4 + [1] * 4 + [0, 1]
    assert [(r["n_cached"], r["n_unrecorded"], r["n_lost"]) for r in requests] == [(0, 5, 0), (0, 0, 0)]


def test_a_first_row_of_a_new_sequence_after_a_pause() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 2)
    s.event(EventCode.RESUME, p1=9)
    s.row(1, 5, output=True)
    s.row(0, 2, output=True)
    assert [r["n_cached"] for r in numbered(s)[2]] == [0, -1]


def test_another_context_forgets_what_was_there() -> None:
    """A server that slept: tasks go on counting, memory is empty, nothing of the dead context counts."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.decode(0, 4, 2)
    s.event(EventCode.CONTEXT)
    s.event(EventCode.SEQ_RM, 0, 2)
    s.prompt(0, 0, 3)
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 3)
    ids, _, requests = numbered(s)
    assert ids == [0] * 6 + [1] * 3 + [2] * 3
    assert [(r["n_rejected"], r["n_recomputed"], r["n_undecided"]) for r in requests] == [(0, 0, 0)] * 3


def test_rejected_drafts_are_told_from_rows_computed_again() -> None:
    """A hybrid model: of the drafts 1 to 4 two were right; memory is restored, and all is computed again."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.verify(0, 4, [50, 1, 2, 3, 4])
    s.event(EventCode.RESTORE, 0)
    s.event(EventCode.SEQ_RM, 0, 4)
    s.verify(0, 4, [50, 1, 2, 60])
    s.decode(0, 8, 1)
    (request,) = numbered(s)[2]
    assert (request["n_rejected"], request["n_recomputed"], request["n_undecided"]) == (2, 3, 0)


def test_a_token_that_comes_again_after_another_one_was_rejected_all_the_same() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.verify(0, 4, [50, 1, 2, 3])
    s.event(EventCode.SEQ_RM, 0, 5)
    s.verify(0, 5, [9, 2, 3])  # position 6 and 7 have the same tokens, behind another one
    (request,) = numbered(s)[2]
    assert (request["n_rejected"], request["n_recomputed"]) == (3, 0)


@pytest.mark.parametrize("shift", [False, True])
def test_rejection_before_a_context_shift(shift: bool) -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 8)
    s.verify(0, 8, [50, 1, 2])
    s.event(EventCode.SEQ_RM, 0, 9)
    if shift:
        s.event(EventCode.SEQ_RM, 0, 2, 6)
        s.event(EventCode.SEQ_ADD, 0, 6, 9, -4)
    s.verify(0, 5 if shift else 9, [70, 1])
    (request,) = numbered(s)[2]
    assert (request["n_rejected"], request["n_undecided"], request["n_shifts"]) == (2, 0, int(shift))


def test_what_was_removed_when_the_answer_ended_is_undecided() -> None:
    """The draft may have been wrong, or right and the last token: nothing tells."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 4)
    s.verify(0, 4, [50, 1, 2])
    s.event(EventCode.SEQ_RM, 0, 5)
    s.event(EventCode.LAUNCH, 0)
    (request,) = numbered(s)[2]
    assert (request["n_rejected"], request["n_undecided"]) == (0, 2)


def test_a_shift_that_the_next_task_made_is_not_the_last_ones() -> None:
    """``--cache-reuse`` shifts before the first row; with its LAUNCH lost it looks like the last task's."""
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 8)
    s.event(EventCode.LAUNCH, 0, lost=True)
    s.event(EventCode.SEQ_RM, 0, 2, 6)
    s.event(EventCode.SEQ_ADD, 0, 6, 8, -4)
    s.prompt(0, 4, 2)
    assert [r["n_shifts"] for r in numbered(s)[2]] == [0, 0]


def test_numbers_that_wrap_around() -> None:
    s = Server()
    s.event(EventCode.LAUNCH, 0)
    s.prompt(0, 0, 2)
    s.event(EventCode.SEQ_RM, 0, 1, lost=True)
    s.decode(0, 2, 2)
    rows = columns(s.rows, (*ROW_INPUTS, *NUMBERED_ROW_INPUTS))
    events = columns(s.events, (*EVENT_INPUTS, *NUMBERED_EVENT_INPUTS))
    assigner = RequestAssigner()
    assigner._n_events = (1 << 32) - 1  # as many have been seen
    events["number"] -= np.uint32(1)
    rows["events_before"] -= np.uint32(1)
    assigner.feed(rows, events)
    assert events["number"][0] == (1 << 32) - 1
    assert assigner.finish()["n_events_lost"].tolist() == [1]


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Servers doing likely and unlikely things, positions mostly going on from where they were.

    Some of the events are lost: without numbers that is another story, with numbers it shows.
    """
    s = Server()
    position = dict.fromkeys((-1, 0, 1, 2), 0)
    for _ in range(draw(st.integers(1, 25))):
        what = draw(
            st.sampled_from(["rows", "rows", "rows", "jump", "lose", "batch", "event", "event", "launch"])
        )
        sequence = draw(st.sampled_from([0, 0, 1, 2, -1]))
        if what == "rows":
            for _ in range(draw(st.integers(1, 6))):
                s.row(
                    sequence,
                    position[sequence],
                    draw(st.booleans()),
                    draw(st.integers(0, 9)) == 0,
                    token=draw(st.integers(0, 1)),
                    generated=draw(st.integers(0, 3)) == 0,
                )
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
                s.event(EventCode.LAUNCH, sequence, lost=draw(st.booleans()))
        else:
            code = draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 9, 10, 11, 13]))
            p0 = draw(st.integers(-1, 12))
            p1 = draw(st.one_of(st.just(-1), st.integers(0, 14)))
            arg = draw(st.integers(1, 3) if code == 5 else st.integers(-4, 4))
            s.event(EventCode(code), sequence, p0, p1, arg, lost=draw(st.integers(0, 5)) == 0)
            if code == 1 and p1 < 0 and draw(st.booleans()):
                position[sequence] = min(position[sequence], max(p0, 0))
    return s.story


@settings(max_examples=400, deadline=None)
@given(stories(), st.lists(st.integers(0, 60), max_size=4))
def test_any_story_in_any_pieces(story: Story, cuts: list[int]) -> None:
    """GIVEN any rows and events WHEN fed in any pieces THEN the answer is that of the rules, row by row."""
    want = told(story)
    assert assign(story, [c for c in cuts if c < len(story[0])]) == want


def tasks_of(story: Story, ids: list[int]) -> dict[int, set[tuple[int, int]]]:
    tasks: dict[int, set[tuple[int, int]]] = {}
    for row, number in zip(story[0], ids, strict=True):
        tasks.setdefault(number, set()).add((row["sequence"], row["task"]))
    return tasks


@settings(max_examples=600, deadline=None)
@given(stories(), st.lists(st.integers(0, 60), max_size=4))
def test_any_numbered_story_in_any_pieces(story: Story, cuts: list[int]) -> None:
    """GIVEN any rows and events, some lost WHEN fed in any pieces THEN the answer is that of the rules, row by row;
    and no row goes into a request of another task.
    """
    want = told(story, numbered=True)
    ids, phases, requests = assign(story, [c for c in cuts if c < len(story[0])], numbered=True)
    assert (ids, phases, requests) == want
    assert all(len(tasks) == 1 for number, tasks in tasks_of(story, ids).items() if number >= 0)


@st.composite
def servers(draw: st.DrawFn) -> tuple[Server, Server]:
    """A llama-server's life, told whole and with events lost: tasks in slots, drafts, shifts, pauses, sleeps."""
    whole, told = Server(), Server()
    both = (whole, told)

    def happen(code: EventCode, sequence: int = -1, p0: int = -1, p1: int = -1, arg: int = 0) -> None:
        lost = draw(st.integers(0, 3)) == 0
        whole.event(code, sequence, p0, p1, arg)
        told.event(code, sequence, p0, p1, arg, lost=lost)

    length = [0, 0]
    for _ in range(draw(st.integers(1, 6))):
        slot = draw(st.integers(0, 1))
        happen(EventCode.LAUNCH, slot)
        start = draw(st.integers(0, length[slot]))
        happen(EventCode.SEQ_RM, slot, start)
        n = draw(st.integers(1, 4))
        for s in both:
            s.prompt(slot, start, n)
        position = start + n
        for _ in range(draw(st.integers(0, 4))):
            drafts = draw(st.lists(st.integers(0, 1), max_size=3))
            for s in both:
                s.verify(slot, position, [5, *drafts])
            accepted = draw(st.integers(0, len(drafts)))
            position += 1 + accepted
            if drafts:
                happen(EventCode.SEQ_RM, slot, position)
            if draw(st.integers(0, 4)) == 0 and position > 3:
                happen(EventCode.SEQ_RM, slot, 1, 3)
                happen(EventCode.SEQ_ADD, slot, 3, position, -2)
                position -= 2
        length[slot] = position
        if draw(st.booleans()):
            happen(EventCode.LAUNCH, slot)
        if draw(st.integers(0, 4)) == 0:
            happen(EventCode.CONTEXT)
            length = [0, 0]
    for s in both:  # nothing after the last event tells of what was lost behind it
        s.event(EventCode.LAUNCH, 0)
        s.event(EventCode.LAUNCH, 1)
    return whole, told


@settings(max_examples=200, deadline=None)
@given(servers())
def test_whatever_is_lost_rows_keep_their_request_and_phase(lives: tuple[Server, Server]) -> None:
    """GIVEN a server's life WHEN any events are lost THEN each row is in the same request and phase as without loss,
    and what was not flagged as uncertain is as without loss.
    """
    whole, told = (numbered(s) for s in lives)
    assert told[:2] == whole[:2]
    for a, b in zip(whole[2], told[2], strict=True):
        if b["n_events_lost"] == 0:
            undecided = {"n_undecided"} if b["n_undecided"] == -1 else set()
            assert {k: v for k, v in a.items() if k not in undecided} == {
                k: v for k, v in b.items() if k not in undecided
            }


@pytest.mark.parametrize("as_numbered", [False, True])
@settings(max_examples=200, deadline=None)
@given(stories(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=4), st.integers(0, 5))
def test_followed_as_it_grows_a_context_has_the_requests_that_it_has_in_the_end(
    as_numbered: bool, story: Story, looks: list[tuple[int, int]], listed: int
) -> None:
    """GIVEN a context that grows, its events now before its rows and now after WHEN it is looked at between THEN the
    requests are those that a reader of what is there finds, less those that are listed.
    """
    rows, events = (
        columns(part, (*names, *more) if as_numbered else names)
        for part, names, more in (
            (story[0], ROW_INPUTS, NUMBERED_ROW_INPUTS),
            (story[1], EVENT_INPUTS, NUMBERED_EVENT_INPUTS),
        )
    )
    rows["request"] = np.array(assign(story, [], numbered=as_numbered)[0], np.int64)
    following, n_rows, n_events = Following(0), 0, 0
    for more_rows, more_events in [*looks, (10**6, 10**6)]:
        n_rows, n_events = n_rows + more_rows, n_events + more_events
        there = {name: column[:n_rows] for name, column in rows.items()}
        happened = {name: column[:n_events] for name, column in events.items()}
        known = np.unique(there["request"])[:listed] if n_rows > 10**5 else np.empty(0, np.int64)
        found = following.requests(there, happened, known)
        assigner = RequestAssigner(0, allot_again(there["request"]))
        for _ in replay(assigner, there, happened):
            pass
        want = assigner.finish()
        left = ~np.isin(want["request"], known)
        order = np.argsort(found["request"], kind="stable")
        for name, column in want.items():
            np.testing.assert_array_equal(found[name][order], column[left][np.argsort(want["request"][left])])
