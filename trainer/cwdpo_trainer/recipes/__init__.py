"""Tasks small enough to train on a laptop CPU. `cwdpo demo` runs one."""
