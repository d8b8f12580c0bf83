"""Commands of `prance`, one file for each subject."""
