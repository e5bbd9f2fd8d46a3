"""One thread and one random stream for every test: a failure seen once is seen again."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ["MEGAPRE_KERNEL_PROFILE"] = "off"  # what someone measured on this machine shall decide no test

# derandomize: the examples depend on the test alone. deadline None: a busy machine is not a failing one.
settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# `HYPOTHESIS_PROFILE=explore pytest` looks for new examples instead.
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))
