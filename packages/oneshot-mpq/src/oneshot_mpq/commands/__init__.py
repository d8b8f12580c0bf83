"""The sub-commands; only the command line imports them."""
