"""Other people's implementations, for `--impl properties.adapters.MODULE:CALLABLE`."""
