"""Drop-in replacements: functions with the names and signatures of other projects, on this package's ops."""
