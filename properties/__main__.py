"""Verify implementations, and work with verdicts: `python -m properties verify my_kernel:memory`."""

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from properties.atlas import command as atlas
from properties.harness import envelope, headers, report, verify_command
from properties.harness.merging import Run, merge
from properties.harness.verifying import Report, side_by_side

PROGRAM = "python -m properties"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main() -> int:
    """Run as a command; the exit status is 0 if all is well, 1 if a law fails, and 2 if the command is wrong."""
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify_command.describe(commands.add_parser("verify", help="check the laws on one or more implementations"))
    add_merge(commands.add_parser("merge", help="make one verdict per law of the files of all shards of a run"))
    add_compare(commands.add_parser("compare", help="show the verdicts of several files side by side"))
    atlas.describe_collect(commands.add_parser("collect", help="measure error / bound on the grids of the atlas"))
    atlas.describe_atlas(commands.add_parser("atlas", help="draw verdicts and measurements as one page"))
    options = parser.parse_args()
    try:
        return int(options.run(options))
    except ValueError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.command}: interrupted before there was a verdict", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        print(f"{PROGRAM} {options.command}: the results could not be stored: {error}", file=sys.stderr)
        return 3


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Describe the command `merge`."""
    parser.set_defaults(run=run_merge, command="merge")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --verdicts")
    parser.add_argument("-o", "--output", type=Path, help="where to write the verdicts, as JSON")
    parser.add_argument("--envelope", action="store_true", help="print the calls by size and way of calling, too")


def run_merge(options: argparse.Namespace) -> bool:
    """Merge the files of all shards of a run, print the verdicts, and say whether one is wrong."""
    begin = time.monotonic()
    runs = sorted((Run.read(path) for path in options.files), key=lambda run: run.shard.number)
    verdicts = merge(runs)
    about = dict.fromkeys(line for run in runs for line in run.about)
    profile, seed = runs[0].settings
    found = Report(tuple(verdicts), headers.header(shlex.join(sys.argv), begin, about, profile, seed))
    calls = envelope.tables(verdicts) if options.envelope else []
    lines = (*report.table(verdicts), *report.failures(verdicts), *report.summary(verdicts), *calls, found.trouble)
    print("\n".join(lines), flush=True)
    if options.output:
        found.to_json(options.output)
    return not found.ok


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Describe the command `compare`."""
    parser.set_defaults(run=run_compare, command="compare")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --verdicts or verify --json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the verdicts as a page, too")


def run_compare(options: argparse.Namespace) -> bool:
    """Print the verdicts of several files side by side, and say whether one is wrong."""
    found = side_by_side([Run.read(path) for path in options.files])
    print(found, flush=True)
    if options.html:
        found.to_html(options.html)
    return not found.ok


if __name__ == "__main__":
    sys.exit(main())
