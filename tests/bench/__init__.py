"""Tests of the benchmarks' own logic: that data is verified, that figures are what they say. No test asserts a time."""
