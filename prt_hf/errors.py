"""What can go wrong, each kind also a standard error, each message as expected / found / remedy."""

from os import PathLike


class PRTError(Exception):
    """Base class of every error that prt_hf raises on purpose.

    Args:
        problem (`str`): what is wrong, in one sentence.
        expected, found, remedy (`str`, *optional*): shown one per line below it.
    """

    def __init__(
        self, problem: str, *, expected: str | None = None, found: str | None = None, remedy: str | None = None
    ):
        details = {"expected": expected, "found": found, "remedy": remedy}
        super().__init__("\n".join([problem, *(f"  {key}: {text}" for key, text in details.items() if text)]))


class PRTValueError(PRTError, ValueError):
    """An argument, a data set or a setting that cannot be right."""


class ContractError(PRTError, ValueError):
    """The backbone does not offer what the reward needs."""


class VocabularyMismatchError(ContractError):
    """The token -> id maps differ, whatever their sizes."""


class LabelMismatchError(ContractError):
    """The label names differ, or cannot be told apart."""


class BaseModelMismatchError(PRTError, ValueError):
    """An adapter meets another base than the one that it was tuned on."""


class RewardFileError(PRTError, OSError):
    """A saved reward is incomplete, damaged, pickled, or no reward at all."""

    @classmethod
    def unreadable(cls, path: str | PathLike, error: Exception, *, expected: str, remedy: str) -> "RewardFileError":
        """Of a file with something else in it, as `error` tells."""
        return cls(f"{path} cannot be read: {type(error).__name__}: {error}", expected=expected, remedy=remedy)


class BackboneCacheError(PRTError, ValueError):
    """Stored states of a backbone are damaged or another's, or cannot be stored."""


class NonFiniteRewardError(PRTError, FloatingPointError):
    """A reward holds NaN or infinity."""


class ContextLengthError(PRTError, ValueError):
    """A sequence is longer than the reward can read."""


class UnsupportedError(PRTError, NotImplementedError):
    """A combination that would yield wrong output, and is refused instead."""
