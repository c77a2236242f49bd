"""Small faults, each planted in a correct implementation to see which laws notice: `make faults`."""
