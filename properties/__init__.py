"""The property suite: laws of the Titans memory, checked on inputs that Hypothesis invents, against the oracle."""

try:
    from properties.harness.verifying import Failure, Report, verify
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("oracle", "properties", "titans"):
        raise
    raise ModuleNotFoundError(
        f"the suite needs {error.name}: `make .venv/.ready` installs all that it needs, for .venv/bin/python; so does "
        "`pip install --group dev`, with pip 25.1 or newer",
        name=error.name,
    ) from error

__all__ = ["Failure", "Report", "verify"]
