"""The one exception that users see. It must not know anything else of the package."""


class SnpError(Exception):
    """An expected failure; the message says where, what was expected, what came and what to do.

    The command line prints it on one or two lines and exits with 2.
    """
