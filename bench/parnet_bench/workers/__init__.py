"""Processes that each hold one row and run it when asked."""
