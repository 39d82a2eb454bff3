"""The exceptions that carry a message for the user: what is wrong, and what to do."""


class BitfrontError(Exception):
    """A mistake of the user or of the machine; printed without a traceback, exit status 1."""

    def __str__(self) -> str:
        # A loader process sends its error's whole traceback as the message.
        return super().__str__().rpartition("BitfrontError: ")[2].strip()


class ArtifactError(BitfrontError):
    """A packed file is missing, damaged, too new, not writable, or belongs to another network."""


class BusyError(BitfrontError):
    """Another process runs this cell."""


def first_line(error: Exception) -> str:
    """Of a library's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
