"""Recordings of other programs, read as traces.

:func:`open_source` (``moetrace.open``) reads a trace or any of these; :func:`import_trace` makes a trace of
one:

================== =================================================================================
``token-json``     folders ``DOMAIN/traces/token-NNNNN.json``, one file per token (:mod:`.token_json`)
``expert-log``     lines ``layer_id,expert_ids`` (:mod:`.logs`)
``gate-log``       lines ``gate_input,layer_id,token_id,values`` (:mod:`.logs`)
``route-trace``    ``route_trace v1`` of engines that keep experts on flash (:mod:`.route_trace`)
``olmoe``          JSON lines with ``input_ids`` and ``exp_ids[token][k][layer]`` (:mod:`.olmoe`)
``fingerprint``    JSON with ``router_data`` (:mod:`.fingerprint`)
``routed-experts`` arrays (tokens, layers, k), ``.npy``, ``.npz`` or JSON lines (:mod:`.arrays`)
``router-logits``  logits (tokens, experts) of each layer, ``.npz`` (:mod:`.router_logits`)
``recorder``       SGLang's expert distribution recorder, ``.pt`` (:mod:`.recorder`)
``position-log``   lines ``pos,layer,id0,id1,…`` (:mod:`.positions`)
``lake``           a folder of Parquet files that ``moetrace export`` wrote (:mod:`.lake`)
``long-form``      Parquet, Arrow and CSV files that ``moetrace export`` wrote (:mod:`.long_form`)
``counts``         CSV ``domain,layer_id,expert_id,count``, or a matrix (:mod:`.counts`): arrays, not a trace
``imatrix``        files of llama-imatrix (:mod:`moetrace.model.imatrix`): arrays, not a trace
================== =================================================================================

Sources are read twice, once for their shape and once for their rows; memory does not grow with them.
"""

from moetrace.trace.importers.counts import CountTable, read_counts
from moetrace.trace.importers.writer import DESCRIBED, FORMATS, Imported, detect, import_trace, open_source

__all__ = [
    "DESCRIBED",
    "FORMATS",
    "CountTable",
    "Imported",
    "detect",
    "import_trace",
    "open_source",
    "read_counts",
]
