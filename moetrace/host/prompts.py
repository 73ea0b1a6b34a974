"""Prompt files: JSON lines with ``prompt``, ``messages`` or ``tokens``; or texts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetrace.errors import InputError

_KEYS = ("prompt", "messages", "tokens")
_MAX_DEPTH = 100
#: the most that llama.cpp can count: of tokens, and as a token's id
MAX_TOKENS = (1 << 31) - 1


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
        return InputError(
            f"{where}: not a prompt", why=why, fix=fix or "see `moetrace drive --help` for the keys"
        )

    _check_json(item, bad)
    given = [key for key in _KEYS if item.get(key) is not None]
    if len(given) != 1:
        raise bad(f"it has {' and '.join(given) or 'no input'}", f"give exactly one of {', '.join(_KEYS)}")
    value = item[given[0]]
    prompt: dict[str, Any] = {}
    if given[0] == "prompt":
        if not isinstance(value, str):
            raise bad("`prompt` is not a string")
        prompt["text"] = value
    elif given[0] == "messages":
        if (
            not isinstance(value, list)
            or not value
            or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in value
            )
        ):
            raise bad("`messages` is not a list of objects with `role` and `content`")
        prompt["messages"] = tuple(value)
    else:
        if not isinstance(value, list) or not value:
            raise bad("`tokens` is not a list of token ids")
        if not all(type(t) is int and 0 <= t <= MAX_TOKENS for t in value):
            raise bad("`tokens` has something that is no token id", "token ids are whole numbers from 0 on")
        prompt["tokens"] = tuple(value)
    label, n_predict, name = item.get("label"), item.get("n_predict"), item.get("id")
    if label is not None and not isinstance(label, str):
        raise bad("`label` is not a string")
    if name is not None and type(name) not in (str, int):
        raise bad("`id` is neither a string nor a whole number")
    if n_predict is not None and (type(n_predict) is not int or not 0 <= n_predict <= MAX_TOKENS):
        raise bad(f"`n_predict` is not a whole number from 0 to {MAX_TOKENS}")
    extra = {k: v for k, v in item.items() if k not in (*_KEYS, "id", "label", "n_predict")}
    return Prompt(
        id=str(number if name is None else name), label=label, n_predict=n_predict, extra=extra, **prompt
    )


def _check_json(item: Mapping[str, Any], bad: Callable[[str, str], InputError]) -> None:
    """Refuse what a label line could not keep, or a server not be sent; names the key."""
    for key, value in item.items():
        shown = f"`{_shown(key)}`"
        if _is_deep(value):
            raise bad(f"{shown} is nested more than {_MAX_DEPTH} deep", "leave it out")
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as e:
            odd = f"\\u{ord(e.object[e.start]):04x}"
            raise bad(
                f"{shown} has half of a surrogate pair ({odd}), which is no character",
                "write the character, or both halves",
            ) from None
        except (TypeError, ValueError) as e:
            raise bad(f"{shown} is no JSON ({e})", "give texts, numbers, lists and objects") from None
        if not isinstance(key, str):
            raise bad(f"the key {shown} is not a string", "give strings as keys")


def _is_deep(value: object, room: int = _MAX_DEPTH) -> bool:
    if not isinstance(value, (list, tuple, Mapping)):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return room == 0 or any(_is_deep(one, room - 1) for one in inner)


def _shown(key: object) -> str:
    return str(key).encode("ascii", "backslashreplace").decode()[:80]


def read_prompts(
    source: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | Prompt],
) -> list[Prompt]:
    """Read prompts from a JSON-lines file, or from a list of strings, of dicts with the same keys, or of prompts.

    Raises
    ------
    InputError
        If the file cannot be read, or a line is no prompt; names the file, the line and the key.
    """
    if not isinstance(source, (str, os.PathLike)):
        items: Iterable[Any] = source
        return _all(
            (f"prompt {i}", {"prompt": item} if isinstance(item, str) else item)
            for i, item in enumerate(items)
        )
    path = Path(source)
    data = _read(path)

    def lines() -> Iterable[tuple[str, Any]]:
        for number, line in enumerate(data.split(b"\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line.decode("utf-8"))
            except ValueError as e:
                raise InputError(
                    f"{where}: not JSON", why=str(e)[:200], fix="write one JSON object per line, in UTF-8"
                ) from None
            except RecursionError:
                raise InputError(
                    f"{where}: nested too deeply", fix="give a prompt, and not more around it"
                ) from None

    return _all(lines())


def read_files(paths: Sequence[str | os.PathLike[str]]) -> list[Prompt]:
    """Read prompts from files: JSON lines (:func:`read_prompts`), or any other text, which is one prompt, whole.

    A text's name is its file's, without its ending (with its folder where two are alike); its label is its folder's
    name if texts of several folders are given. Numbered prompts of several files are told apart by their file's name.

    Raises
    ------
    InputError
        If a file cannot be read, is no UTF-8, or is a file of JSON lines with a line that is no prompt.
    """
    texts = [path for path in map(Path, paths) if not _is_json_lines(path)]
    folders = {path.absolute().parent for path in texts}
    stems = [path.stem for path in texts]
    out: list[Prompt] = []
    for path in map(Path, paths):
        if path not in texts:
            found = read_prompts(path)
            plain = {str(i) for i in range(len(found))}
            several = len(paths) > 1
            out += [replace(p, id=f"{path.stem}.{p.id}") if several and p.id in plain else p for p in found]
            continue
        try:
            text = _read(path).decode("utf-8")
        except UnicodeDecodeError as e:
            raise InputError(
                f"{path} is no text in UTF-8", why=f"{e.reason} at byte {e.start}", fix="give a text"
            ) from None
        if not text.strip():
            raise InputError(f"{path} is empty", fix="give a text, or JSON lines")
        folder = path.absolute().parent.name
        name = path.stem if stems.count(path.stem) == 1 else f"{folder}/{path.stem}"
        out.append(Prompt(name, text, label=folder if len(folders) > 1 else None))
    return out


def _is_json_lines(path: Path) -> bool:
    """Whether a file is meant as JSON lines: by its name, or as its first line is a JSON object."""
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return True
    first = next((line for line in _read(path).splitlines() if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as e:
        raise InputError(
            f"cannot read the prompts {path}", why=str(e), fix="give a file of JSON lines, or a text"
        ) from e


def _all(items: Iterable[tuple[str, Any]]) -> list[Prompt]:
    prompts = []
    for number, (where, item) in enumerate(items):
        if isinstance(item, Prompt):
            prompts.append(item)
            continue
        if not isinstance(item, Mapping):
            raise InputError(f"{where}: not a JSON object", fix='write {"prompt": "..."}')
        prompts.append(_parse(item, number, where))
    if not prompts:
        raise InputError("there are no prompts", fix="give at least one")
    return prompts
