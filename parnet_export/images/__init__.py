"""From image files to the inputs of networks, and names for what comes out."""
