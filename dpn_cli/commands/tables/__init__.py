"""The tables that more than one command prints: a few columns that fit 80 characters, or all of them (`--wide`)."""
