"""Results of the bench: their schema, what follows from them, and what was published."""
