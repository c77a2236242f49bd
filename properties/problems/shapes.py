"""Fewer shapes, for implementations that compile a kernel for each: all laws together still have every kind of them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from properties.problems.problem import Problem


@dataclass(frozen=True, eq=False)
class Shapes:
    """Some widths and chunk lengths.

    Parameters
    ----------
    widths : mapping of (dtype, memory) to tuple of int
        In ascending order; a dtype and memory that is not named keeps its widths and chunk lengths.
    chunks : mapping of memory to tuple of int
        The chunk lengths above `free`.
    free : int
        Up to it every chunk length is one of these.
    """

    widths: Mapping[tuple[str, str], tuple[int, ...]]
    chunks: Mapping[str, tuple[int, ...]]
    free: int

    def nearest(self, problem: Problem) -> Problem:
        """Return a problem like this one, with a width and a chunk length that others of its dtype and memory have.

        It is no larger, except that a width below the least is the least, so that a failure shrinks as ever. Where
        tensors are given by their values no size changes.
        """
        widths = self.widths.get((problem.dtype, problem.memory), ())
        if problem.explicit or not widths:
            return problem
        C, chunks = problem.C, (self.free, *self.chunks[problem.memory])
        return shortened(replace(problem, D=below(problem.D, widths)), C if C <= self.free else below(C, chunks))


# For a run of minutes: widths 1, odd ones, powers of two and others, on both sides of every tile; chunks that a kernel
# may take in several blocks.
FEW = Shapes(
    widths={
        ("float32", "plain"): (1, 3, 8, 48, 100),
        ("float32", "normalised"): (1, 2, 7, 64, 128),
        ("float16", "plain"): (1, 4, 64, 65),
        ("float16", "normalised"): (2, 5, 33, 128),
        ("bfloat16", "plain"): (2, 8, 64, 127),
        ("bfloat16", "normalised"): (1, 3, 7, 64, 128),
    },
    chunks={"plain": (64, 250), "normalised": (48, 64, 128)},
    free=32,
)
# For a quick run: every one of these may have to be compiled within a minute.
FEWEST = Shapes(
    widths={
        ("float32", "plain"): (2, 48),
        ("float32", "normalised"): (3, 64),
        ("float16", "plain"): (8,),
        ("float16", "normalised"): (5, 64),
        ("bfloat16", "plain"): (8,),
        ("bfloat16", "normalised"): (7, 64),
    },
    chunks={"plain": (16, 64), "normalised": (16, 64)},
    free=2,
)


def below(x: int, values: tuple[int, ...]) -> int:
    """Return the largest value up to x, or the least one."""
    return max((value for value in values if value <= x), default=values[0])


def shortened(problem: Problem, C: int) -> Problem:
    """Return a problem with shorter chunks: with as many of them, and the same places in them as far as there are."""
    if C == problem.C:
        return problem
    offsets = tuple(min(place, C - 1) for place in problem.offsets)
    lengths = []
    for T, before, start in zip(problem.lengths, problem.starts, offsets or problem.starts, strict=True):
        chunks, place = divmod(before + T, problem.C)
        # a last token has a place in the chunk, if it fills it
        lengths.append(max(min(T, 1), chunks * C + min(place, C - 1) - start))
    if not problem.packed:
        lengths = [min(lengths)] * len(lengths)
    return replace(problem, C=C, offsets=offsets, lengths=tuple(lengths))
