"""A model file cut into parts, as gguf-py and llama.cpp publish large ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from moetrace.model.file import ModelFile


def in_parts(source: Path, folder: Path, max_tensors: int) -> list[Path]:
    """Write the model again in ``folder``, so many tensors to a part; gives the parts in order."""
    folder.mkdir()
    with ModelFile(source) as model:
        writer = gguf.GGUFWriter(folder / source.name, model.architecture, split_max_tensors=max_tensors)
        for field in model.fields:
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        for name in model.tensor_names:
            data, kind = model.stored(name)
            writer.add_tensor(name, np.array(data), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return sorted(folder.glob("*.gguf"))
