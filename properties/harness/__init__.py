"""The machinery of the laws: implementations, running, comparing, reporting."""
