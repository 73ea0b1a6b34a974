"""Who sent a signal."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from moetrace._native import SignalWatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="who sent a signal is known on Linux")


def test_processes_and_the_kernel_are_told_apart() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    watch = SignalWatch([signal.SIGUSR1, signal.SIGALRM])
    try:
        assert watch.take() == []
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.take() == [(signal.SIGUSR1, False)] * 2
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # the kernel's own, as a terminal's are
        deadline = time.monotonic() + 30
        while not (got := watch.take()):
            assert time.monotonic() < deadline
        assert got == [(signal.SIGALRM, True)]
        with pytest.raises(RuntimeError, match="watched already"):
            SignalWatch([signal.SIGUSR2])
    finally:
        watch.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    watch = SignalWatch([signal.SIGUSR2])  # again, once the first is closed
    watch.close()
    with pytest.raises(ValueError, match="no such signal"):
        SignalWatch([0])
