"""Typed errors: a user's mistake says what was expected, what was got, and what to do."""

from tangram.printable import one_line


class TangramError(Exception):
    """Base of every error that this package raises on purpose.

    Its text is one printable line, whatever it quotes of files, servers and other libraries.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigurationError(TangramError, ValueError):
    """An option has a value that cannot be served."""


class UnsupportedError(ConfigurationError):
    """Compression was asked for together with something that it cannot serve yet."""


class TextError(ConfigurationError):
    """A text that no sample can be made of.

    Args:
        where: its place.
        reason: what is wrong with it.

    Attributes:
        fault: both, without the remedy.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.fault = f"{where}: {reason}"
        super().__init__(f"{self.fault}: mend or remove it, or give another --data")


class BudgetError(TangramError, ValueError):
    """Budgets that do not add up: too few pages, too many, or of the wrong shape."""


class ProfileError(TangramError, ValueError):
    """A profile that cannot be read, or that is damaged."""


class ProfileMismatchError(ProfileError):
    """A profile of another model, scorer or schema than the one that was asked for."""


class ScorerError(ConfigurationError):
    """An unknown scorer, a bad parameter, or statistics that the scorer needs and lacks."""


def refuse(condition: object, what: str, remedy: str) -> None:
    """Raise UnsupportedError for something that compression does not serve, if there is one.

    Args:
        condition: whether there is.
        what: names it, and the option.
        remedy: what to do.
    """
    if condition:
        raise UnsupportedError(f"KV cache compression does not support {what}: {remedy}")
