"""What runs the laws: implementations, running, comparing, reporting."""
