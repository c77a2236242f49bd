"""How far a correct implementation may be from the truth at real sizes: the exact adjoint of every error (B12)."""

from oracle.bounds.posterior.enclosure import EXACT, Enclosure, enclose
from oracle.bounds.posterior.pieces import as_pieces
from oracle.bounds.posterior.verdict import Verdict, judge

__all__ = ["EXACT", "Enclosure", "Verdict", "as_pieces", "enclose", "judge"]
