"""Calibration: measure what every route costs in fidelity, fit the routers to it, solve λ for any budget."""
