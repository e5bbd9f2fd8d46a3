"""Timing of every op against its peers: one list of cases, one timer. Imports nothing until it is used.

    from megapre.kernels.bench import cases, run
    rows = run.Runner("cpu").case(cases.build("rms_norm", {"T": 2048, "H": 4096}, "bf16", "cpu"), ["forward", "full"])

`cases` says what is measured, with a file of builders for each kind of op; `works` makes calls of a provider, `exact`
what they should compute; `timer`, and `cuda_timer` on a GPU, say how long they take; `run` puts these together into
rows, which `row` holds to goals; `sets` names lists of cases, `policies` makes more providers of Triton kernels.
"""
