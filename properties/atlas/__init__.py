"""The atlas: measured errors over bounds as pictures, and the verdicts of a run, on one page."""
