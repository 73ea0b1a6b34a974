"""Traces in an S3 store. Skipped, saying so, where moto (a server of it) or s3fs is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import traces

import moetrace

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_traces_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server", reason="no moto: pip install 'moto[server]' s3fs")
    s3fs = pytest.importorskip("s3fs", reason="no s3fs: pip install s3fs")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        files = s3fs.S3FileSystem()
        files.mkdir("fleet")
        for i, name in enumerate(("a", "b")):
            path = traces.labelled_trace(tmp_path / f"{name}.moet", seed=i)
            files.put(str(path), f"fleet/monday/{name}.moet", recursive=True)
        for where in ("s3://fleet/monday", "s3://fleet/*/*.moet"):
            with moetrace.open(where) as found:
                assert found.names == ("a", "b")
                with moetrace.open(tmp_path / "b.moet") as own:
                    assert found[1].experts.tobytes() == own.experts.tobytes()
    finally:
        running.stop()
