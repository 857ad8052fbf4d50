"""The fixtures of test_roundtrip.py, one of each for all files here."""
from test_roundtrip import critic, ear, pocket, runs  # noqa: F401
