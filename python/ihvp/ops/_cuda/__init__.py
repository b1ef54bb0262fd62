"""CUDA kernels, where the optional module `_cuda` was built: one file an op, each with `run` of the op's arguments.

They are those that are faster than the Triton kernel somewhere. Sums over positions take 16-bit tokens, whose products
are exact in float32, on devices of compute capability 9.0; solves of small layers take float32 as three TF32 products.
Fixed order, no atomics. They run on the caller's stream and wait for nothing.
"""
