"""The exceptions that carry a message for the user: what is wrong, and what to do."""


class BitfrontError(Exception):
    """A mistake of the user or of the machine; printed without a traceback, exit status 1."""


class ArtifactError(BitfrontError):
    """A packed file is missing, damaged, too new, not writable, or belongs to another network."""
