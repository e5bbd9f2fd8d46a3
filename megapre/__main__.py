"""`python -m megapre` is `megapre`."""

from .cli import main

main()
