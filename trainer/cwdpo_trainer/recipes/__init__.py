"""Tasks that train on a laptop's processor: what `cwdpo demo` shows, and what the trainer is tested on."""
