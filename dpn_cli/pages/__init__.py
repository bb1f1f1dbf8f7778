"""Pages that need nothing else: their frame, their plots, and what is shown of a sample. No torch."""
