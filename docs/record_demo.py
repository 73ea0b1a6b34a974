"""Record the trace that moetrace ships: ``python docs/record_demo.py`` writes moetrace/data/demo.moet.tar.xz.

What `moetrace demo` records, with experts and weights; what names the machine is taken out.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from moetrace import data
from moetrace.host.prompts import read_prompts
from moetrace.host.recording import record
from moetrace.trace.jsonfile import read_json, write_json
from moetrace.trace.verify import verify


def main() -> None:
    """Record, take out what names the machine, and pack."""
    model = data.demo_model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.moet"
        record(
            model,
            read_prompts(data.prompts("domains")),
            path,
            n_predict=32,
            arguments=["-np", "4", "-c", "2048"],
            channels=["experts", "weights"],
        )
        for file in (path / "meta.json", path / "ctx0" / "context.json"):
            facts = read_json(file)
            facts.pop("crc", None)
            if "command" in facts:
                facts["command"] = [Path(word).name if "/" in word else word for word in facts["command"]]
            if "model_files" in facts:
                facts |= {"model_files": [model.name], "pid": 0}
            write_json(file, facts | {"model_path": model.name})
        assert verify(path).findings == ()
        out = Path(data.__file__).parent / "demo.moet.tar.xz"
        with tarfile.open(out, "w:xz", preset=9) as archive:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                entry = tarfile.TarInfo(str(file.relative_to(path.parent)))
                content = file.read_bytes()
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    print(f"Wrote {out} ({out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
