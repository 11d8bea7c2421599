"""The Triton backend: GPU kernels, one file per op. Its modules are imported at the first call on a GPU."""

WORKSPACE_BYTES = 256 << 20  # for chunks of tiles, large enough for the full rate of cuBLAS or hipBLAS
