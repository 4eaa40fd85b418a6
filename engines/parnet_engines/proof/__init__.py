"""Whether engines on a device compute what they should."""
