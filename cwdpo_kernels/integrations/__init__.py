"""The package's ops inside Hugging Face models and TRL trainers."""
