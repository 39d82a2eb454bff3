"""The one exception that carries a message for the user: what is wrong, and what to do."""


class BitfrontError(Exception):
    """A mistake of the user or of the machine; printed without a traceback, exit status 1."""
