"""The one kind of error that a user causes and can mend."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong and names the fix.

    Commands print the message without a traceback and exit with code 2.
    """
