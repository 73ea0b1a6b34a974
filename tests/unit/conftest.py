"""What the unit tests share."""

from __future__ import annotations

import importlib.util
import struct
import sys
import types

if importlib.util.find_spec("moetrace._native") is None:
    # The native module is not built here (a bare checkout). Its four functions on one thread are these;
    # tests that need the real ones say so with `needs_native`.
    stand_in = types.ModuleType("moetrace._native")

    def _load(code: str):
        def load(buffer: object, offset: int) -> int:
            return struct.unpack_from(code, buffer, offset)[0]  # type: ignore[arg-type]

        return load

    def _store(code: str):
        def store(buffer: object, offset: int, value: int) -> None:
            struct.pack_into(code, buffer, offset, value)  # type: ignore[arg-type]

        return store

    stand_in.load_acquire = _load("<Q")  # type: ignore[attr-defined]
    stand_in.store_release = _store("<Q")  # type: ignore[attr-defined]
    stand_in.load_acquire32 = _load("<I")  # type: ignore[attr-defined]
    stand_in.store_release32 = _store("<I")  # type: ignore[attr-defined]
    stand_in.__doc__ = "stand-in"
    sys.modules["moetrace._native"] = stand_in
