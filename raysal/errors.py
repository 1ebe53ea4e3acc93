"""The few exceptions a user meets. Each message says what was seen and what to do about it."""


class RaysalError(Exception):
    """Something failed that retrying or other input may mend; the command line exits with 1."""

    exit_code = 1


class InputError(RaysalError):
    """Bad usage or bad input, found before any long work; the command line exits with 2."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration that cannot be used: an unknown key, a value out of range, keys that contradict each other."""


class DataError(InputError):
    """A data set that cannot be used: missing masks, sizes that differ, mask values outside the label set, empty splits."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used: not one of ours, damaged, or made for other classes."""


class ResourceError(InputError):
    """The machine or cluster cannot carry what was asked: too few CPUs, no disk space."""


class ImageError(RaysalError):
    """One image that cannot be used. It becomes a row with a status; it never stops a run.

    Attributes:
        status: ``fetch`` (bytes not to be had), ``decode`` (bytes are no image) or ``limit`` (too large to accept).
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.status, str(self))
