"""Checks and engine comparisons that users run on their own devices."""
