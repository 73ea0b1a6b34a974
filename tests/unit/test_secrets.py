"""Command lines without their secrets."""

from __future__ import annotations

import pytest

from moetrace.host.secrets import HIDDEN, redacted


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["llama-server", "--api-key", "S3CRET", "-np", "4"], ["llama-server", "--api-key", HIDDEN, "-np", "4"]),
        (["llama-server", "--api-key=S3CRET"], ["llama-server", f"--api-key={HIDDEN}"]),
        (["llama-server", "-hft", "S3CRET"], ["llama-server", "-hft", HIDDEN]),
        (["llama-server", "--hf-token", "S3CRET"], ["llama-server", "--hf-token", HIDDEN]),
        (["env", "LLAMA_API_KEY=S3CRET", "llama-server"], ["env", f"LLAMA_API_KEY={HIDDEN}", "llama-server"]),
        (["env", "API_KEY=a S3CRET", "llama-server"], ["env", f"API_KEY={HIDDEN}", "llama-server"]),
        (["x", "--password", "S3CRET", "--db_secret=S3CRET"], ["x", "--password", HIDDEN, f"--db_secret={HIDDEN}"]),
        (
            ["sh", "-c", "HF_TOKEN=S3CRET exec llama-server --verbose --api-key 'S3CRET S3CRET' -m x"],
            ["sh", "-c", f"HF_TOKEN={HIDDEN} exec llama-server --verbose --api-key {HIDDEN} -m x"],
        ),
        (["sh", "-c", 'llama-server --api-key="S3CRET"'], ["sh", "-c", f"llama-server --api-key={HIDDEN}"]),
        (["curl", "-H", "Authorization: Bearer S3CRET"], ["curl", "-H", f"Authorization: Bearer {HIDDEN}"]),
        (["llama-server", "-mu", "https://me:S3CRET@there/m.gguf"], ["llama-server", "-mu", f"https://me:{HIDDEN}@there/m.gguf"]),
    ],
)  # fmt: skip
def test_secrets_are_hidden(command: list[str], shown: list[str]) -> None:
    assert redacted(command) == shown
    assert "S3CRET" not in str(redacted(command))


def test_nothing_else_is() -> None:
    command = [
        *(
            "llama-server",
            "-m",
            "model.gguf",
            "--api-key-file",
            "keys.txt",
            "--ssl-key-file=key.pem",
            "-np",
            "4",
        ),
        *(
            "--keep",
            "3",
            "--cache-type-k",
            "q8_0",
            "--override-kv",
            "tokenizer.ggml.add_bos_token=bool:false",
        ),
        *("--host", "::1", "-p", "the key to it all"),
    ]
    assert redacted(command) == command
