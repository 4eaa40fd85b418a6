"""Engines, one module for each runtime that computes them."""
