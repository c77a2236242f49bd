"""The property suite: laws of the Titans memory, checked on inputs that Hypothesis invents, against the oracle."""

from properties.harness.verifying import Failure, Report, verify

__all__ = ["Failure", "Report", "verify"]
