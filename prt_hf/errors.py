"""Exceptions. Each also subclasses a built-in one, and reports problem, expected, found and remedy."""

from os import PathLike


class PRTError(Exception):
    """Base class of every error that prt_hf raises on purpose.

    Args:
        problem (`str`): What is wrong, in one sentence.
        expected (`str`, *optional*): What would be right.
        found (`str`, *optional*): What there is instead.
        remedy (`str`, *optional*): What to do about it.
    """

    def __init__(
        self, problem: str, *, expected: str | None = None, found: str | None = None, remedy: str | None = None
    ):
        details = {"expected": expected, "found": found, "remedy": remedy}
        super().__init__("\n".join([problem, *(f"  {key}: {text}" for key, text in details.items() if text)]))


class PRTValueError(PRTError, ValueError):
    """An argument, a data set or a setting is invalid."""


class ContractError(PRTError, ValueError):
    """The backbone does not offer what the reward needs."""


class VocabularyMismatchError(ContractError):
    """The backbone's vocabulary is not the reward's, nor an update of it; or a tokenizer is not its model's."""


class LabelMismatchError(ContractError):
    """The label names of reward and backbone differ, or are not unique."""


class BaseModelMismatchError(PRTError, ValueError):
    """An adapter is loaded on another base than the one that it was tuned on."""


class RewardFileError(PRTError, OSError):
    """A saved reward is incomplete, damaged or pickled, or the files are not a reward."""

    @classmethod
    def unreadable(cls, path: str | PathLike, error: Exception, *, expected: str, remedy: str) -> "RewardFileError":
        """Return the error for a file that cannot be parsed.

        Args:
            path: The file.
            error: The exception of the parser.
            expected: What the file should hold.
            remedy: What to do about it.
        """
        found = str(error).strip()[:200]  # of an untrusted file
        return cls(f"{path} cannot be read: {type(error).__name__}: {found}", expected=expected, remedy=remedy)


class BackboneCacheError(PRTError, ValueError):
    """Stored states of a backbone are damaged, belong to another one, or cannot be stored."""


class NonFiniteRewardError(PRTError, FloatingPointError):
    """A reward is NaN or infinite."""


class ContextLengthError(PRTError, ValueError):
    """A sequence is longer than the reward can read."""


class UnsupportedError(PRTError, NotImplementedError):
    """A combination is refused, because its output would be wrong."""
