"""Looking at machines and runs."""
