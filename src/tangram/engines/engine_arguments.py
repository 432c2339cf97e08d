"""Whether vLLM takes the engine's arguments that a user gave, asked before any engine starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_args

from tangram.errors import ConfigurationError

_PLAIN = {bool, int, float, str, type(None)}


def check_engine_arguments(option: str, given: Mapping[str, Any]) -> None:
    """Refuse what `vllm.LLM` would not take: unknown names, and plain values of another type.

    Args:
        option: by which the arguments were given.
        given: keyword arguments of `vllm.LLM`; without any, vLLM is not imported.

    Raises:
        ConfigurationError: names the option and the argument.
    """
    if not given:
        return
    from pydantic import TypeAdapter, ValidationError
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    kinds: dict[str, Any] = {field.name: field.type for field in fields(EngineArgs)}
    known = {*kinds, *inspect.signature(LLM.__init__).parameters} - {"self", "kwargs"}
    for name, value in given.items():
        if name not in known:
            raise ConfigurationError(
                f"{option}: vllm.LLM has no argument {name}: leave it out, or look its name up in "
                "vLLM's engine arguments"
            )
        kind: Any = kinds.get(name)
        if set(get_args(kind) or (kind,)) <= _PLAIN:
            try:
                TypeAdapter(kind).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ConfigurationError(f"{option}: {name} is {value!r}: {reason}") from error


@contextmanager
def named_refusals() -> Iterator[None]:
    """A start of an engine; values that vLLM's configuration refuses are told in one line.

    Raises:
        ConfigurationError: names the argument of the engine, its value and what was expected.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or error.title
        raise ConfigurationError(
            f"vLLM refuses the engine's argument {name}, {first['input']!r}: {first['msg']}"
        ) from error
