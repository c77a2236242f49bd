"""Verify implementations, and work with verdicts: `python -m properties verify my_kernel:memory`."""

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from properties.harness import files, headers, report
from properties.harness.merging import Run, merge
from properties.harness.verifying import Report, seconds, verify

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
    add_verify(commands.add_parser("verify", help="check the laws on one or more implementations"))
    add_merge(commands.add_parser("merge", help="make one verdict per law of the files of all shards of a run"))
    options = parser.parse_args()
    try:
        return int(options.run(options))
    except ValueError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Describe the command `verify`."""
    parser.set_defaults(run=run_verify, command="verify")
    parser.add_argument("targets", nargs="+", metavar="MODULE:CALLABLE", help="or a backend of this repository")
    parser.add_argument("--lacks", metavar="CLAIMS", help="missing claims, such as resume,varlen")
    parser.add_argument("--domain", metavar="RULES", help="where it is defined, such as 'D=64,128 C=64 T%%C=0'")
    parser.add_argument("--operands", metavar="DTYPE", help="inputs: it rounds operands of products to q's dtype")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it runs (cpu)")
    parser.add_argument("--select", default="", metavar="TEXT", help="only laws with this in their name")
    parser.add_argument("--profile", default="dev", help="how many examples: dev (50 for each law), smoke, ci or deep")
    until = parser.add_mutually_exclusive_group()
    until.add_argument("--quick", action="store_const", dest="budget", const="60s", help="end after 60 s: --budget 60s")
    until.add_argument(
        "--budget", metavar="TIME", help="end after this time, such as 2m; without it the whole suite runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the examples (0)")
    parser.add_argument("-n", type=int, metavar="PROCESSES", help="one for each core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts here, for programs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them here as a page, for people")


def run_verify(options: argparse.Namespace) -> bool:
    """Print the verdicts on some implementations; whether one is wrong."""
    for path in filter(None, (options.json, options.html)):
        try:
            files.check(path)
        except OSError as error:
            raise ValueError(f"results must go into files that can be written: {error}") from error
    found = verify(
        *options.targets,
        domain=options.domain,
        lacks=options.lacks,
        operands=options.operands,
        device=options.device,
        select=options.select,
        seed=options.seed,
        profile=options.profile,
        budget=None if options.budget is None else max(0.1, round(seconds(options.budget) - age(), 1)),
        workers=options.n,
        progress=True,
    )
    found = replace(
        found, header={**found.header, "command": shlex.join(("python", "-m", "properties", *sys.argv[1:]))}
    )
    if options.json:
        found.to_json(options.json)
    if options.html:
        found.to_html(options.html)
    print(found)
    return not found.ok


def age() -> float:
    """Return the seconds since this process was started, where the system says so: imports take some of them."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Describe the command `merge`."""
    parser.set_defaults(run=run_merge, command="merge")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by --verdicts")
    parser.add_argument("-o", "--output", type=Path, help="where to write the verdicts, as JSON")


def run_merge(options: argparse.Namespace) -> bool:
    """Merge the files of all shards of a run, print the verdicts, and say whether one is wrong."""
    begin = time.monotonic()
    runs = sorted((Run.read(path) for path in options.files), key=lambda run: run.shard.number)
    verdicts = merge(runs)
    about = dict.fromkeys(line for run in runs for line in run.about)
    profile, seed = runs[0].settings
    found = Report(tuple(verdicts), headers.header(shlex.join(sys.argv), begin, about, profile, seed))
    if options.output:
        found.to_json(options.output)
    print("\n".join((*report.table(verdicts), *report.failures(verdicts), *report.summary(verdicts), found.trouble)))
    return not found.ok


if __name__ == "__main__":
    sys.exit(main())
