"""A server that the recorded program left behind is found whenever it is looked for: /proc is never read at once."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from moetrace.host import server
from moetrace.host.server import TracedProcess

#: what a process shows at each look at /proc: its environment is gone while it becomes another program
LIVES = {
    "starts between two looks": ["starting", "running"],
    "becomes another program": ["exec", "exec", "starting", "running"],
    "becomes it after a first look": ["starting", "exec", "exec", "exec", "running"],
    "runs already": ["running"],
}


class Proc:
    """A process that goes on with its life at each look."""

    def __init__(self, life: list[str]) -> None:
        self._life = list(life)

    def _look(self) -> str:
        return self._life.pop(0) if len(self._life) > 1 else self._life[0]

    def starting(self, trace: object) -> bool:
        return self._look() == "starting"

    def running(self, trace: object) -> dict[int, str]:
        return {7: "llama-server"} if self._look() == "running" else {}


def left_behind(proc: Proc, monkeypatch: pytest.MonkeyPatch, *, recorded: bool) -> dict[int, str]:
    monkeypatch.setattr(server, "starting_hosts", proc.starting)
    monkeypatch.setattr(server, "running_hosts", proc.running)
    monkeypatch.setattr(server, "START_SECONDS", 1.0)
    process = SimpleNamespace(
        trace=SimpleNamespace(path=None), drain=SimpleNamespace(contexts=[0] if recorded else [])
    )
    return TracedProcess._left_behind(process, time.monotonic())  # type: ignore[arg-type]


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_it_is_found(life: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN a server that starts while its parent ends WHEN it is looked for THEN it is found."""
    assert left_behind(Proc(life), monkeypatch, recorded=False) == {7: "llama-server"}


@pytest.mark.parametrize("recorded", [False, True])
def test_nobody_is_waited_for(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIVEN nobody left WHEN looked for THEN that is known at once; something that starts for ever is given up."""
    began = time.monotonic()
    assert left_behind(Proc(["gone"]), monkeypatch, recorded=recorded) == {}
    assert time.monotonic() - began < (0.05 if recorded else 0.9)
    assert left_behind(Proc(["starting"]), monkeypatch, recorded=recorded) == {}
