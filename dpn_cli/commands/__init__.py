"""One verb per file: options, validation, one library call."""
