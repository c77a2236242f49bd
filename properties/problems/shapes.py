"""Fewer shapes, for implementations that compile a kernel for each: all laws together still have every kind of them."""

from dataclasses import replace

from properties.problems.problem import Problem

# Widths by dtype and memory: 1, odd ones, powers of two and others, on both sides of every tile.
WIDTHS = {
    ("float32", "plain"): (1, 3, 8, 48, 100),
    ("float32", "normalised"): (1, 2, 7, 64, 128),
    ("float16", "plain"): (1, 4, 64, 65),
    ("float16", "normalised"): (2, 5, 33, 128),
    ("bfloat16", "plain"): (2, 8, 64, 127),
    ("bfloat16", "normalised"): (1, 3, 7, 64, 128),
}
# Chunk lengths above FREE, which a kernel may take in several blocks; up to there all chunks share a few kernels.
FREE, CHUNKS = 32, {"plain": (64, 250), "normalised": (48, 64, 128)}


def with_few_shapes(problem: Problem) -> Problem:
    """Return a problem like this one, with a width and a chunk length that others of its dtype and memory have.

    It is no larger, except that a width may be 2 where it was 1, so that a failure shrinks as ever. Where tensors are
    given by their values no size changes.
    """
    widths = WIDTHS.get((problem.dtype, problem.memory), ())
    if problem.explicit or not widths:
        return problem
    D, C = (
        below(problem.D, widths),
        problem.C if problem.C <= FREE else below(problem.C, (FREE, *CHUNKS[problem.memory])),
    )
    return shortened(replace(problem, D=D), C)


def below(x: int, values: tuple[int, ...]) -> int:
    """Return the largest value up to x, or the least one."""
    return max((value for value in values if value <= x), default=values[0])


def shortened(problem: Problem, C: int) -> Problem:
    """Return a problem with shorter chunks: with as many of them, and the same places in them as far as there are."""
    if C == problem.C:
        return problem
    offsets = tuple(C - 1 if place == problem.C - 1 else min(place, C - 1) for place in problem.offsets)
    lengths = []
    for T, before, start in zip(problem.lengths, problem.starts, offsets or problem.starts, strict=True):
        chunks, place = divmod(before + T, problem.C)
        lengths.append(max(0, chunks * C + min(place, C) - start))
    if not problem.packed:
        lengths = [min(lengths)] * len(lengths)
    return replace(problem, C=C, offsets=offsets, lengths=tuple(lengths))
