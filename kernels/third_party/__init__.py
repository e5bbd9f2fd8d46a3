"""Other people's kernels under the op names of the registry: one file a library, with the calls it takes.

A row is here where a public function of the library computes what the op's `reference` does. What it would do besides
(overwrite its inputs, wait for the device, round the result once more) keeps a function out, and its file says so.
Nothing here is imported before it is called: whether a library can be used is read from its place on the path and the
version of its distribution (found.py). None of these rows has run on a GPU yet.
"""
