"""The processes that the kill test kills: hosts, drains, runs, resumptions and recoveries.

Started once; it imports everything and then forks a process for each line of JSON on its standard input, so that
a thousand of them are affordable. A process tells what it does in lines of JSON on standard output.

A host here is moetrace's own C++ producer in a loop. What it writes follows from the serial alone, so that a row
can be checked wherever it turns up: :func:`expected_rows`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import numpy as np
from rings import context_of, make_layout

from moetrace.errors import MoetraceError
from moetrace.host.drain import Drain
from moetrace.host.options import CaptureOptions
from moetrace.host.resume import ResumedRecording
from moetrace.host.server import TracedProcess
from moetrace.trace.record import Counter, EventCode, RecordKind, record_dtype
from moetrace.trace.recover import recover
from moetrace.trace.ring import process_alive
from moetrace.trace.writer import TraceWriter

LAYOUT = make_layout(layers=(0, 1, 2, 3), n_expert=16, k=4)
SLOTS, BLOCK, CYCLE = 4, 64, 4  # rows in a block: 16 of each slot; a slot's request lasts 4 blocks


def launched(block: int, slot: int) -> int:
    """Give the block in which the slot's request of this block began."""
    return 0 if block < slot else block - (block - slot) % CYCLE


def expected_rows(serial: np.ndarray) -> dict[str, np.ndarray]:
    """Give what a host writes into the rows of these serials (n,), and what follows from it."""
    serial = serial.astype(np.int64)
    block, i = serial // BLOCK, serial % BLOCK
    slot, j = i % SLOTS, i // SLOTS
    began = np.where(block < slot, 0, block - (block - slot) % CYCLE)
    position = (block - began) * (BLOCK // SLOTS) + j
    mixed = (serial[:, None] * 2654435761 + 97 * np.arange(16)) & 0xFFFFFFFF
    offset = np.arange(4)[:, None] + 4 * np.arange(4)  # (layer, k): distinct within a layer
    experts = (mixed[:, :1, None] // 7 + offset + 3 * serial[:, None, None]) % 16
    weights = ((mixed % 1021).astype(np.float32) / 1021).reshape(-1, 4, 4)
    return {
        "token": (mixed[:, 0] % 50_000).astype("<i4"),
        "position": position.astype("<i4"),
        "sequence": slot.astype("<i4"),
        "batch": (serial // SLOTS).astype("<u4"),
        "flags": (position >= 4).astype("<u4"),
        "experts": experts.astype("|u1"),
        "weights": weights.astype("<f4"),
        "phase": (position > 4).astype("|u1"),
        "began": began,
    }


def records_of(block: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Give a block's records: the launches of the slots that begin a request, and 64 rows."""
    slots = [slot for slot in range(SLOTS) if launched(block, slot) == block]
    records = np.zeros(2 * len(slots) + BLOCK, dtype)
    events, rows = records[: 2 * len(slots)], records[2 * len(slots) :]
    events["kind"], events["serial"], events["time_ns"] = RecordKind.EVENT, block * BLOCK, block
    events["sequence"] = np.repeat(slots, 2)
    events["token"] = [EventCode.LAUNCH, EventCode.SEQ_RM] * len(slots)
    events["arg0"] = -1
    events["arg1"] = np.arange(len(events))
    rows["serial"] = block * BLOCK + np.arange(BLOCK)
    rows["n_sequences"], rows["state"], rows["time_ns"] = 1, 1, block
    for name, column in expected_rows(rows["serial"]).items():
        if name in (dtype.names or ()):
            rows[name] = column
    rows["step"] = rows["batch"]
    return records


def host(say: Any, folder: str, seed: int, on_full: int, capacity: int) -> None:
    """Produce until killed, or until a file ``enough`` lies beside the trace; then close the ring."""
    native: Any = importlib.import_module("moetrace._native")
    random = np.random.default_rng(seed)
    path, enough = Path(folder) / "ctx0" / "ring", Path(folder + ".enough")
    while not Path(folder).is_dir():
        time.sleep(0.0005)
    path.parent.mkdir(mode=0o700)
    fields = [(f.name, f.dtype, list(f.shape)) for f in LAYOUT.fields]
    text = json.dumps({**context_of(LAYOUT), "counter_names": [c.name.lower() for c in Counter]})
    writer = native.RingWriter(str(path), fields, text, capacity, on_full, 20_000_000)
    os.link(path, folder + ".ring")  # it outlives the ring's deletion: the test reads the truth in it
    # the C++ side aligns fields to eight bytes
    offset, laid_out = 64, []
    for field in LAYOUT.fields:
        offset = -(-offset // 8) * 8
        laid_out.append(type(field)(field.name, field.dtype, field.shape, offset))
        offset += field.nbytes
    dtype = record_dtype(laid_out, writer.stride)
    pace = float(random.choice([0.0, 0.0002, 0.002]))
    block = 0
    while not enough.exists():
        writer.push(records_of(block, dtype))
        block += 1
        time.sleep(pace * random.random())
    writer.close("")


def _until_ended(pid: int) -> None:
    while process_alive(pid):
        time.sleep(0.002)


def drain(say: Any, folder: str, host_pid: int) -> None:
    """Record what the host writes, and close the trace when it has ended: what `moetrace run` does."""
    trace = TraceWriter(folder)
    recording = Drain(trace)
    recording.start()
    _until_ended(host_pid)
    recording.stop()
    trace.close(exit_code=0)


def run(say: Any, folder: str, command: list[str], channels: str) -> None:
    """Start a server under the tracer, as `moetrace run` does."""
    traced = TracedProcess(command, folder, CaptureOptions.of(channels), log=Path(folder + ".log"))
    say(server=traced.process.pid)
    traced.finish(traced.wait())


def resume(say: Any, folder: str) -> None:
    """Take a recording up, as `moetrace resume` does."""
    recording = ResumedRecording(folder)
    say(resumed=recording.rows_caught_up)
    recording.wait()
    recording.finish()


def mend(say: Any, folder: str) -> None:
    """Recover, as `moetrace recover` does."""
    recover(folder)


ROLES = {"host": host, "drain": drain, "run": run, "resume": resume, "recover": mend}


def main() -> None:
    """Fork a process per line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        order = json.loads(line)
        number, role = order.pop("id"), order.pop("role")
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(0)

        def say(number: int = number, **told: Any) -> None:
            os.write(1, (json.dumps({"id": number, **told}) + "\n").encode())

        say(pid=os.getpid())
        try:
            ROLES[role](say, **order)
            say(done=True)
        except MoetraceError as e:
            say(error=str(e))
        except BaseException:
            say(error=traceback.format_exc())
        os._exit(0)


if __name__ == "__main__":
    main()
