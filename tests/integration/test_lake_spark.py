"""The documented SQL in PySpark. Skipped, saying so, where it, or Java, is not there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import lakes
import traces
from rings import make_layout

import moetrace
from moetrace.analysis import from_trace
from moetrace.trace.jsonfile import read_json, write_json

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_the_documented_questions_in_spark(tmp_path: Path) -> None:
    sql = pytest.importorskip("pyspark.sql", reason="no PySpark: pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    layout = make_layout(layers=(0, 1, 4), n_expert=(8, 16, 12), k=(2, 4, 3))
    paths = []
    for i in range(2):
        paths.append(traces.labelled_trace(tmp_path / f"s{i}.moet", ("a", "b", "c"), layout=layout, seed=i))
        meta = read_json(paths[i] / "meta.json")
        write_json(paths[i] / "meta.json", {**meta, "created_ns": meta["created_ns"] + i})
    lakes.fill(tmp_path / "lake", paths)
    spark = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        for statement in lakes.statements(lakes.documented()["spark"], tmp_path / "lake"):
            spark.sql(statement)
        with moetrace.open(paths[0]) as a, moetrace.open(paths[1]) as b:
            lakes.check(lambda text: spark.sql(text).toPandas(), from_trace(a, b))
    finally:
        spark.stop()
