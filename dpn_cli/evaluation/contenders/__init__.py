"""What a user would pick instead of a pyramid, on the same engine and at equal prefill FLOPs."""
