"""Compute, judge and keep empirical model statistics (EMS); the command line `ems`; the embedded model."""
