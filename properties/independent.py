"""Examples that Hypothesis draws independently of each other.

Of its own accord Hypothesis lets up to five variations follow an example, in which one choice repeats another. So 150
examples come from some 30 draws, and now and then hardly one of those has what a law is about. For a backend that is
not its own it draws every example afresh; what fails it shrinks as ever.
"""

from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

NAME = "independent"


class Independent(HypothesisProvider):
    """Hypothesis's own draws, under another name."""


AVAILABLE_PROVIDERS[NAME] = Independent
