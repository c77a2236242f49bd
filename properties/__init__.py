"""The property suite: laws of the Titans memory, checked on inputs that Hypothesis invents, against the oracle."""
