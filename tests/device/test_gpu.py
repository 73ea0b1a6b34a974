"""The GPU that llama.cpp was built for, where ``MOETRACE_TEST_GPU=1`` says that there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checks import DEFAULT, PLACEMENTS, WIDE
from devices import run_host
from identities import prompts_of_mixed_length
from real import check_architecture
from running import MOE
from served import SERVER_PLACEMENTS, answers_of, check_overlap, check_served, untraced_answers

import moetrace
from moetrace.host.client import drive
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.verify import verify

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.slow,
    pytest.mark.host("CUDA"),
    pytest.mark.skipif(not os.environ.get("MOETRACE_TEST_GPU"), reason="MOETRACE_TEST_GPU is not set"),
]

SERVED = [
    pytest.param(name, placement, id=f"{name}-{placement}")
    for i, name in enumerate(name for name in MOE if not ARCHITECTURES[name].encoder)
    for placement in ("all", list(SERVER_PLACEMENTS)[1 + i % 4])
]


def arguments_of(placement: str, n_parallel: int) -> list[str]:
    shape = ["-np", str(n_parallel), "-c", str(2048 * n_parallel), "-ub", "48", "-t", "1"]
    return [*shape, *SERVER_PLACEMENTS[placement]]


@pytest.mark.parametrize("name", MOE)
def test_what_is_recorded_is_right_and_nothing_is_changed(
    name: str, runtime: Any, model_file: Any, tmp_path: Path
) -> None:
    check_architecture(
        name, model_file(name), tmp_path, run_host, kinds={**DEFAULT, **WIDE}, placements=tuple(PLACEMENTS)
    )


@pytest.mark.parametrize(("name", "placement"), SERVED)
def test_every_row_belongs_to_its_request(
    name: str, placement: str, runtime: Any, model_file: Any, tmp_path: Path
) -> None:
    path, prompts = tmp_path / "t.moet", prompts_of_mixed_length(20, seed=len(name))
    program = str(runtime.tool("llama-server"))
    with moetrace.serve(
        model_file(name), output=path, arguments=arguments_of(placement, 4), program=program
    ) as server:
        answers = drive(server.client, prompts)
        server.label([answer.label_line() for answer in answers])
    check_overlap(check_served(path, answers))


@pytest.mark.parametrize(("name", "placement"), SERVED)
def test_the_server_says_what_it_says_untraced(
    name: str, placement: str, runtime: Any, model_file: Any, tmp_path: Path
) -> None:
    """Fifty greedy answers: each token and the probabilities of the likeliest, to the last digit."""
    program, arguments = str(runtime.tool("llama-server")), arguments_of(placement, 1)
    command = [program, "-m", str(model_file(name)), *arguments]
    untraced, again = untraced_answers(command, n=50), untraced_answers(command, n=50)
    with moetrace.serve(
        model_file(name), output=tmp_path / "t.moet", arguments=arguments, program=program
    ) as server:
        traced = answers_of(server.client, 50)
    if untraced != again:
        pytest.skip("without the tracer, too, this server's answers differ from one start to the next")
    assert traced == untraced
    assert verify(tmp_path / "t.moet").exit_code == 0
    assert moetrace.open(tmp_path / "t.moet").loss.lost == 0
