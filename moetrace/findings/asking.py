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
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from moetrace._native import set_default_threads
from moetrace.errors import MoetraceError
from moetrace.findings.finding import OUT_OF_MEMORY, Finding, Question

if TYPE_CHECKING:
    from moetrace.findings.kept import Kept
    from moetrace.findings.subject import Subject

#: takes what is being asked ("": nothing, an answer is given), how many are answered, and of how many
Progress = Callable[[str, int, int], None]
#: what is done with each finding where it was made: what it gives can be pickled
Then = Callable[[Finding], Any]


def answers(
    asked: Sequence[Question | Finding],
    subject: Subject,
    *,
    kept: Kept | None = None,
    then: Then | None = None,
    workers: int | None = None,
    progress: Progress = lambda asked, done, total: None,
) -> Iterator[tuple[Finding, Any]]:
    """Give questions' findings in their order, and what ``then`` gave of each, as soon as those before are there.

    Findings among ``asked`` are given as they are. What is in ``kept`` is not asked again, and what is asked is put
    there. With two ``workers`` or more (by default the processor's cores) each is asked in a process of its own,
    where processes can be forked: one that fails, or is killed, costs no other. With a model they are asked here, one
    after the other.

    Raises the MoetraceError that ``then`` raises.
    """
    tasks = {}
    for i, each in enumerate(asked):
        old = kept.get(each) if isinstance(each, Question) and kept is not None else None
        tasks[i] = each if old is None else old
    found: dict[int, tuple[Finding, Any]] = {}
    if then is None:
        found = {i: (task, None) for i, task in tasks.items() if isinstance(task, Finding)}
    left = {i: task for i, task in tasks.items() if i not in found}
    n = min(os.cpu_count() or 1 if workers is None else workers, len(left))
    apart = n > 1 and subject.model is None and sys.platform == "linux"
    made = (_apart if apart else _here)(left, subject, then, n, progress)
    given = 0
    while True:
        while given in found:
            progress("", given, len(tasks))
            yield found.pop(given)
            given += 1
        i, finding, more = next(made, (-1, None, None))
        if finding is None:
            return
        found[i] = finding, more
        question = tasks[i]
        if kept is not None and isinstance(question, Question) and not finding.failed:
            kept.put(question, finding)


_Made = Iterator[tuple[int, Finding | None, Any]]
_Tasks = dict[int, Question | Finding]


def _done(task: Question | Finding, subject: Subject, then: Then | None) -> tuple[Finding, Any]:
    finding = task if isinstance(task, Finding) else task.ask(subject)
    return finding, then(finding) if then is not None else None


def _here(tasks: _Tasks, subject: Subject, then: Then | None, n: int, progress: Progress) -> _Made:
    for done, (i, task) in enumerate(tasks.items()):
        progress(task.name, done, len(tasks))
        yield i, *_done(task, subject, then)


def _apart(tasks: _Tasks, subject: Subject, then: Then | None, n: int, progress: Progress) -> _Made:
    """Ask in forked processes, ``n`` at a time; what many questions need is made before, so that they share it."""
    if any(isinstance(task, Question) for task in tasks.values()):
        subject.prepare()
    fork = multiprocessing.get_context("fork")
    waiting = list(tasks)
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    done = 0
    # Processes share the cores. Linear algebra is told here: in a fork that would first start a thread for every core.
    limited = threadpool_limits(1)
    cores = os.cpu_count() or 1
    try:
        while waiting or running:
            while waiting and len(running) < n:
                i = _next(waiting, [i for i, _ in running.values()], tasks, n)
                waiting.remove(i)
                ours, theirs = fork.Pipe(duplex=False)
                process = fork.Process(target=_asked, args=(tasks[i], subject, then, theirs), daemon=True)
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", DeprecationWarning
                    )  # threads of linear algebra, which know forks
                    process.start()
                theirs.close()
                running[ours] = i, process
            set_default_threads(max(1, cores // len(running)))  # of all that run
            progress(", ".join(tasks[i].name for i, _ in running.values()), done, len(tasks))
            ready = wait(list(running))
            for ours in [each for each in running if each in ready]:
                i, asked = running.pop(ours)
                try:
                    answer: tuple[Finding, Any] | MoetraceError = ours.recv()
                except EOFError:  # killed, most likely for its memory
                    asked.join()
                    answer = _ended(tasks[i], asked.exitcode or 0), None
                ours.close()
                asked.join()
                if isinstance(answer, MoetraceError):
                    raise answer
                done += 1
                yield i, *answer
    finally:
        limited.restore_original_limits()
        set_default_threads(0)
        for _, left_over in running.values():
            left_over.terminate()
            left_over.join()


def _next(waiting: list[int], running: list[int], tasks: _Tasks, n: int) -> int:
    """Which to begin: the slowest, so that it is not alone at the end; but one process is for quick answers."""
    slow = {i: getattr(tasks[i], "slow", 0) for i in (*waiting, *running)}
    quick = [i for i in waiting if not slow[i]]
    if quick and sum(slow[i] > 0 for i in running) >= n - 1:
        return quick[0]
    return max(waiting, key=slow.__getitem__)


def _asked(task: Question | Finding, subject: Subject, then: Then | None, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the one who asks says what there is to say
    subject.progress = lambda what: None
    try:
        answer.send(_done(task, subject, then))
    except MoetraceError as e:
        answer.send(e)


def _ended(task: Question | Finding, code: int) -> Finding:
    if code == -signal.SIGKILL:
        why = OUT_OF_MEMORY
    else:
        why = f"the process that was asked ended with {signal.Signals(-code).name if code < 0 else code}"
    return Finding(
        task.name, task.title, parameters=task.parameters, concludes=False, not_answered=why, failed=True
    )
