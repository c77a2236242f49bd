"""Work with verdicts: `python -m properties merge verdicts-*.json -o verdicts.json`."""

import argparse
import sys
from pathlib import Path

from properties.harness import report
from properties.harness.merging import Run, merge


def main() -> int:
    """Run as a command; the exit status is 1 if a law fails, 2 if the files are not the shards of one run."""
    parser = argparse.ArgumentParser(prog="python -m properties", description=__doc__)
    commands = parser.add_subparsers(required=True)
    merging = commands.add_parser("merge", help="make one verdict per law of the files of all shards of a run")
    merging.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --verdicts")
    merging.add_argument("-o", "--output", type=Path, help="where to write the verdicts, as JSON")
    options = parser.parse_args()
    try:
        runs = sorted((Run.read(path) for path in options.files), key=lambda run: run.shard.number)
        verdicts = merge(runs)
    except ValueError as error:
        print(f"python -m properties merge: {error}", file=sys.stderr)
        return 2
    if options.output:
        about = list(dict.fromkeys(line for run in runs for line in run.about))
        profile, seed = runs[0].settings
        report.write_json(options.output, verdicts, {"about": about, "shard": None, "profile": profile, "seed": seed})
    trouble = report.too_many_ill_conditioned(verdicts)
    print("\n".join((*report.table(verdicts), *report.failures(verdicts), *report.summary(verdicts), trouble)))
    return bool(trouble) or report.outcome(verdicts, verdicts) in ("FAIL", "not complete")


if __name__ == "__main__":
    sys.exit(main())
