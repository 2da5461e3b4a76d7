"""Benchmarks of lfq: see README.md here."""
