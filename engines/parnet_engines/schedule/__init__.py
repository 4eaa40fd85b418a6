"""Schedules as data: programs, what they mean, and whether they are right."""
