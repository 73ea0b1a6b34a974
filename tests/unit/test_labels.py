"""Which request does a client's label speak of? Worlds built by hand, in which everybody's requests are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import small_trace

import moetrace
from moetrace.trace import labels
from moetrace.trace.jsonfile import parse_json, sealed
from moetrace.trace.labels import (
    LABELS_NAME,
    LabelFile,
    LabelLine,
    Labelling,
    Recorded,
    append_labels,
    read_labels,
    request_line,
    resolve_labels,
)
from moetrace.trace.record import EventCode, RowFlag
from moetrace.trace.verify import verify

P, G = list(range(100, 112)), [7, 8, 9, 10, 11]  # a prompt and its answer


@dataclass
class World:
    """What one context of a server computed. Time is counted in rows, 100 ns each."""

    main: bool = True
    host: int = 1
    name: str = "model"
    first_number: int = 0
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    requests: list[list[int]] = field(default_factory=list)
    events: list[tuple[int, int, int, int]] = field(default_factory=list)
    serial: int = 0
    batch: int = 0

    @property
    def now(self) -> int:
        return 100 * self.serial

    def request(
        self,
        prompt: Sequence[int] = P,
        answer: Sequence[int] = G,
        *,
        slot: int = 0,
        cached: int = 0,
        n_batch: int = 8,
        lost: Sequence[int] = (),
        drafts: int = 0,
        shift_at: int = -1,
        all_outputs: bool = False,
    ) -> int:
        """Compute a request; gives its number. ``lost``: positions without rows. ``drafts``: rejected ones per step."""
        number = self.first_number + len(self.requests)
        first = self.serial
        tokens, moved = [*prompt, *answer[:-1]], 0
        for p in range(cached, len(tokens)):
            if p >= len(prompt) or (p - cached) % n_batch == 0:
                self.batch += 1
            if p == shift_at:  # half of what was there goes, the rest moves down
                moved += p // 2
                self.events.append((self.serial, EventCode.SEQ_ADD, slot, -(p // 2)))
            output = RowFlag.OUTPUT if p >= len(prompt) - 1 or all_outputs else 0
            if p not in lost:
                self.rows.append((self.serial, number, tokens[p], p - moved, self.batch, output))
            self.serial += 1
            for d in range(drafts if p >= len(prompt) else 0):
                self.rows.append(
                    (self.serial, number, 5000 + d, p - moved + 1 + d, self.batch, RowFlag.OUTPUT)
                )
                self.serial += 1
        mine = [row[0] for row in self.rows if row[1] == number]
        if mine:
            self.requests.append([number, slot, 100 * first, 100 * mine[-1], mine[0], mine[-1]])
        return number

    def recorded(self) -> Recorded:
        names = ("request", "sequence", "start_ns", "end_ns", "first_serial", "last_serial")
        requests = np.array(self.requests, np.int64).reshape(-1, 6)
        rows = np.array(self.rows, np.int64).reshape(-1, 6)
        events = np.array(self.events, np.int64).reshape(-1, 4)
        return Recorded(
            dict(zip(names, requests.T, strict=True)),
            dict(zip(("serial", "request", "token", "position", "batch", "flags"), rows.T, strict=True))
            | {"serial": rows[:, 0].astype(np.uint64)},
            dict(zip(("serial", "code", "sequence", "arg"), events.T, strict=True)),
            main=self.main,
            host=self.host,
            called=lambda name: name == self.name,
        )


def line(
    world: World,
    since: int,
    prompt: Sequence[int] = P,
    answer: Sequence[int] | None = G,
    *,
    slot: int | None = 0,
    until: int | None = None,
    name: str = "mine",
    **more: Any,
) -> LabelLine:
    """The line of a client that sent a prompt at ``since`` and has just got its answer."""
    more = {"label": "x", "n_generated": 0 if answer is None else len(answer), **more}
    written = request_line(
        sequence=slot,
        from_ns=since,
        to_ns=world.now if until is None else until,
        prompt_tokens=prompt,
        tokens=answer,
        id=name,
        **more,
    )
    return as_read(written)


def as_read(written: dict[str, Any]) -> LabelLine:
    read = labels._line(json.loads(json.dumps(sealed(written))))
    assert isinstance(read, LabelLine), read
    return read


def ids(found: Labelling) -> dict[int, str]:
    return {number: said["id"] for number, said in found.said.items()}


def resolve(world: World, *lines: LabelLine) -> Labelling:
    return resolve_labels(lines, [world.recorded()])


# -- a shared server ---------------------------------------------------------------------------------


def test_a_wait_for_the_slot_takes_in_other_peoples_requests():
    """GIVEN two foreign requests while ours waits WHEN it is labelled THEN only ours has the label."""
    world = World()
    since = world.now
    world.request([1, 2, 3], [4, 5])
    world.request([*P[:6], 9], G)  # begins like ours
    mine = world.request()
    found = resolve(world, line(world, since))
    assert ids(found) == {mine: "mine"}
    assert (found.n_lines, found.n_unsure, found.n_missing, found.unsure, found.lack) == (
        1,
        0,
        0,
        frozenset(),
        "",
    )


@pytest.mark.parametrize(
    "other",
    [
        {"answer": G[:-1]},  # one token less
        {"answer": [*G, 12]},  # one more
        {"answer": [*G[:-2], 99, 98]},
        {"prompt": [*P, *G[:-1]], "answer": [3]},  # our prompt and our answer are its prompt
        {"prompt": [*P, *G[:-1]], "answer": [3], "n_batch": len(P)},  # ... cut into batches just there
        {"prompt": [*P, *G[:-1]], "answer": [3], "n_batch": len(P) + 1, "all_outputs": True},
        {"prompt": P[:-1]},
        {"cached": 4},
        {"slot": 1},
    ],
)
def test_a_request_that_is_nearly_ours_is_not_ours(other):
    world = World()
    since = world.now
    theirs = world.request(**{"prompt": P, "answer": G, **other})
    alone = resolve(world, line(world, since))
    assert not alone.said
    assert (alone.n_unsure, alone.n_missing) == ((0, 1) if "slot" in other else (1, 0))
    mine = world.request()
    found = resolve(world, line(world, since))
    assert ids(found) == {mine: "mine"}
    assert theirs not in found.unsure


def test_whoever_has_not_ended_when_the_answer_is_there_is_another_one():
    world = World()
    since = world.now
    mine = world.request()
    until = world.now + 50
    world.request()  # a twin that begins before the answer is read
    found = resolve(world, line(world, since, until=until))
    assert ids(found) == {mine: "mine"}


def test_without_a_slot_the_tokens_decide():
    world = World()
    since = world.now
    world.request([5, 6, 7], slot=1)
    mine = world.request(slot=3)
    assert ids(resolve(world, line(world, since, slot=None))) == {mine: "mine"}


def test_an_old_server_does_not_say_what_it_generated():
    world = World()
    since = world.now
    world.request([5, 6, 7])
    world.request(P, G[:3])  # the same prompt, a shorter answer
    mine = world.request()
    told = line(world, since, answer=None, n_generated=len(G))
    assert ids(resolve(world, told)) == {mine: "mine"}


# -- what rows a request has -------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [1, 5, len(P) - 1])
def test_a_cached_prefix_has_no_rows(cached):
    world = World()
    since = world.now
    mine = world.request(cached=cached)
    assert ids(resolve(world, line(world, since, n_cached=cached))) == {mine: "mine"}
    wrong = resolve(world, line(world, since, n_cached=cached - 1))
    assert (wrong.said, wrong.n_unsure, wrong.unsure) == ({}, 1, {mine})


def test_a_prompt_that_was_cached_whole_has_rows_of_its_answer_alone():
    world = World()
    since = world.now
    mine = world.request(cached=len(P))
    assert ids(resolve(world, line(world, since, n_cached=len(P)))) == {mine: "mine"}


@pytest.mark.parametrize("answer", [[], [7], G])
def test_answers_of_every_length(answer):
    world = World()
    since = world.now
    mine = world.request(P, answer)
    assert ids(resolve(world, line(world, since, answer=answer))) == {mine: "mine"}


def test_rejected_drafts_stand_behind_the_end():
    world = World()
    since = world.now
    world.request(P, [*G, 12, 13], drafts=2)
    mine = world.request(drafts=3)
    assert ids(resolve(world, line(world, since))) == {mine: "mine"}


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_context_shift_moves_positions(drafts):
    world = World()
    since = world.now
    answer = list(range(20, 60))
    world.request(P, answer[:-1], shift_at=20)
    mine = world.request(P, answer, shift_at=30, drafts=drafts)
    assert ids(resolve(world, line(world, since, answer=answer))) == {mine: "mine"}


def test_lost_rows_leave_gaps():
    world = World()
    since = world.now
    mine = world.request(lost=[3, 4, 9, 13])
    assert ids(resolve(world, line(world, since))) == {mine: "mine"}
    world.request([*P[:5], 1, *P[6:]], lost=[3, 4])  # another one, and the token that differs is there
    assert ids(resolve(world, line(world, since))) == {mine: "mine"}


@pytest.mark.parametrize("lost", [[0], [15], list(range(1, 15)), list(range(16))])
def test_where_too_much_is_missing_nothing_is_said(lost):
    """The beginning, the end, nearly all, all."""
    world = World()
    since = world.now
    world.request(lost=lost)
    found = resolve(world, line(world, since))
    assert not found.said
    assert (found.n_unsure, found.n_missing) == ((0, 1) if len(lost) == 16 else (1, 0))


def test_two_that_fit_with_gaps_are_not_told_apart():
    world = World()
    since = world.now
    a, b = world.request(lost=[3, 4]), world.request(lost=[5])
    found = resolve(world, line(world, since))
    assert (found.said, found.unsure, found.n_unsure) == ({}, {a, b}, 1)
    # one that is whole leaves no doubt
    mine = world.request()
    assert ids(resolve(world, line(world, since))) == {mine: "mine"}


# -- twins -------------------------------------------------------------------------------------------


def test_a_foreign_twin_makes_it_unsure():
    """GIVEN the same prompt with the same answer by somebody else WHEN both ran meanwhile THEN neither is labelled."""
    world = World()
    since = world.now
    twins = {world.request(), world.request()}
    found = resolve(world, line(world, since))
    assert (found.said, found.unsure, found.n_unsure) == ({}, twins, 1)
    assert found.lack == "1 could not be told from other requests of the time (of 1)"


def test_own_twins_are_given_to_each_other():
    """Two of ours that are alike, in one slot: with equal labels both orders are right, with others neither is."""
    world = World()
    since = world.now
    a, b = world.request(), world.request()
    twins = [line(world, since, name="1"), line(world, since, name="2", until=world.now + 7)]
    assert ids(resolve(world, *twins)) == {a: "1", b: "2"}
    apart = [line(world, since, name="1"), line(world, since, name="2", label="y")]
    found = resolve(world, *apart)
    assert (found.said, found.unsure, found.n_unsure) == ({}, {a, b}, 2)
    third = world.request()  # and one more that is not ours
    lines = [line(world, since, name=n) for n in "12"]
    found = resolve(world, *lines)
    assert (found.said, found.unsure, found.n_unsure) == ({}, {a, b, third}, 2)


def test_time_tells_own_twins_apart():
    """The first had ended before the second's slot was free: the second's line fits both, and the first's only one."""
    world = World()
    since = world.now
    a = world.request()
    first = line(world, since, name="1", label="x")
    b = world.request()
    second = line(world, since, name="2", label="y")
    assert ids(resolve(world, second, first)) == {a: "1", b: "2"}


def test_lines_of_different_tokens_are_told_apart():
    """Two pairs of twins, all waiting together: each line is of one of its own pair."""
    world = World()
    since, other = world.now, [9, *P]
    pairs = {world.request(): "p", world.request(): "p", world.request(other): "q", world.request(other): "q"}
    lines = [line(world, since, name=f"p{i}") for i in range(2)]
    lines += [line(world, since, other, name=f"q{i}") for i in range(2)]
    told = ids(resolve(world, *lines))
    assert {number: name[0] for number, name in told.items()} == pairs


def test_two_answers_and_one_request():
    """One of two twins was not recorded: which, nobody knows."""
    world = World()
    since = world.now
    only = world.request()
    world.serial += 20
    found = resolve(world, line(world, since, name="1"), line(world, since, name="2"))
    assert (found.said, found.unsure, found.n_unsure) == ({}, {only}, 2)


# -- several contexts --------------------------------------------------------------------------------


def test_a_model_that_is_named_is_the_only_one_asked():
    a, b = World(name="a"), World(name="b", first_number=50)
    since = a.now
    in_a, in_b = a.request(), b.request()
    both = [a.recorded(), b.recorded()]
    found = resolve_labels([line(a, since)], both)
    assert (found.said, found.unsure) == ({}, {in_a, in_b})
    assert ids(resolve_labels([line(a, since, model="b")], both)) == {in_b: "mine"}
    none = resolve_labels([line(a, since, model="c")], both)
    assert (none.said, none.n_missing) == ({}, 1)
    assert none.lack == "1 speak of requests that are not here (of 1)"


def test_a_draft_model_has_the_label_of_what_it_drafts_for():
    world, draft = World(), World(main=False, first_number=50)
    since = world.now
    theirs, mine = world.request([1, 2, 3], slot=0), world.request(slot=0)
    start = {r[0]: r[2] for r in world.requests}
    draft.serial = start[theirs] // 100 + 1
    draft.request([1, 2, 3], [9, 9], slot=0)
    draft.serial = start[mine] // 100 + 2
    drafted = draft.request(P, [1, 2], slot=0)
    other = World(main=False, host=2, first_number=90)  # of another process
    other.serial = draft.serial
    other.request(P, [1, 2], slot=0)
    found = resolve_labels([line(world, since)], [draft.recorded(), world.recorded(), other.recorded()])
    assert ids(found) == {mine: "mine", drafted: "mine"}
    draft.serial += 1
    draft.request(P, [1, 2], slot=0)  # its main request was not recorded: either draft may be ours
    found = resolve_labels([line(world, since)], [draft.recorded(), world.recorded()])
    assert ids(found) == {mine: "mine"}


# -- lines -------------------------------------------------------------------------------------------


def test_a_line_of_old_speaks_of_the_only_one_that_began_then():
    world = World()
    old = {"sequence": 0, "from_ns": world.now, "id": "old", "label": "x", "difficulty": 3}
    only = world.request([1, 2])
    read = as_read({**old, "to_ns": world.now})
    found = resolve(world, read)
    assert ids(found) == {only: "old"}
    assert found.extra[only] == {"difficulty": 3}
    other = world.request([3, 4])
    found = resolve(world, as_read({**old, "to_ns": world.now}))
    assert (found.said, found.unsure, found.n_unsure) == ({}, {only, other}, 1)


def test_later_lines_win_key_by_key():
    world = World()
    since = world.now
    mine = world.request()
    first = line(world, since, label="x", extra={"a": 1, "b": 2})
    again = line(world, since, label="y", extra={"b": 3})
    by_hand = as_read({"request": mine, "id": "hand", "note": "n"})
    found = resolve(world, first, again, by_hand)
    assert found.said[mine]["label"] == "y"
    assert found.said[mine]["id"] == "hand"
    assert found.extra[mine] == {"a": 1, "b": 3, "note": "n"}


OWN = {
    "request": 2, "sequence": 7, "from_ns": 0, "to_ns": 1, "crc": 5, "id": "i", "label": "l", "prompt": "p", "slot": 9,
    "tokens": [1], "n_prompt": 3, "model": "m", "extra": {"a": 1}, "n_generated": 99, "running": True,
}  # fmt: skip


def test_a_clients_own_keys_cannot_lead_a_label_astray():
    world = World()
    since = world.now
    world.request([1, 2])
    mine = world.request()
    world.request([3, 4])
    found = resolve(world, line(world, since, extra=OWN))
    assert ids(found) == {mine: "mine"}
    assert found.extra[mine] == OWN
    # of before there was `extra`: the window holds, and `request` was the client's own
    first, start, end = world.requests[0][0], *world.requests[0][2:4]
    flat = {
        "sequence": 0,
        "from_ns": start,
        "to_ns": end,
        "id": "a",
        "request": mine,
        "model": "m",
        "tokens_": 1,
    }
    found = resolve(world, as_read(flat))
    assert ids(found) == {first: "a"}
    assert found.extra[first] == {"request": mine, "model": "m", "tokens_": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "x"}, {"tokens": [1, "2"]}, {"tokens": [-1]}, {"tokens": [1 << 31]}, {"tokens": [1.0]},
        {"n_prompt": None}, {"n_prompt": 1 << 40}, {"n_cached": -1}, {"n_cached": 13}, {"n_generated": 1 << 70},
        {"sequence": "0"}, {"model": 3},
    ],
)  # fmt: skip
def test_lines_that_contradict_themselves_are_damage(tmp_path, change):
    path = small_trace(tmp_path / "t.moet", labels=None)
    good = request_line(
        sequence=0, from_ns=0, to_ns=9**9, prompt_tokens=P, tokens=G, n_generated=len(G), id="a"
    )
    append_labels(path, [{**good, **change}])
    lines, damage = read_labels(path)
    assert not lines or resolve_labels(lines, [World().recorded()]).n_missing == 1
    assert bool(lines) != bool(damage)
    if not lines:
        assert verify(path).exit_code == 4


def test_numbers_beyond_all_bounds_are_no_label(tmp_path):
    path = small_trace(tmp_path / "t.moet", labels=None)
    big = 10**30
    append_labels(
        path, [{"request": big, "label": "x"}, {"sequence": 0, "from_ns": 0, "to_ns": big, "label": "x"}]
    )
    assert len(read_labels(path)[1]) == 2
    assert moetrace.open(path).requests["label"].isna().all()


# -- in a trace --------------------------------------------------------------------------------------


def test_a_trace_shows_labels_own_keys_and_doubt(tmp_path):
    """The small trace has three requests of ten rows: slots 0, 1, 0."""
    path = small_trace(tmp_path / "t.moet", labels=None)
    trace = moetrace.open(path)
    numbers = trace.requests.index.tolist()
    token, owner = np.asarray(trace.column("token")), np.asarray(trace.column("request"))
    prompt, answer = token[owner == numbers[1]][:6].tolist(), [*token[owner == numbers[1]][6:].tolist(), 5]
    lines = [
        request_line(
            sequence=1, from_ns=0, to_ns=10**9, prompt_tokens=prompt, tokens=answer, n_generated=5, id="mine",
            label="code", prompt="text", extra=OWN,
        ),
        request_line(sequence=0, from_ns=0, to_ns=10**9, prompt_tokens=[1], tokens=[2], n_generated=1, id="none"),
        request_line(sequence=5, from_ns=0, to_ns=10**9, prompt_tokens=[1], tokens=[2], n_generated=1, id="away"),
    ]  # fmt: skip
    append_labels(path, lines)
    trace = moetrace.open(path)
    requests = trace.requests
    assert requests["id"].tolist() == [None, "mine", None]
    assert requests["label_unsure"].tolist() == [True, False, True]
    one = requests.loc[numbers[1]]
    assert (one["slot"], one["n_generated"], one["prompt"], one["running"]) == (1, 5, "text", False)
    assert requests.reset_index()["request"].tolist() == numbers
    assert one["crc"] == OWN["crc"]
    for name in ("request", "id", "label", "prompt", "slot", "n_prompt", "n_generated", "running"):
        assert one[f"extra.{name}"] == OWN[name]
    assert one["extra"] == {"a": 1}
    assert len(trace.sel(label="code")) == 10
    result = verify(path)
    assert result.exit_code == 0
    assert result.remarks == (
        "labels.jsonl: 1 could not be told from other requests of the time and 1 speak of requests that are not here "
        "(of 3)",
    )


def test_in_many_worlds_no_label_is_anothers():
    """GIVEN random traffic of few prompts, so that twins are common WHEN some of it is ours THEN no other gets a label.

    Ours get their own, or that of a twin that says the same; who has no twin in his time always gets it.
    """
    random = np.random.default_rng(3)
    sure = doubtful = 0
    for _ in range(300):
        world = World()
        sent: dict[int, tuple[Any, ...]] = {}
        lines: list[LabelLine] = []
        for _ in range(int(random.integers(1, 14))):
            slot, cached = int(random.integers(2)), int(random.choice([0, 0, 3]))
            prompt = [*P[: int(random.integers(6, 8))]]
            answer = G[: int(random.integers(1, 3))]
            since = max(0, world.now - int(random.choice([0, 6000, 20000])))
            drafts = int(random.choice([0, 0, 2]))
            number = world.request(prompt, answer, slot=slot, cached=cached, drafts=drafts)
            sent[number] = (slot, cached, prompt, answer)
            if random.random() < 0.5:
                label = str(random.choice(["x", "y"]))
                lines.append(
                    line(
                        world,
                        since,
                        prompt,
                        answer,
                        slot=slot,
                        n_cached=cached,
                        name=str(number),
                        label=label,
                    )
                )
        mine = {int(one.said["id"]): one for one in lines}
        random.shuffle(lines)  # type: ignore[arg-type]
        found = resolve(world, *lines)
        start = {r[0]: r[2] for r in world.requests}
        end = {r[0]: r[3] for r in world.requests}
        for number, said in found.said.items():
            assert number in mine
            assert sent[int(said["id"])] == sent[number]
            assert said["label"] == mine[number].said["label"]
        for number, one in mine.items():
            around = [n for n in start if start[n] >= one.from_ns and end[n] <= one.to_ns]
            if [n for n in around if sent[n] == sent[number]] == [number]:
                assert found.said[number]["id"] == str(number)
                sure += 1
            else:
                doubtful += 1
        assert found.n_lines == len(mine)
        assert found.n_unsure + len(found.said) == len(mine)
        assert not found.unsure & found.said.keys()
    assert sure > 500
    assert doubtful > 100


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's: what was there stays, what comes after is whole."""
    append_labels(tmp_path, [{"request": 0, "id": "a", "label": "x"}])
    before = (tmp_path / "labels.jsonl").read_bytes()
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from moetrace.errors import DiskError\n"
        "from moetrace.trace.labels import append_labels\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 30}, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    append_labels(Path(sys.argv[1]), [{'request': 1, 'id': 'b', 'label': 'y' * 100}])\n"
        "except DiskError as e:\n"
        "    print(e.what)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot write" in run.stdout
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    append_labels(tmp_path, [{"request": 2, "id": "c", "label": "z"}])
    lines, damage = read_labels(tmp_path)
    assert [line.request for line in lines] == [0, 2]
    assert damage == []


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    append_labels(tmp_path, [{"request": 0, "id": "a", "label": "x"}])
    with (tmp_path / "labels.jsonl").open("ab") as f:
        f.write(b'{"request": 1, "id": "b", "la')
    append_labels(tmp_path, [{"request": 2, "id": "c", "label": "z"}])
    lines, damage = read_labels(tmp_path)
    assert [line.request for line in lines] == [0, 2]
    assert len(damage) == 1


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN a file that grows, is torn, mended and replaced WHEN read each time THEN it says what a new reader says."""
    parsed = []
    monkeypatch.setattr(
        labels, "parse_json", lambda text, where: parsed.append(where) or parse_json(text, where)
    )
    file, path = LabelFile(tmp_path), tmp_path / LABELS_NAME

    def check(n_parsed: int) -> None:
        parsed.clear()
        found = file.read()
        assert len(parsed) == n_parsed
        assert found == LabelFile(tmp_path).read()

    check(0)
    append_labels(tmp_path, [{"request": i, "label": "a"} for i in range(3)])
    check(3)
    check(0)
    append_labels(tmp_path, [{"request": 3, "id": "x"}])
    with path.open("ab") as f:
        f.write(b'{"request": 4, "label"')
    check(2)  # and half a line
    check(1)
    with path.open("ab") as f:
        f.write(b': "b"}\nnot json\n')
    check(2)
    assert len(file.read()[1]) == 2
    check(0)
    text = path.read_bytes()
    path.write_bytes(text.replace(b"not json", b"so jsont"))  # in place
    check(6)
    path.write_bytes(text[: text.index(b"\n") + 1])
    check(1)
    whole = tmp_path / "other"
    whole.write_bytes(text)
    whole.replace(path)
    check(6)
    path.unlink()
    check(0)
    assert file.read() == ([], [])
