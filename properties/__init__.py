"""The property suite: laws of the Titans memory, checked on inputs that Hypothesis invents, against the oracle."""

import sys

try:
    from properties.harness.verifying import Failure, Report, verify
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("oracle", "properties", "titans"):
        raise
    from properties.missing import advice

    # So it is while Python looks for the module of `python -m properties`: no traceback.
    if sys.argv[0] == "-m":
        print(f"python -m properties: {advice(error.name)}", file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(advice(error.name), name=error.name) from error

__all__ = ["Failure", "Report", "verify"]
