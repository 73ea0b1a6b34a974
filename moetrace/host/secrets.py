"""Secrets in command lines: a trace keeps the command that it recorded, and not the keys in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: what stands in a secret's place
HIDDEN = "(hidden)"

_WORDS = {
    "key",
    "keys",
    "apikey",
    "token",
    "password",
    "passwd",
    "passphrase",
    "secret",
    "auth",
    "credentials",
}
#: an option, or a variable
_NAME = re.compile(r"-{1,2}[A-Za-z][\w.-]*|[A-Za-z_]\w*")
#: within a shell's command line: an option or variable, with what parts it from its value; and a value
_NAMED = re.compile(r"(?<![\w.-])(-{1,2}[A-Za-z][\w.-]*|[A-Za-z_]\w*)(=|\s+)")
_VALUE = re.compile(r"""("[^"]*"|'[^']*'|[^\s;&|"'])+""")
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)([^\s\"']+)")
_LOGIN = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


def is_secret(name: str) -> bool:
    """Whether the value of this option or variable is a secret: ``--api-key``, ``-hft``, ``LLAMA_API_KEY``."""
    words = re.split(r"[-_.]+", name.strip("-").lower())
    if words[-1] in ("file", "path", "type"):
        return False
    return name == "-hft" or not _WORDS.isdisjoint(words)


def redacted(command: Sequence[str]) -> list[str]:
    """Give a command line with :data:`HIDDEN` in place of every secret in it."""
    shown: list[str] = []
    hide = False
    last = ""  # what comes after -c is a shell's command line
    for argument in command:
        name, assigns, _ = argument.partition("=")
        if hide:
            shown.append(HIDDEN)
            hide = False
        elif assigns and _NAME.fullmatch(name) and is_secret(name) and last != "-c":
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(_within(argument))
            hide = argument.startswith("-") and _NAME.fullmatch(argument) is not None and is_secret(argument)
        last = argument
    return shown


def _within(text: str) -> str:
    """Hide the secrets of a command line that is one argument of another, and passwords in URLs."""
    shown, at = "", 0
    while re.search(r"\s", text) and (found := _NAMED.search(text, at)):
        name, parting = found.groups()
        value = _VALUE.match(text, found.end())
        if value and is_secret(name) and (parting == "=" or name.startswith("-")):
            shown += text[at : found.end()] + HIDDEN
            at = value.end()
        else:
            shown += text[at : found.end(1)]
            at = found.end(1)
    shown = _BEARER.sub(rf"\1\2{HIDDEN}", shown + text[at:])
    return _LOGIN.sub(rf"\1{HIDDEN}@", shown)
