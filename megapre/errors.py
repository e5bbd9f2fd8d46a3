"""The one base class of errors that a user can mend."""


class UserError(ValueError):
    """Input, configuration or environment is wrong in a way its owner can mend.

    The message says what is wrong in numbers, which rule it breaks, and what would work. The command line prints it
    without a traceback and exits with code 2. Rooms define their own subclasses.
    """
