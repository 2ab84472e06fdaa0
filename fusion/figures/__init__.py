"""All plots, and tables for the terminal."""
