"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake of the user's: one line that names the field or file, what was found, and the way out.

    The command line prints it on stderr and exits with code 2. Everything else is a defect of ours (exit 1).
    """
