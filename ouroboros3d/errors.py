"""What the user can put right."""


class UserError(Exception):
    """The message is one line: what is wrong, and the way out. Entry scripts print it without a traceback."""
