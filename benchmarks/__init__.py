"""How fast the op is: `python -m benchmarks.cpu`, `python -m benchmarks.gpu`."""
