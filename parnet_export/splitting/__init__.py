"""From one graph to segments that can run in parallel."""
