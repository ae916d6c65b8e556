"""The exceptions that users see. It must not know anything else of the package."""


class SnpError(Exception):
    """An expected failure; the message says where, what was expected, what came and what to do.

    The command line prints it on one or two lines and exits with 2.
    """


class DiskError(SnpError):
    """What was to be written could not be: no mistake of the run, which can go on once there is room."""
