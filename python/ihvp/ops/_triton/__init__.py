"""Triton kernels, one file an op, each with `run` of the op's positional arguments. Imported when first needed.

Sums are float32, added to an accumulator in its own type; float64 operands have no kernel. Products of float32 numbers
follow `torch.get_float32_matmul_precision()`: "highest", torch's default, is float32-accurate (three TF32 products);
below it operands are rounded to TF32, a relative error of 2^-11 each, and "medium" also keeps what was projected from
bfloat16 tokens and bases in bfloat16, 2^-9. The solves and rotations are always float32-accurate: they would amplify
an error by (max Lambda + damping) / (min Lambda + damping). Products of 16-bit numbers are exact. Reductions have a
fixed order: no atomics.
"""
