"""The GPU form of the ops, written in Triton: one file an op, as csrc/cpu is their CPU form.

Each file has the kernels, a small launch policy beside them and functions on tensors (forward, backward). `library`
makes them torch ops (`torch.ops.megapre_triton.*`: fake tensors, autograd); `ops` gives these the signatures of the
registry. Importing either imports no Triton: the kernels are loaded, and compiled, by the first call that needs them.

The kernels run on the current CUDA device, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).
"""
