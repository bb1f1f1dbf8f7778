"""Evaluation: how a pyramid's answers compare with its teacher's."""
