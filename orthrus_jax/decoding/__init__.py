"""Compiled decoding loops on ids. Knows no text and no files."""
