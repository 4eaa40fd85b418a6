"""Drawings of stream graphs, timelines and boxes."""
