"""A pytest plugin (`-p tests.properties.replays`) that generates nothing: only known failures are run again."""

from hypothesis import Phase, settings

# It registers the profiles.
from properties.harness import draws as draws

settings.register_profile("dev", settings.get_profile("dev"), phases=[Phase.reuse])
settings.load_profile("dev")
