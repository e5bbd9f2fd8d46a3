"""Training: the loop, the step, what they report, and what is done with the trained model."""
