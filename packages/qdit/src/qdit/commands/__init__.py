"""The sub-commands of `qdit`: frozen dataclasses, nothing heavy imported before they run."""
