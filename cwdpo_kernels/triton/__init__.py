"""The Triton backend: GPU kernels behind the ops, one file an op. Imported at the first call on a GPU, not before."""

WORKSPACE_BYTES = 256 << 20  # tiles of gradients for the vendor's GEMM: large enough for its full rate
