"""A pytest plugin (`-p tests.properties.replays`) that generates nothing: only known failures are run again."""

from hypothesis import Phase, settings

from properties.checks import Property

whole = Property.test


def replayed(self: Property, share: float = 1.0):  # type: ignore[no-untyped-def]
    """Return the law as a test of what the database has."""
    test = whole(self, share)
    test._hypothesis_internal_use_settings = settings(
        test._hypothesis_internal_use_settings, phases=[Phase.reuse], max_examples=50
    )
    return test


Property.test = replayed
