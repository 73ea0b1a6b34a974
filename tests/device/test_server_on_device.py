"""llama-server on a device: four slots, overlapping requests, and a client that keeps the ids that it sent and got."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checks import FUSIONS, check_numbers
from devices import Setup
from identities import prompts_of_mixed_length
from running import MOE, ROUTER, ready_client
from served import SERVER_PLACEMENTS, answers_of, check_overlap, check_served, untraced_answers

import moetrace
from moetrace.host.client import drive
from moetrace.host.server import free_port
from moetrace.synthetic import ARCHITECTURES
from moetrace.trace.verify import verify

pytestmark = [pytest.mark.runtime, pytest.mark.host("device")]

PLACEMENTS = {**SERVER_PLACEMENTS, "layers": ["-ngl", "99", "-sm", "layer", "-ts", "1,1"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "tap": {"collector": "tap"},
    "callback": {"collector": "callback"},
    "tap-router": {"collector": "tap", "channels": ROUTER},
    "callback-router": {"collector": "callback", "channels": ROUTER},
    "attention": {"channels": "experts,weights,attention"},
    "named": {"channels": "experts,weights,tensor:ffn_moe_out-*"},
}
ORDERS = ("vulkan", "metal", "random:1", "random:2", "")


def arguments_of(placement: str, setup: Setup) -> list[str]:
    # naming the devices makes llama-server load the backend of GGML_BACKEND_PATH
    devices = ",".join(f"Test{i}" for i in range(setup.count))
    return ["-ub", "48", "-t", "1", "--device", devices, *PLACEMENTS[placement]]


def cases() -> list[Any]:
    out = [
        pytest.param("qwen3moe", "layers", "tap-router", Setup("metal", count=2), id="qwen3moe-layers-quick"),
        pytest.param(
            "olmoe", "some-experts", "auto", Setup("random:1", stream="lazy"), id="olmoe-some-quick"
        ),
    ]
    names = [name for name in MOE if not ARCHITECTURES[name].encoder]
    for i, name in enumerate(names):  # every architecture, every option, placement and order with every other
        for j, option in enumerate(OPTIONS):
            placement = list(PLACEMENTS)[(i + j) % len(PLACEMENTS)]
            order = ORDERS[(i // 2 + j) % len(ORDERS)]
            setup = Setup(order, count=2 if placement == "layers" else 1, stream="lazy" if i % 2 else "50")
            out.append(
                pytest.param(
                    name,
                    placement,
                    option,
                    setup,
                    id=f"{name}-{placement}-{option}-{setup}",
                    marks=pytest.mark.slow,
                )
            )
    return out


@pytest.mark.parametrize(("name", "placement", "option", "setup"), cases())
def test_every_row_belongs_to_its_request(
    name: str,
    placement: str,
    option: str,
    setup: Setup,
    runtime: Any,
    device: Path,
    model_file: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, path = tmp_path / "counts.json", tmp_path / "t.moet"
    for variable, value in setup.environment(device, counts).items():
        monkeypatch.setenv(variable, value)
    prompts = prompts_of_mixed_length(20, seed=len(name))
    arguments = ["-np", "4", "-c", "8192", *arguments_of(placement, setup)]
    if option == "attention":
        arguments += ["-fa", "off"]
    program = str(runtime.tool("llama-server"))
    with moetrace.serve(
        model_file(name), output=path, arguments=arguments, program=program, **OPTIONS[option]
    ) as server:
        answers = drive(server.client, prompts)
        server.label([answer.label_line() for answer in answers])
    counted = json.loads(counts.read_text())
    assert counted["graphs"] > 0, "nothing was computed on the device"
    assert (counted["moved"] > 0) == bool(setup.order)
    trace = check_served(path, answers)
    check_overlap(trace)
    if option.endswith("router"):
        check_numbers(trace, name, model_file(name))


@pytest.mark.parametrize(
    ("name", "placement", "setup"),
    [
        pytest.param("gpt-oss", "all", Setup("vulkan"), id="gpt-oss-quick"),
        *(
            pytest.param(
                name, placement, Setup(order, count=2 if placement == "layers" else 1), marks=pytest.mark.slow
            )
            for i, name in enumerate(MOE)
            for placement, order in list(zip(PLACEMENTS, (*ORDERS, *ORDERS), strict=False))[i % 2 :: 2]
            if not ARCHITECTURES[name].encoder
        ),
    ],
)
def test_the_server_says_what_it_says_untraced(
    name: str,
    placement: str,
    setup: Setup,
    runtime: Any,
    device: Path,
    model_file: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Token by token and probability by probability, to the last digit, with as many fusions."""
    program = str(runtime.tool("llama-server"))
    arguments = ["-np", "1", "-c", "1024", *arguments_of(placement, setup)]

    def counted(label: str) -> dict[str, int]:
        said = json.loads((tmp_path / f"{label}.json").read_text())
        return {kind: said[kind] for kind in FUSIONS}

    environment = {**os.environ, **setup.environment(device, tmp_path / "plain.json")}
    untraced = untraced_answers([program, "-m", model_file(name), *arguments], environment)
    quick = setup == Setup("vulkan")
    for collector in ("auto",) if quick else ("tap", "callback"):
        for variable, value in setup.environment(device, tmp_path / f"{collector}.json").items():
            monkeypatch.setenv(variable, value)
        path = tmp_path / f"{collector}.moet"
        with moetrace.serve(
            model_file(name), output=path, arguments=arguments, program=program, collector=collector
        ) as server:
            traced = answers_of(server.client)
        assert traced == untraced, collector
        assert counted(collector) == counted("plain"), collector
        assert verify(path).exit_code == 0
        assert moetrace.open(path).loss.lost == 0


def test_tensors_that_are_split_over_devices_are_not_recorded_and_it_is_said(
    runtime: Any, device: Path, model_file: Any, tmp_path: Path
) -> None:
    """GIVEN -sm tensor, where each device has a piece of each THEN it answers as ever, and the reason is told."""
    setup = Setup(count=2)
    server = [
        str(runtime.tool("llama-server")),
        "-m",
        str(model_file("qwen3moe")),
        *arguments_of("layers", setup),
    ]
    server += ["-sm", "tensor", "-np", "1", "-c", "512", "-fa", "on"]
    environment = {**os.environ, **setup.environment(device, tmp_path / "counts.json")}
    said, answers = {}, {}
    for label in ("plain", "traced"):
        port = free_port()
        tracing = [sys.executable, "-m", "moetrace", "run", "-o", str(tmp_path / "t.moet"), "--"]
        command = [*(tracing if label == "traced" else []), *server, "--port", str(port)]
        with (tmp_path / f"{label}.log").open("w+") as log:
            host = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
            try:
                answers[label] = answers_of(ready_client(host, port, tmp_path / f"{label}.log"))
            except AssertionError:
                if label == "plain":
                    pytest.skip("llama.cpp does not split tensors over these devices")
                raise
            finally:
                host.terminate()
                host.wait(30)
        said[label] = (tmp_path / f"{label}.log").read_text()
    assert answers["traced"] == answers["plain"]
    assert "its tensors are split over several devices (-sm tensor); use -sm layer" in said["traced"]
    assert "refused what it saw" in said["traced"]
