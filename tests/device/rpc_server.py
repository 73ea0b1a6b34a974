"""Serve this machine's CPU as a device of llama.cpp's RPC backend, as its rpc-server does, until killed.

GGML_BACKEND_PATH=libggml-rpc.so python rpc_server.py LIBRARIES PORT
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def main(libraries: str, port: str) -> None:
    base = ctypes.CDLL(str(Path(libraries) / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(Path(libraries) / "libggml.so"), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all()
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    found = base.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_reg_by_name(b"RPC"), b"ggml_backend_rpc_start_server"
    )
    kind = ctypes.CFUNCTYPE(
        None,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    )
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_name(b"CPU"))
    kind(found)(f"127.0.0.1:{port}".encode(), None, 1, 1, devices)


if __name__ == "__main__":
    main(*sys.argv[1:])
