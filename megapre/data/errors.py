"""What can be wrong with data that a user can mend."""

from ..errors import UserError


class DataError(UserError):
    """A dataset, text file or tokenizer is missing, broken, too small, or does not fit the others."""
