"""llama.cpp in this process: a model, a context, batches of several sequences. Thin over llama_cpp's C API.

The calls that say whose tokens are computed go through the tracer's library, as llama-server's do, so that
rows find their sequence in the same way.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import MoetraceError, RuntimeMissingError, UsageError
from moetrace.host.runtime import is_preloaded, load_tracer, preload_path

_tracer: ctypes.CDLL | None = None
_started = False


#: the newest of the functions used: of January and June 2025
_NEEDED = ("llama_model_load_from_file", "llama_get_memory")


def tracer() -> ctypes.CDLL:
    """Load the tracer's library in front of llama.cpp's, once per process.

    Raises
    ------
    RuntimeMissingError
        If ``llama_cpp`` was imported before: its calls are bound by then and cannot be seen any more.
    """
    global _tracer
    if _tracer is None:
        if "llama_cpp" in sys.modules and not is_preloaded():
            raise RuntimeMissingError(
                "llama_cpp was imported before moetrace's tracer",
                why="its calls are bound already, so the tracer would see none of them",
                fix="call moetrace.capture() before anything imports llama_cpp, or start Python with "
                f"LD_PRELOAD={preload_path()}",
            )
        _tracer = load_tracer(ctypes.RTLD_GLOBAL)
        _tracer.moetrace_symbol.restype = ctypes.c_void_p
    return _tracer


def start(settings: Mapping[str, str]) -> None:
    """Start tracing in this process with the keys of csrc/config.h; no graph may be under way.

    Raises
    ------
    MoetraceError
        If a value is refused, or this process is being traced already.
    """
    global _started
    if _started:
        raise MoetraceError(
            "this process is recording already", why="it has one tracer", fix="end the other recording first"
        )
    text = "\n".join(f"{key}={value}" for key, value in settings.items() if value)
    error = ctypes.create_string_buffer(512)
    if tracer().moetrace_start(text.encode(), error, ctypes.c_size_t(len(error))) != 0:
        raise MoetraceError("the tracer refused its settings", why=error.value.decode())
    _started = True


def stop() -> None:
    """Stop tracing and close the rings."""
    global _started
    tracer().moetrace_stop()
    _started = False


def intervene(number: int) -> None:
    """Put intervention ``number`` of the trace (csrc/intervene.h) in force from the next graph on; 0: none."""
    tracer().moetrace_intervene(ctypes.c_uint32(number))


def _has(params: ctypes.Structure, name: str) -> bool:
    """Whether llama.cpp's structure has the field; ctypes would take any name and forget it."""
    return name in (field[0] for field in params._fields_)


def python_binding() -> Any:
    """Give llama-cpp-python's module of llama.cpp's functions, loaded behind the tracer. Raises RuntimeMissingError."""
    tracer()
    try:
        import llama_cpp.llama_cpp as api
    except ImportError as e:
        raise RuntimeMissingError(
            "llama-cpp-python is not installed",
            why=str(e),
            fix="install the pinned runtime with `moetrace setup`",
        ) from e
    except (OSError, RuntimeError) as e:
        raise RuntimeMissingError(
            "llama-cpp-python cannot load llama.cpp", why=str(e), fix="reinstall it"
        ) from e
    absent = [name for name in _NEEDED if not hasattr(api, name)]
    if absent:
        raise RuntimeMissingError(
            f"this llama-cpp-python ({sys.modules['llama_cpp'].__version__}) is too old to run prompts in-process",
            why=f"it has no {absent[0]}",
            fix="install the pinned runtime with `moetrace setup`, or record that release's llama-server with "
            "`moetrace run`",
        )
    return api


def check_sizes(*, n_ctx: int, n_seq: int, n_batch: int, n_ubatch: int) -> None:
    """Refuse sizes of a context for which llama.cpp would end the process.

    Raises
    ------
    UsageError
        If a size is none, or there are more sequences than a batch holds: each needs a place in it.
    """
    sizes = {"n_ctx (-c)": n_ctx, "n_batch (-b)": n_batch, "n_ubatch (-ub)": n_ubatch, "n_seq (-np)": n_seq}
    for name, size in sizes.items():
        if not 1 <= size < 1 << 31:
            raise UsageError(f"{name} is {size}", fix=f"give 1 to {(1 << 31) - 1}")
    if n_seq > min(n_batch, n_ctx):
        raise UsageError(
            f"{n_seq} sequences at once do not fit into a batch of {min(n_batch, n_ctx)} tokens",
            why="each needs a token's place in it",
            fix=f"lower -np, or give -b and -c at least {n_seq}",
        )


class Llama:
    """A model and one context of it.

    Parameters
    ----------
    model
        GGUF file.
    n_ctx
        Positions of the context, shared by all sequences.
    n_seq
        Sequences at once.
    n_batch, n_ubatch, n_threads, n_gpu_layers, flash_attention, overrides
        As llama.cpp's ``-b``, ``-ub``, ``-t``, ``-ngl``, ``-fa`` and ``--override-kv`` (numbers only).
    n_cpu_moe
        Keep the experts of the first so many layers in the CPU's memory, as ``--n-cpu-moe``; -1: of all.
    repack
        Whether llama.cpp may lay out quantised weights anew for the CPU; False as ``--no-repack``.
    eval_callback
        A graph-evaluation callback of the caller's own and its user data, as llama.cpp's ``cb_eval``; tracing
        chains it.
    verbose
        Show llama.cpp's log on standard error.

    Attributes
    ----------
    n_batch
        Tokens that one batch holds: what was asked for, or the whole context if that is less.

    Raises
    ------
    UsageError
        If the sizes make no sense (:func:`check_sizes`).
    MoetraceError
        If the model cannot be loaded or the context cannot be made.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_ctx: int = 4096,
        n_seq: int = 1,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        flash_attention: bool | None = None,
        n_cpu_moe: int = 0,
        repack: bool = True,
        overrides: Mapping[str, int] | None = None,
        eval_callback: tuple[ctypes.c_void_p, ctypes.c_void_p] | None = None,
        verbose: bool = False,
    ) -> None:
        check_sizes(n_ctx=n_ctx, n_seq=n_seq, n_batch=n_batch, n_ubatch=n_ubatch)
        self._api = api = python_binding()
        self._model: Any = None
        self._ctx: Any = None
        self._log = api.llama_log_callback(lambda _level, text, _data: _print_log(text) if verbose else None)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        if not repack and _has(
            params, "use_extra_bufts"
        ):  # since July 2025; before, it was the build's choice
            params.use_extra_bufts = False
        if overrides:
            params.kv_overrides = self._overrides = _kv_overrides(api, overrides)
        if n_cpu_moe:
            self._placement = _experts_on_cpu(n_cpu_moe)
            params.tensor_buft_overrides = ctypes.cast(self._placement, ctypes.c_void_p)
        self._model = api.llama_model_load_from_file(os.fsencode(model), params)
        if not self._model:
            raise MoetraceError(
                f"llama.cpp cannot load {os.fspath(model)}",
                why="the file is missing, damaged or of an unknown architecture",
                fix="try it with llama-server, which says more",
            )
        context = api.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, n_batch, min(n_ubatch, n_batch)
        context.n_seq_max = n_seq
        if _has(context, "kv_unified"):  # before July 2025 it always was
            context.kv_unified = True
        context.n_threads = context.n_threads_batch = n_threads or min(os.cpu_count() or 1, 16)
        if flash_attention is not None:
            name = (
                "flash_attn_type" if _has(context, "flash_attn_type") else "flash_attn"
            )  # before September 2025
            setattr(context, name, int(flash_attention))
        if eval_callback is not None:
            function, context.cb_eval_user_data = eval_callback
            context.cb_eval = ctypes.cast(function, api.ggml_backend_sched_eval_callback)
        self._ctx = api.llama_init_from_model(self._model, context)
        if not self._ctx:
            self.close()
            raise MoetraceError(
                "llama.cpp cannot make a context",
                why="too little memory, or impossible sizes",
                fix="lower -c",
            )
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_batch = int(api.llama_n_batch(self._ctx))
        self._batch = api.llama_batch_init(self.n_batch, 0, 1)
        self.n_ctx = int(api.llama_n_ctx(self._ctx))
        self.n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        self._free = getattr(tracer(), "llama_free")  # noqa: B009
        self._decode = getattr(tracer(), "llama_decode")  # noqa: B009
        self._decode.argtypes = [api.llama_context_p_ctypes, api.llama_batch]
        self._decode.restype = ctypes.c_int32
        self._seq_rm = getattr(tracer(), "llama_memory_seq_rm")  # noqa: B009
        self._seq_rm.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self._seq_rm.restype = ctypes.c_bool
        self._logits_ith = getattr(tracer(), "llama_get_logits_ith")  # noqa: B009
        self._logits_ith.argtypes = [api.llama_context_p_ctypes, ctypes.c_int32]
        self._logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        self._free.argtypes = [api.llama_context_p_ctypes]
        self._free.restype = None

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Give the token ids of a text; special tokens written in it are recognised."""
        data = text.encode("utf-8")
        size = len(data) + 8
        tokens = (ctypes.c_int32 * size)()
        n = self._api.llama_tokenize(self._vocab, data, len(data), tokens, size, add_special, True)
        if n < 0:
            raise MoetraceError("llama.cpp cannot tokenize a prompt", why=f"it needs {-n} tokens")
        return list(tokens[:n])

    def piece(self, token: int) -> bytes:
        """Give the bytes of a token."""
        buffer = ctypes.create_string_buffer(256)
        n = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Apply the model's own chat template, with the opening of the assistant's turn.

        Raises
        ------
        MoetraceError
            If llama.cpp does not know the template.
        """
        api = self._api
        template = api.llama_model_chat_template(self._model, None)
        chat = (api.llama_chat_message * len(messages))(
            *(api.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in messages)
        )
        size = 4 * sum(len(m["content"]) + 64 for m in messages) + 4096
        buffer = ctypes.create_string_buffer(size)
        n = api.llama_chat_apply_template(template, chat, len(messages), True, buffer, size)
        if n < 0 or n > size:
            raise MoetraceError(
                "the model's chat template cannot be applied",
                why="llama.cpp's library knows only the common templates",
                fix="use `moetrace run` with llama-server, or prompts with `prompt` or `tokens`",
            )
        return buffer.raw[:n].decode("utf-8")

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def forget(self, sequence: int) -> None:
        """Empty a sequence."""
        self._seq_rm(self._api.llama_get_memory(self._ctx), sequence, -1, -1)

    def decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute one batch.

        Parameters
        ----------
        entries
            (token, position, sequence, output) of at most ``n_batch`` tokens. Logits exist afterwards for the
            entries with ``output``.

        Raises
        ------
        MoetraceError
            If llama.cpp fails; 1 means that the context is full.
        """
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, output) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = output
        code = self._decode(self._ctx, batch)
        if code != 0:
            raise MoetraceError(
                f"llama_decode failed with code {code}",
                why="the context is full" if code == 1 else "see llama.cpp's log (verbose)",
                fix="give a larger -c" if code == 1 else "try the same prompts with llama-server",
            )

    def logits(self, index: int) -> NDArray[np.float32]:
        """Give the logits of entry ``index`` of the last batch, to sample from: float32 (n_vocab,); a copy.

        To the recording the token that follows that entry counts as generated.
        """
        pointer = self._logits_ith(self._ctx, index)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def outputs(self, n: int) -> NDArray[np.float32]:
        """Give the logits of the last batch's ``n`` entries with ``output``, in their order.

        Returns
        -------
        float32 (n, n_vocab)
            A view of llama.cpp's memory: it holds until the next batch.
        """
        if n == 0:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._ctx), (n, self.n_vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the model's texts begin with a BOS token."""
        return bool(self._api.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        """The BOS token; -1 if there is none."""
        return int(self._api.llama_vocab_bos(self._vocab))

    def close(self) -> None:
        """Free the context and the model."""
        if self._ctx:
            self._api.llama_batch_free(self._batch)
            self._free(self._ctx)
            self._ctx = None
        if self._model:
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _print_log(text: bytes) -> None:
    sys.stderr.write(text.decode("utf-8", "replace"))


class _Placement(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _experts_on_cpu(n_layers: int) -> Any:
    # the patterns of llama.cpp's --cpu-moe and --n-cpu-moe; an array ended by a null pattern
    layers = [r"blk\.\d+"] if n_layers < 0 else [rf"blk\.{i}" for i in range(n_layers)]
    buffer_type = tracer().moetrace_symbol(b"ggml_backend_cpu_buffer_type")
    if not buffer_type:
        raise RuntimeMissingError("this llama.cpp has no function ggml_backend_cpu_buffer_type")
    cpu = ctypes.CFUNCTYPE(ctypes.c_void_p)(buffer_type)()
    entries = [
        _Placement(rf"{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode(), cpu) for layer in layers
    ]
    return (_Placement * (len(entries) + 1))(*entries)


def _kv_overrides(api: Any, overrides: Mapping[str, int]) -> Any:
    # an array ended by an empty key
    array = (api.llama_model_kv_override * (len(overrides) + 1))()
    for entry, (key, value) in zip(array, overrides.items(), strict=False):
        entry.key = key.encode()
        entry.tag = api.LLAMA_KV_OVERRIDE_TYPE_INT
        entry.value.val_i64 = value
    return array
