"""Foreign recordings into the tables of a trace."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError, UsageError
from moetrace.model.imatrix import is_imatrix
from moetrace.trace.columns import TableWriter
from moetrace.trace.contexts import of_model
from moetrace.trace.described import OF_REQUEST
from moetrace.trace.fleet import found, is_many, open_traces
from moetrace.trace.importers import (
    arrays,
    fingerprint,
    lake,
    logs,
    long_form,
    olmoe,
    positions,
    recorder,
    route_trace,
    router_logits,
    token_json,
)
from moetrace.trace.importers.counts import COLUMNS, imatrix_counts, is_array, is_matrix, read_counts
from moetrace.trace.importers.source import DECODE, PREFILL, Piece, Shape, Tally, lines, merged
from moetrace.trace.importers.torch_file import is_torch_file, read_torch_file
from moetrace.trace.jsonfile import write_json
from moetrace.trace.labels import append_labels
from moetrace.trace.record import COUNTERS
from moetrace.trace.requests import REQUEST_TABLE
from moetrace.trace.rows import Layout
from moetrace.trace.storage import disk_error
from moetrace.trace.store import CONTEXT_NAME, FORMAT, META_NAME, VERSION, TraceStore
from moetrace.trace.trace import Trace, open_trace

#: name -> what it is, and an example
DESCRIBED = {
    "token-json": (
        "folders DOMAIN/traces/token-NNNNN.json: every operation of a token's graph",
        '[{"operation_type": "MUL_MAT_ID", "dst_name": "ffn_moe_down-0", "layer_id": 0, "expert_ids": [3, 1]}]',
    ),
    "expert-log": (
        "lines of a patched llama-server, or of llama.cpp's moe-trace",
        "layer_id,expert_ids\n0,3 17 5 22",
    ),
    "gate-log": ("lines of the router's inputs", "gate_input,0,0,0.5 -1.25 3.0"),
    "route-trace": (
        "route_trace v1 of engines that keep experts on flash",
        "# route_trace v1\nturn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n0,0,0,0,0,83,0.53,0,0",
    ),
    "olmoe": (
        "JSON lines with token ids and experts",
        '{"input_ids": [5, 9], "exp_ids": [[[0, 7]], [[3, 1]]]}',
    ),
    "fingerprint": (
        "JSON of generated tokens with experts and weights",
        '{"router_data": [{"token_0": {"layer_0": {"selected_experts": [3, 1], "selected_probs": [0.7, 0.3]}}}]}',
    ),
    "routed-experts": (
        "arrays of vLLM and SGLang, .npy, .npz or JSON lines",
        '{"id": "a", "routed_experts": [[[3, 1], [0, 2]]]}        (or base64, int32 with its "shape")',
    ),
    "router-logits": (
        "logits of Hugging Face's output_router_logits, .npz; --n-expert-used says k",
        "np.savez(path, *[layer.float().numpy() for layer in out.router_logits])",
    ),
    "recorder": (
        "files of SGLang's expert distribution recorder, .pt: tokens; of sums and passes stats reads the counts",
        "/start_expert_distribution_record, /dump_expert_distribution_record",
    ),
    "position-log": ("lines with a token's position", "pos,layer,id0,id1\n0,0,3,17"),
    "lake": ("a folder of Parquet that moetrace export wrote", "moetrace export t.moet -o lake/"),
    "long-form": (
        "a Parquet or Arrow file that moetrace export wrote",
        "moetrace export t.moet -o t.parquet",
    ),
    "counts": (
        "a table of sums: moetrace stats reads it, no trace",
        "domain,layer_id,expert_id,count\ncode,0,3,1204        (domain may be left out; or a matrix: layer,0,1,2,…)",
    ),
    "imatrix": (
        "a file of llama-imatrix: moetrace stats and coverage read it, no trace",
        "llama-imatrix -m model.gguf -f calibration.txt -o imatrix.gguf",
    ),
}
FORMATS = tuple(DESCRIBED)
#: how files begin that are something else
_OTHERS = {
    b"GGUF": "a GGUF model: give it with -m, beside a trace",
    b"PAR1": "a Parquet file without the columns of moetrace export",
    b"ARROW1": "an Arrow file without the columns of moetrace export",
    b"\xff\xff\xff\xff": "a stream of Arrow without the columns of moetrace export",
    b"PK\x03\x04": "a zip archive, and none that torch.save or numpy wrote",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"\x80\x02": "a Python pickle, which is not read: it may run what it likes; give arrays as .npz",
    b"\x80\x04": "a Python pickle, which is not read: it may run what it likes; give arrays as .npz",
    b"SQLite format 3": "an SQLite database",
}
_HOW = "`moetrace import --list` shows what is read; name the format with --format"
CONSUMERS = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]
BLOCK_BYTES = 32 << 20
TOKEN_JSON_USED = 4
"""experts per token, if not given: gpt-oss, of which the published traces are"""
PREDICTED = "tensor.predicted_token"
"""float32, exact below 2**24"""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Imported:
    """What an import made of its source.

    Attributes
    ----------
    path
        The trace.
    format
        One of ``FORMATS``.
    rows, requests
        How many the trace has.
    missing
        What the source does not say: of ``experts``, ``weights``, ``token``, ``position``, ``phase``, ``time``,
        ``n_expert`` and ``loss`` (of a part of a trace: what of it was lost) those that apply. In the trace they are
        -1, unknown, or absent.
    tally
        What was left out.
    """

    path: Path
    format: str
    rows: int
    requests: int
    missing: tuple[str, ...]
    tally: Tally


def detect(source: Path) -> str:
    """Which of ``FORMATS`` a file or folder has, by its names and first line.

    Raises
    ------
    InputError
        If it does not exist, or has none of them.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist", fix="give a trace, or a recording to read")
    if token_json.find(source):
        return "token-json"
    if source.is_dir():
        if lake.is_lake(source):
            return "lake"
        if any(source.glob("*.jsonl")):
            return "olmoe"
        if arrays.find(source):
            return "routed-experts"
        if fingerprint.find(source):
            return "fingerprint"
    elif arrays.find(source):
        if source.suffix == ".npz" and router_logits.is_logits(source):
            return "router-logits"
        return "counts" if source.suffix == ".npy" and is_array(source) else "routed-experts"
    elif fingerprint.find(source):
        return "fingerprint"
    else:
        if is_imatrix(source):
            return "imatrix"
        if is_torch_file(source):
            return "recorder"
        if long_form.is_long_form(source):
            return "long-form"
        with contextlib.suppress(OSError), source.open("rb") as file:
            begins = file.read(16)
            looks = next((what for magic, what in _OTHERS.items() if begins.startswith(magic)), "")
            if looks:
                raise InputError(
                    f"{source} is no recording that moetrace reads", why=f"it looks like {looks}", fix=_HOW
                )
        line, text = next(lines(source), (0, ""))
        names = [name.strip() for name in text.split(",")]
        if text.lstrip().startswith("{") and '"exp_ids"' in text:
            return "olmoe"
        if text.lstrip().startswith("{") and f'"{arrays.KEY}"' in text:
            return "routed-experts"
        if text.startswith(positions.HEADER):
            return "position-log"
        if text.startswith(route_trace.HEADER):
            return "route-trace"
        if text.startswith(f"{logs.GATE},"):
            return "gate-log"
        if text.strip() in (logs.EXPERT_HEADER, logs.SINGLE_HEADER) or re.fullmatch(
            r"\d+,\d+( \d+)*", text.strip()
        ):
            return "expert-log"
        if set(COLUMNS[1:]) <= set(names) or is_matrix(text):
            return "counts"
        if line == 0:
            raise InputError(f"{source} is empty", fix="give a trace, or a recording to read")
    raise InputError(
        f"{source} is neither a trace nor a recording that moetrace reads",
        why=f"it is none of {', '.join(FORMATS)}",
        fix=_HOW,
    )


def open_source(
    path: str | PathLike[str],
    context: str | int | None = None,
    model: str | None = None,
    *,
    unreadable: Literal["raise", "leave out"] = "raise",
    as_published: bool = False,
) -> Trace | Any:
    """Open a trace, or read a foreign recording as one; or many traces.

    A recording is imported into a temporary trace that goes when the object does; ``moetrace import`` keeps
    it.

    Parameters
    ----------
    path
        A trace's folder, or anything that :func:`detect` knows; or what stands for many traces: a pattern
        (``fleet/*.moet``), a folder that holds them, or an address that fsspec knows (``s3://bucket/fleet``).
    context, model
        Which llama contexts of a trace to show; see :func:`moetrace.trace.trace.open_trace`.
    unreadable
        What to do with those of many that cannot be read.
    as_published
        Of a recording of others, as :func:`import_trace`.

    Returns
    -------
    Trace
        Or, for a count table, which has no tokens, a :class:`CountTable`; for many traces
        :class:`~moetrace.trace.fleet.Traces` (``Any`` to a type checker, since what it is follows from ``path``).

    Raises
    ------
    TraceError, UsageError
        As :func:`moetrace.trace.trace.open_trace`.
    InputError
        If it is no recording, or malformed: file, line and field.
    """
    source = Path(path)
    if (source / META_NAME).exists():
        return open_trace(source, context, model)
    if is_many(path):

        def opened(each: Path) -> Trace | None:
            lacks = model is not None and not of_model(TraceStore(each).contexts, model)
            return None if lacks else open_trace(each, context, model)

        return open_traces(found(path), opened, leave_out=unreadable == "leave out", where=fspath(path))
    kind = detect(source)
    if kind == "counts":
        return read_counts(source)
    if kind == "imatrix":
        return imatrix_counts(source)
    if kind == "recorder" and not recorder.has_tokens(source, read_torch_file(source)):
        return recorder.recorder_counts(source)
    folder = Path(tempfile.mkdtemp(prefix="moetrace-"))
    try:
        out = folder / f"{source.stem}.moet"
        imported = import_trace(source, out, format=kind, as_published=as_published)
        trace = open_trace(imported.path, context, model)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # what is mapped stays readable after the files are gone
    weakref.finalize(trace, shutil.rmtree, folder, ignore_errors=True)
    return trace


def import_trace(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str | None = None,  # noqa: A002  (the option's name)
    n_expert: int | None = None,
    n_expert_used: int | None = None,
    label: str = "",
    as_published: bool = False,
    trace: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write a foreign recording as a trace.

    Parameters
    ----------
    source
        The file or folder.
    out
        The trace's folder, made here.
    format
        One of ``FORMATS`` but ``counts``; by default :func:`detect` finds it.
    n_expert
        Experts of each layer. By default the highest id seen + 1, and ``missing`` says so: an expert beyond
        it that was never chosen is then unseen, not unused.
    n_expert_used
        Experts per token, for ``token-json`` (default 4), ``expert-log`` (default: the fewest on a line; where
        each line has one, it must be given) and ``router-logits`` (must be given).
    label
        Domain of the requests of a log or of OLMoE's lines; by default their own, or the file's name.
    as_published
        Keep what published analyses counted: warm-up rows cut to k, and the last layer's records of a prompt
        given to its last rows. ``import`` in the trace's meta.json tells.
    trace
        Which trace of a lake: its name or key; by default the only one.
    progress
        Called with the rows written so far.

    Raises
    ------
    InputError
        Malformed: file, line and field. No trace is left then.
    UsageError
        An unknown format, or a count table, which has no tokens.
    MoetraceError
        If ``out`` exists or cannot be written.
    """
    source_, out_ = Path(source), Path(out)
    kind = format or detect(source_)
    if kind in ("counts", "imatrix"):
        raise UsageError(
            f"{source_} is a count table: it has no tokens and cannot become a trace",
            fix="read it with moetrace.open(...), which gives its counts by domain, layer and expert",
        )
    if kind not in FORMATS:
        raise UsageError(f"there is no format {kind!r}", fix=f"choose one of: {', '.join(FORMATS)}")
    if kind == "lake":
        key = lake.choose(source_, trace)
        with _making(out_):
            return Imported(out_, kind, *lake.write_from_lake(source_, key, out_), (), Tally())
    if kind == "long-form":
        file = long_form.read_long_form(source_)
        told = _Facts(kind, source_, file.shape, n_expert, as_published=False, predicted=False)
        with _making(out_):
            written = _write_tokens(out_, told, file, progress)
        return Imported(out_, kind, *written, told.missing, Tally())
    shape, pieces, tally = _read(kind, source_, n_expert_used, label, as_published)
    if (n_expert or shape.n_expert or shape.n_expert_seen) < shape.n_expert_seen:
        raise InputError(
            f"{source_}: expert_ids: {shape.n_expert_seen - 1} is no expert of {n_expert or shape.n_expert}",
            fix=f"give --n-expert {shape.n_expert_seen} or more",
        )
    facts = _Facts(kind, source_, shape, n_expert, as_published, predicted=kind == "olmoe")
    with _making(out_):
        n_rows, n_requests = _write(out_, facts, pieces, tally, progress)
        if n_rows == 0:
            raise InputError(
                f"{source_} holds no routing",
                why=f"all {tally.rows_all_experts} rows are of passes that ran every expert, as llama.cpp's "
                "warm-up does",
                fix="to count them all the same, give --as-published",
            )
    return Imported(out_, kind, n_rows, n_requests, facts.missing, tally)


@contextlib.contextmanager
def _making(out: Path) -> Iterator[None]:
    """Make a folder, which goes again if what fills it fails."""
    try:
        out.mkdir(parents=True)
    except OSError as e:
        raise disk_error(out, e) from e
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


#: formats that say all of themselves
_PLAIN: dict[str, Any] = {
    "olmoe": olmoe,
    "route-trace": route_trace,
    "fingerprint": fingerprint,
    "routed-experts": arrays,
    "recorder": recorder,
    "position-log": positions,
}


def _read(
    kind: str, source: Path, n_expert_used: int | None, label: str, as_published: bool
) -> tuple[Shape, Iterator[Piece], Tally]:
    tally = Tally()
    if kind == "token-json":
        if not token_json.find(source):
            raise InputError(
                f"{source} has no token-NNNNN.json", fix="give the folder that holds the domains"
            )
        shape = token_json.shape(source, n_expert_used or TOKEN_JSON_USED)
        return shape, token_json.pieces(source, shape, tally, as_published=as_published), tally
    if kind in _PLAIN:
        importer = _PLAIN[kind]
        shape = importer.shape(source)
        return shape, importer.pieces(source, shape, tally, label=label), tally
    if kind == "router-logits":
        shape = router_logits.shape(source, n_expert_used)
        return shape, router_logits.pieces(source, shape, tally, label=label), tally
    if kind == "expert-log":
        shape = logs.expert_shape(source, n_expert_used)
        return shape, logs.expert_pieces(source, shape, tally, label=label, as_published=as_published), tally
    shape = logs.gate_shape(source)
    return shape, logs.gate_pieces(source, shape, tally, label=label, as_published=as_published), tally


@dataclass(frozen=True)
class _Facts:
    """What the JSON files of the trace say."""

    kind: str
    source: Path
    shape: Shape
    n_expert: int | None
    as_published: bool
    predicted: bool

    @property
    def missing(self) -> tuple[str, ...]:
        shape = self.shape
        lacks = {
            "experts": not shape.n_expert_used,
            "weights": not shape.weights,
            **{name: name not in shape.knows for name in ("token", "position", "phase", "time")},
            "n_expert": not (self.n_expert or shape.n_expert),
            "loss": not shape.says_loss,
        }
        return tuple(name for name, lacking in lacks.items() if lacking)

    def context(self) -> dict[str, Any]:
        n_layers, shape = len(self.shape.layers), self.shape
        n_expert = self.n_expert or shape.n_expert or shape.n_expert_seen
        fields: list[dict[str, Any]] = [{"name": "state", "dtype": "|u1", "shape": [n_layers]}]
        if shape.n_expert_used:
            dtype = "|u1" if n_expert <= 255 else "<u2"
            fields.append({"name": "experts", "dtype": dtype, "shape": [n_layers, shape.n_expert_used]})
        if shape.weights:
            fields.append({"name": "weights", "dtype": "<f4", "shape": [n_layers, shape.n_expert_used]})
        if shape.n_embd:
            fields.append({"name": "gate_input", "dtype": "<f4", "shape": [n_layers, shape.n_embd]})
        if self.predicted:
            fields.append({"name": PREDICTED, "dtype": "<f4", "shape": [1]})
        return {
            "name": "ctx0",
            "role": "main",
            "pid": 0,
            "collector": "import",
            "channels": [f["name"] for f in fields if f["name"] in ("experts", "weights", "gate_input")],
            "model": {
                "name": "",
                "architecture": "",
                "description": "",
                "n_embd": shape.n_embd,
                **shape.model,
            },
            **({"expert_bytes": list(shape.expert_bytes)} if shape.expert_bytes else {}),
            "layers": list(shape.layers),
            "n_expert": [n_expert] * n_layers,
            "n_expert_used": [shape.n_expert_used] * n_layers,
            "consumers": [CONSUMERS] * n_layers,
            "fields": fields,
            "epoch_ns": 0,
            "status": "",
        }

    def meta(self, tally: Tally) -> dict[str, Any]:
        from moetrace import __version__

        return {
            "format": FORMAT,
            "version": list(VERSION),
            "created_ns": time.time_ns(),
            "moetrace": __version__,
            "command": ["moetrace", "import", fspath(self.source)],
            "host": "",
            "state": "live",
            "contexts": ["ctx0"],
            "model_path": None,
            "import": {
                "format": self.kind,
                "as_published": self.as_published,
                "missing": list(self.missing),
                **asdict(tally),
            },
        }


@dataclass
class _Request:
    """One request while its pieces come."""

    number: int
    name: str
    label: str
    first_serial: int
    start_ns: int
    last_serial: int = 0
    end_ns: int = 0
    n_prefill: int = 0
    n_decode: int = 0
    n_lost: int = 0


def _write(
    out: Path, facts: _Facts, pieces: Iterator[Piece], tally: Tally, progress: Progress | None
) -> tuple[int, int]:
    """Write all tables; gives the numbers of rows and requests."""
    context = facts.context()
    layout = Layout.from_context(context)
    n_rows = n_serials = n_requests = n_steps = 0
    current: _Request | None = None
    with (
        TableWriter.create(out / "ctx0" / "rows", layout.row_columns) as rows,
        TableWriter.create(out / "ctx0" / "events", layout.event_columns),
        TableWriter.create(out / "requests", REQUEST_TABLE) as requests,
    ):
        row_bytes = sum(
            np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in layout.row_columns.values()
        )
        for piece in merged(pieces, BLOCK_BYTES // 8):
            n = len(piece.state)
            if current is None or piece.request != current.name:
                if current is not None:
                    _end(requests, current)
                start = int(piece.time_ns[0])
                current = _Request(n_requests, piece.request, piece.label, n_serials + piece.skipped, start)
                said = {"request": n_requests, "id": piece.request, "label": piece.label, "prompt": None}
                append_labels(out, [said | ({"extra": dict(piece.extra)} if piece.extra else {})])
                n_requests += 1
            else:
                current.n_lost += piece.skipped
            n_serials += piece.skipped
            serial = np.arange(n_serials, n_serials + n)
            # a new ubatch begins where the row does not rise, and with each piece
            step = n_steps + np.cumsum(np.diff(piece.row, prepend=-1) <= 0)
            rows.append(_columns(piece, layout, serial, step, current.number))
            current.last_serial, current.end_ns = int(serial[-1]), int(piece.time_ns[-1])
            current.n_prefill += int((piece.phase == PREFILL).sum())
            current.n_decode += int((piece.phase == DECODE).sum())
            n_rows, n_serials, n_steps = n_rows + n, n_serials + n, int(step[-1]) + 1
            if rows.unsealed * row_bytes >= BLOCK_BYTES:
                rows.seal()
            if progress is not None:
                progress(n_rows)
        if current is not None:
            _end(requests, current)
        rows.seal()
        requests.seal()
    _close(out, facts, context, tally, n_serials, n_rows, n_steps)
    return n_rows, n_requests


def _write_tokens(
    out: Path, facts: _Facts, file: long_form.LongFormFile, progress: Progress | None
) -> tuple[int, int]:
    """Write the tables of a file whose requests lie between each other; gives the numbers of rows and requests.

    Serials stay where those that are missing were lost; of a part of a trace they are counted anew.
    """
    described = file.described
    produced = None if described is None else described.produced
    context = facts.context()
    if described is not None:
        context |= {name: list(getattr(described, name)) for name in ("n_expert", "n_expert_used")}
    layout = Layout.from_context(context)
    told = {} if described is None else described.requests
    known = {row[0]: dict(zip(told, row, strict=True)) for row in zip(*told.values(), strict=True)}
    append_labels(
        out,
        [
            {"request": n, "prompt": None}
            | ({} if label is None else {"label": label})
            | ({} if (given := known.get(n, {}).get("id")) is None else {"id": given})
            for n, label in sorted(file.labels.items())
        ],
    )
    n_rows = n_steps = n_serials = 0
    totals: dict[int, list[int]] = {}  # request -> first and last serial, prefill, decode
    with (
        TableWriter.create(out / "ctx0" / "rows", layout.row_columns) as rows,
        TableWriter.create(out / "ctx0" / "events", layout.event_columns),
        TableWriter.create(out / "requests", REQUEST_TABLE) as requests,
    ):
        for piece in file.tokens():
            n = len(piece.serial)
            serial = n_rows + np.arange(n) if produced is None else piece.serial
            # what was computed together is not known: prompts' tokens that follow each other count as that
            goes_on = (
                (np.diff(piece.request) == 0) & (np.diff(piece.position) == 1) & (piece.phase[1:] == PREFILL)
            )
            step = n_steps + np.cumsum(np.append(True, ~goes_on)) - 1
            starts = np.flatnonzero(np.append(True, ~goes_on))
            row = np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))
            rows.append(
                _columns(
                    Piece(
                        "", "", np.asarray(file.shape.layers), piece.state, piece.experts, None, piece.token,
                        piece.position, None, np.full(n, -1), piece.phase.astype(np.uint8), row,
                        weights=piece.weights,
                    ),
                    layout, serial, step, piece.request,
                )
            )  # fmt: skip
            for number in np.unique(piece.request).tolist():
                mine = piece.request == number
                total = totals.setdefault(number, [int(serial[mine][0]), 0, 0, 0])
                total[1] = int(serial[mine][-1])
                total[2] += int((piece.phase[mine] == PREFILL).sum())
                total[3] += int((piece.phase[mine] == DECODE).sum())
            n_rows, n_steps, n_serials = n_rows + n, int(step[-1]) + 1, int(serial[-1]) + 1
            if rows.unsealed * sum(a.nbytes for a in vars(piece).values()) // n >= BLOCK_BYTES:
                rows.seal()
            if progress is not None:
                progress(n_rows)
        totals.pop(-1, None)
        for number, (first, last, n_prefill, n_decode) in sorted(totals.items()):
            said = {name: known.get(number, {}).get(name) for name in OF_REQUEST}
            _end(
                requests,
                _Request(number, "", "", first, -1, last, -1, n_prefill, n_decode),
                {
                    "sequence" if name == "slot" else name: value
                    if value is not None
                    else -(name != "n_lost")
                    for name, value in said.items()
                },
            )
        rows.seal()
        requests.seal()
    _close(out, facts, context, Tally(), max(n_serials, produced or 0), n_rows, n_steps)
    return n_rows, len(totals)


def _close(
    out: Path, facts: _Facts, context: dict[str, Any], tally: Tally, n_serials: int, n_rows: int, n_steps: int
) -> None:
    """Write what the tables were written for."""
    # rows that the source numbers but does not hold count as produced and lost
    context["counters"] = dict.fromkeys(COUNTERS, 0) | {
        "rows_produced": n_serials,
        "rows_committed": n_rows,
        "rows_lost_error": n_serials - n_rows,
        "rows_warmup": tally.rows_all_experts,
        "batches": n_steps,
        "graphs": n_steps,
    }
    write_json(out / "ctx0" / CONTEXT_NAME, context)
    write_json(out / META_NAME, facts.meta(tally))
    TraceStore(out).close_as("closed", exit_code=0)


def _columns(
    piece: Piece,
    layout: Layout,
    serial: NDArray[np.int64],
    step: NDArray[np.int64],
    request: int | NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    n = len(serial)
    columns: dict[str, NDArray[Any]] = {
        "serial": serial,
        "time_ns": piece.time_ns,
        "step": step,
        "batch": step,
        "token": piece.token,
        "position": piece.position,
        "sequence": np.full(n, -1),
        "n_sequences": np.ones(n),
        "flags": np.zeros(n),
        "row": piece.row,
        "phase": piece.phase,
        "request": np.full(n, request),
        "state": piece.state,
    }
    if piece.experts is not None:
        columns["experts"] = np.where(piece.experts < 0, layout.sentinel, piece.experts)
    if "weights" in layout.row_columns:
        columns["weights"] = np.full(piece.state.shape, np.nan) if piece.weights is None else piece.weights
    if piece.gate_input is not None:
        columns["gate_input"] = piece.gate_input
    if PREDICTED in layout.row_columns:
        known = np.full(n, np.nan) if piece.predicted is None else piece.predicted
        columns[PREDICTED] = known[:, None]
    return {name: columns[name].astype(dtype) for name, (dtype, _) in layout.row_columns.items()}


def _end(requests: TableWriter, request: _Request, known: Mapping[str, int] | None = None) -> None:
    values = asdict(request) | {
        "request": request.number,
        "context": 0,
        "sequence": -1,
        "n_cached": -1,
        "n_rejected": 0,
        "n_shifts": 0,
        "n_recomputed": 0,
        "n_undecided": 0,
        "n_unrecorded": 0,
        "n_events_lost": 0,
        **(known or {}),
    }
    requests.append({name: np.array([values[name]], dtype) for name, (dtype, _) in REQUEST_TABLE.items()})
