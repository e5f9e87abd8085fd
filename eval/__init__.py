"""Measurements of decoding: benchmarks, exactness, speed, calibration."""
