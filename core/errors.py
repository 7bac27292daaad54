"""The one exception that means "the user can mend this"."""

from telechat_twins.core.shown import printable


class UserError(Exception):
    """A mistake of the user's: one line that names the field or file, what was found, and the way out.

    The command line prints it on stderr and exits with code 2. Everything else is a defect of ours (exit 1). Whatever
    is told of foreign files, the message stays one printable line of bounded length (core.shown).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))
