"""The networks of the catalogue in figures."""
