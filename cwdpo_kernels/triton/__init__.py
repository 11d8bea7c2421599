"""The Triton backend: GPU kernels behind the ops, one file an op. Imported at the first call on a GPU, not before."""
