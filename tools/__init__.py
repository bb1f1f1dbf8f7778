"""Tools of this project that users do not need."""
