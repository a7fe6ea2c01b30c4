"""Sweeps: many points of one project, on this machine or on others, each computed once."""
