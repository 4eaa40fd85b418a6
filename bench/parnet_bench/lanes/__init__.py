"""What lanes cost and gain on CPUs, and how well the simulator foresees it."""
