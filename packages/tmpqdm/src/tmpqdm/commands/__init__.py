"""The sub-commands of `tmpqdm`: frozen dataclasses, nothing heavy imported before they run."""
