"""The network families: training form, inference form, and how one becomes the other."""
