"""How one rank's work is carried out: the executor of a schedule, and the flat buffers of parameters and gradients."""
