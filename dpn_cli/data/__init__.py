"""The samples that calibration and evaluation read, whatever they came from. No torch."""
