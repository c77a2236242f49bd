"""The definition and versions with one mistake each, under names that `verify` can import."""

from tests.properties import wrong

right = wrong.Definition()
without_factor = wrong.Half()
late_anchor = wrong.LateAnchor()
tail_runs_on = wrong.TailRunsOn()
