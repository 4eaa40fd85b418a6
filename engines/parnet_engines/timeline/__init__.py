"""What a recording of a program shows."""
