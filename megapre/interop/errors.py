"""What this room tells a user whose model has no counterpart."""

from megapre.errors import UserError


class InteropError(UserError):
    """A config or weights that cannot be mapped one to one."""
