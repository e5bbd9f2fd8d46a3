"""What this room tells a user who asked for something the model cannot do."""

from megapre.errors import UserError


class ModelError(UserError):
    """A request that does not fit the model: too many positions, a token outside the vocabulary, alien weights."""
