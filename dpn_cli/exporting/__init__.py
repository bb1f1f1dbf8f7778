"""The steps of an export: its route, its plan, its weights, and the way to the hub."""
