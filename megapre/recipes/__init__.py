"""Shipped recipes: TOML files of named models and named runs, read by `megapre.config.load`."""
