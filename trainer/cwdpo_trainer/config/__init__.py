"""The config of a run: its options, and how they are read from a YAML file and checked."""
