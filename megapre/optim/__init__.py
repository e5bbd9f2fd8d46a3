"""The optimizer over flat buffers, learning-rate schedules, and gradient clipping."""
