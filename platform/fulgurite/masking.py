"""Records without secrets: values that look like keys, tokens or passwords are masked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

__all__ = ["MASK", "masked", "masked_arguments", "masked_names"]

#: What records hold in the place of a secret.
MASK = "***"
_SECRET_NAME = re.compile(
    r"(^|[._-])(api_?key|access_?key|secret_?key|private_?key|auth_?key|(auth|access|api|hf)_token"
    r"|token|secret|passwd|password|passphrase|credentials?|authorization)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"^(hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|AKIA[0-9A-Z]{16}|xox[abp]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)$"
)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")


def masked(content: Any, name: str = "") -> Any:
    """Content of a record with :data:`MASK` in the place of values that look like secrets.

    Example:
        >>> masked({"logger": {"api_key": "12345", "project": "a"}, "tokens": 2})
        {'logger': {'api_key': '***', 'project': 'a'}, 'tokens': 2}
        >>> masked("https://me:word@example.org/data")
        'https://***@example.org/data'
    """
    if isinstance(content, Mapping):
        return {key: masked(value, str(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [masked(value, name) for value in content]
    if isinstance(content, str) and content:
        if _SECRET_NAME.search(name) or _SECRET_VALUE.match(content):
            return MASK
        return _IN_ADDRESS.sub(MASK, content)
    return content


def masked_arguments(argv: Sequence[str]) -> list[str]:
    """A command line with :data:`MASK` in the place of values that look like secrets.

    Example:
        >>> masked_arguments(["fit", "--model.token=abc", "--api_key", "x", "--data.tokens=2"])
        ['fit', '--model.token=***', '--api_key', '***', '--data.tokens=2']
        >>> masked_arguments(["--trainer.logger={init_args: {token: abc}}"])
        ['--trainer.logger={"init_args": {"token": "***"}}']
    """
    arguments: list[str] = []
    before = ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and equals:
            arguments.append(f"{name}={_masked_text(value, name.lstrip('-'))}")
        else:
            arguments.append(_masked_text(argument, before.lstrip("-")))
        before = argument if argument.startswith("-") and not equals else ""
    return arguments


def _masked_text(text: str, name: str) -> str:
    """A value as it is typed, which may be a mapping or a list that holds secrets."""
    content = text
    if text.lstrip().startswith(("{", "[")):
        with suppress(yaml.YAMLError, ValueError):
            content = yaml.safe_load(text)
    hidden = masked(content, name)
    if hidden == content:
        return text
    return hidden if isinstance(hidden, str) else json.dumps(hidden, default=str)


def masked_names(content: Any, key: str = "") -> list[str]:
    """Options of a configuration whose value is :data:`MASK`."""
    if isinstance(content, Mapping):
        return [n for k, v in content.items() for n in masked_names(v, f"{key}.{k}".lstrip("."))]
    if isinstance(content, list | tuple):
        return [name for value in content for name in masked_names(value, key)]
    return [key] if isinstance(content, str) and MASK in content else []
