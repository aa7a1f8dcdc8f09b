"""What the framework costs, measured. Run with `python -m benchmarks.<name>`."""
