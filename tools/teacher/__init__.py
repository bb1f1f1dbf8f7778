"""How the embedded teacher was trained: `python -m tools.teacher.train --output DIR`."""
