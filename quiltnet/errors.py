"""The one exception that means: the user can put this right; and the words of others."""


class UserError(ValueError):
    """What was given, the rule it breaks, and the remedy.

    The command line prints the message alone and exits with 2. Any other exception is ours to answer for and keeps
    its traceback, which is why a bare ``ValueError`` (a library may raise one for a bug of ours) is not treated so.
    """


def first_line(error: BaseException) -> str:
    """Of what it says, or else its type: libraries go on for paragraphs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
