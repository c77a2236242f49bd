"""The command `python -m properties verify`."""

import argparse
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from properties.harness import files
from properties.harness.progress import Progress
from properties.harness.subjects import Subject
from properties.harness.verifying import Report, seconds, together, verify, within


def describe(parser: argparse.ArgumentParser) -> None:
    """Describe the command `verify`."""
    parser.set_defaults(run=run, command="verify")
    parser.add_argument("targets", nargs="+", metavar="MODULE:CALLABLE", help="or a backend of this repository")
    parser.add_argument("--lacks", metavar="CLAIMS", help="missing claims, such as resume,varlen")
    parser.add_argument("--claims", metavar="CLAIMS", help="claims of law 18, that some calls give the same bits")
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
    parser.add_argument("-x", "--first-failure", action="store_true", help="end a quick run at its first failure")
    parser.add_argument("--seed", type=int, default=0, help="of the examples (0)")
    parser.add_argument("--progress-to", type=int, help=argparse.SUPPRESS)
    parser.add_argument("-n", type=int, metavar="PROCESSES", help="one for each core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts here, for programs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them here as a page, for people")


def run(options: argparse.Namespace) -> bool:
    """Print the verdicts on some implementations; whether one is wrong."""
    for path in filter(None, (options.json, options.html)):
        try:
            files.check(path)
        except OSError as error:
            raise ValueError(f"results must go into files that can be written: {error}") from error
    found = quickly(options) if options.budget else thoroughly(options)
    found = replace(
        found, header={**found.header, "command": shlex.join(("python", "-m", "properties", *sys.argv[1:]))}
    )
    # What cannot be stored is seen all the same.
    print(found, flush=True)
    if options.json:
        found.to_json(options.json)
    if options.html:
        found.to_html(options.html)
    return not found.ok


def thoroughly(options: argparse.Namespace) -> Report:
    """Run the whole suite."""
    return verify(
        *options.targets,
        domain=options.domain,
        lacks=options.lacks,
        claims=options.claims,
        operands=options.operands,
        device=options.device,
        select=options.select,
        seed=options.seed,
        profile=options.profile,
        workers=options.n,
        progress=True,
    )


def quickly(options: argparse.Namespace) -> Report:
    """Check each implementation until its time is up, the first one's since this process was started."""
    budget, begin = seconds(options.budget), time.monotonic() - age()
    to = options.progress_to
    shown = Progress(sys.stderr if to is None else os.fdopen(to, "w", closefd=False))
    workers, runs = options.n or len(os.sched_getaffinity(0)), list[Report]()
    for target in options.targets:
        since = time.monotonic() if runs else begin
        subject = Subject(target, options.device, options.lacks, options.claims, options.domain, options.operands)
        run = within(
            budget, subject, since, select=options.select, seed=options.seed, first_failure=options.first_failure,
            workers=workers, progress=shown,
        )  # fmt: skip
        runs.append(run)
    return together(runs, begin)


def age() -> float:
    """Return the seconds since this process was started, where the system says so: imports take some of them."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0
