"""Functions with the names and signatures of other projects, on this package's ops."""
