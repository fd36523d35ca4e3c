"""Suites that every driver passes. Packages outside the project can subclass them for drivers of their own."""

import pytest

# The suites are not test modules themselves, and their assertions are to explain themselves all the same.
pytest.register_assert_rewrite("tests.conformance.storage_suite", "tests.conformance.format_suite")
