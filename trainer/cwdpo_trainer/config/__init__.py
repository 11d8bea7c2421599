"""The settings of a run: the YAML file, read and checked."""
