"""Prompt files: JSON lines with ``prompt``, ``messages`` or ``tokens``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrace.errors import InputError

_KEYS = ("prompt", "messages", "tokens")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes
    ----------
    text, messages, tokens
        The input: plain text, chat messages (each with ``role`` and ``content``), or token ids. Exactly one is set.
    id
        Its name in the trace; by default its number.
    label
        What to group by, for example the domain.
    n_predict
        Tokens to generate; None: as the caller says.
    extra
        The line's other keys; kept with the label.
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    tokens: tuple[int, ...] | None = None
    label: str | None = None
    n_predict: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def _parse(item: Mapping[str, Any], number: int, where: str) -> Prompt:
    def bad(why: str, fix: str = "") -> InputError:
        return InputError(f"{where}: not a prompt", why=why, fix=fix or "see `moetrace drive --help` for the keys")

    given = [key for key in _KEYS if item.get(key) is not None]
    if len(given) != 1:
        raise bad(
            f"it has {' and '.join(given) or 'no input'}", f"give exactly one of {', '.join(_KEYS)}"
        )
    value = item[given[0]]
    prompt: dict[str, Any] = {}
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise bad("`prompt` is not a string")
        prompt["text"] = value
    elif given[0] == "messages":
        if not isinstance(value, list) or not value or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        ):
            raise bad("`messages` is not a list of objects with `role` and `content`")
        prompt["messages"] = tuple(value)
    else:
        if not isinstance(value, list) or not value or not all(type(t) is int and t >= 0 for t in value):
            raise bad("`tokens` is not a list of token ids")
        prompt["tokens"] = tuple(value)
    label, n_predict = item.get("label"), item.get("n_predict")
    if label is not None and not isinstance(label, str):
        raise bad("`label` is not a string")
    if n_predict is not None and (type(n_predict) is not int or n_predict < 0):
        raise bad("`n_predict` is not a whole number")
    extra = {k: v for k, v in item.items() if k not in (*_KEYS, "id", "label", "n_predict")}
    return Prompt(id=str(item.get("id", number)), label=label, n_predict=n_predict, extra=extra, **prompt)


def read_prompts(source: str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]) -> list[Prompt]:
    """Read prompts from a JSON-lines file, or from a list of strings or of dicts with the same keys.

    Raises
    ------
    InputError
        If the file cannot be read, or a line is no prompt; names the file, the line and the key.
    """
    if not isinstance(source, (str, os.PathLike)):
        items: Iterable[Any] = source
        return _all(
            (f"prompt {i}", {"prompt": item} if isinstance(item, str) else item) for i, item in enumerate(items)
        )
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the prompts {path}", why=str(e), fix="give a file of JSON lines") from e

    def lines() -> Iterable[tuple[str, Any]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as e:
                raise InputError(f"{where}: not JSON", why=str(e), fix="write one JSON object per line") from None

    return _all(lines())


def _all(items: Iterable[tuple[str, Any]]) -> list[Prompt]:
    prompts = []
    for number, (where, item) in enumerate(items):
        if not isinstance(item, Mapping):
            raise InputError(f"{where}: not a JSON object", fix='write {"prompt": "..."}')
        prompts.append(_parse(item, number, where))
    if not prompts:
        raise InputError("there are no prompts", fix="give at least one")
    return prompts
