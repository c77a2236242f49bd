"""The options, the tests and the summary of the suite: all of it is `properties.harness.plugin`."""

from properties.harness.plugin import *  # noqa: F403
