"""The commands of `dpk`, one file each."""
