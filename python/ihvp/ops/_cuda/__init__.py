"""CUDA kernels, where the optional module `_cuda` was built: one file an op, each with `run` of the op's arguments.

Their arithmetic is that of the Triton kernels (`ihvp.ops._triton`): float32 sums, float32 operands as three TF32
products by default and as one below torch's highest float32 matmul precision, bfloat16 operands as they are. Fixed
order, no atomics. They run on the caller's stream and wait for nothing.
"""
