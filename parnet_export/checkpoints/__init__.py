"""Files that trained networks come in."""
