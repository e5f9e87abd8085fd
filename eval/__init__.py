"""Measurements of decoding: each command says what it ran, on what, and what it saw."""
