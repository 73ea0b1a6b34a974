"""Asking many questions of one subject: each in a process of its own, as many at a time as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from moetrace.findings.finding import OUT_OF_MEMORY, Finding, Question

if TYPE_CHECKING:
    from moetrace.findings.kept import Kept
    from moetrace.findings.subject import Subject

#: takes what is being asked ("": nothing, an answer is given), how many are answered, and of how many
Progress = Callable[[str, int, int], None]


def answers(
    questions: Sequence[Question],
    subject: Subject,
    *,
    kept: Kept | None = None,
    workers: int | None = None,
    progress: Progress = lambda asked, done, total: None,
) -> Iterator[Finding]:
    """Give the questions' findings in their order, each as soon as it and those before it are there.

    What is in ``kept`` is not asked again, and what is asked is put there. With two ``workers`` or more (by default
    the processor's cores) every question is asked in a process of its own, where processes can be forked: one that
    fails, or is killed, costs no other. With a model they are asked here, one after the other.
    """
    found: dict[int, Finding] = {}
    for i, question in enumerate(questions):
        old = None if kept is None else kept.get(question)
        if old is not None:
            found[i] = old
    left = {i: question for i, question in enumerate(questions) if i not in found}
    n = min(os.cpu_count() or 1 if workers is None else workers, len(left))
    if n > 1 and subject.model is None and sys.platform == "linux":
        asked = _apart(left, subject, n, progress)
    else:
        asked = _here(left, subject, progress)
    given = 0
    while True:
        while given in found:
            progress("", given, len(questions))
            yield found.pop(given)
            given += 1
        i, finding = next(asked, (-1, None))
        if finding is None:
            return
        found[i] = finding
        if kept is not None and finding.not_answered is None:
            kept.put(questions[i], finding)


def _here(
    left: dict[int, Question], subject: Subject, progress: Progress
) -> Iterator[tuple[int, Finding | None]]:
    for done, (i, question) in enumerate(left.items()):
        progress(question.name, done, len(left))
        yield i, question.ask(subject)


def _apart(
    left: dict[int, Question], subject: Subject, n: int, progress: Progress
) -> Iterator[tuple[int, Finding | None]]:
    """Ask in forked processes, ``n`` at a time; what many questions need is made before, so that they share it."""
    subject.prepare()
    fork = multiprocessing.get_context("fork")
    waiting = sorted(left, key=lambda i: not left[i].slow)
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < n:
                i = waiting.pop(0)
                ours, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=_asked, args=(left[i], subject, theirs), daemon=True)
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", DeprecationWarning
                    )  # threads of linear algebra, which know forks
                    process.start()
                theirs.close()
                running[ours] = i, process
            progress(", ".join(left[i].name for i, _ in running.values()), done, len(left))
            ready = wait(list(running))
            for ours in [each for each in running if each in ready]:
                i, asked = running.pop(ours)
                try:
                    finding: Finding = ours.recv()
                except EOFError:  # killed, most likely for its memory
                    asked.join()
                    finding = left[i].not_answered(_end(asked.exitcode or 0), failed=True)
                ours.close()
                asked.join()
                done += 1
                yield i, finding
    finally:
        for _, left_over in running.values():
            left_over.terminate()
            left_over.join()


def _asked(question: Question, subject: Subject, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the one who asks says what there is to say
    subject.progress = lambda what: None
    with threadpool_limits(1):  # the others have the other cores
        answer.send(question.ask(subject))


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return OUT_OF_MEMORY
    return f"the process that was asked ended with {signal.Signals(-code).name if code < 0 else code}"
