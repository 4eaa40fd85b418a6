"""Run the segments of a bundle concurrently."""
