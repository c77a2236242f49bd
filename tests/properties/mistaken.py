"""The definition and versions with one mistake each, under names that `verify` can import."""

from functools import partial

from tests.properties import wrong

# An implementation's `step` is the one that decodes; that of a definition is another.
right = partial(wrong.Definition())
without_factor = partial(wrong.Half())
late_anchor = partial(wrong.LateAnchor())
tail_runs_on = partial(wrong.TailRunsOn())
