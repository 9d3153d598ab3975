"""What stands between the public functions and the operators of csrc/: one file for each concern."""
