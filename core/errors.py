"""Exception for errors that the user can fix."""

from telechat_twins.core.shown import message_line


class UserError(Exception):
    """An error in the user's input: one line with the field or file, what must hold, what was found and what to do.

    The command line prints it to stderr and exits with code 2. Any other exception is a bug of this program (exit 1).
    Whatever the message quotes from untrusted files, it is one printable line of bounded length, and it names paths
    inside the working folder from there (core.shown).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(message_line(message))
