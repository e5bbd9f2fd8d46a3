"""What is wrong with a config: every problem at once, not the first."""

from collections.abc import Sequence

from ..errors import UserError


class ConfigError(UserError):
    """A config that cannot be: `problems` holds one self-contained line for each thing that is wrong."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        heading = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([heading, *(f"  - {problem}" for problem in self.problems)]))
