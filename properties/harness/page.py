"""The verdicts as a page of HTML: in one file, which needs no network and no script."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from properties.harness import report
from properties.harness.columns import cell
from properties.harness.facts import Verdict
from properties.harness.report import shown
from properties.harness.specification import sentences

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --line: #d1d9e0; --box: #f6f8fa;
  --good: #116329; --bad: #a40e26; --none: #59636e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #3d444d;
  --box: #151b23; --good: #4ac26b; --bad: #ff8182; --none: #9198a1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1, summary { overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
pre { padding: .7rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--box); font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.copy { user-select: all; }
.good { color: var(--good); } .bad { color: var(--bad); } .none { color: var(--none); }
.soft { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom-width: 2px; } tbody th { font-weight: normal; overflow-wrap: anywhere; }
td { white-space: nowrap; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; } summary:focus-visible { outline: 2px solid; outline-offset: 2px; }
details p { margin: .3rem 0 0 1rem; } section > details { margin: .8rem 0; }
@media (max-width: 45rem) {
  thead { position: absolute; clip-path: inset(50%); }
  tbody tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  tbody th, tbody td { display: block; border: 0; padding: .1rem 0; white-space: normal; overflow-wrap: anywhere; }
  td::before { content: attr(data-name) ": "; color: var(--soft); }
}
"""


def page(verdicts: Sequence[Verdict], header: Mapping[str, Any], trouble: str) -> str:
    """Return the page.

    Parameters
    ----------
    verdicts : sequence of Verdict
    header : dict
        Of the run.
    trouble : str
        Why the verdicts say too little, if they do.
    """
    names = list(dict.fromkeys(row.implementation for row in verdicts))
    title = f"{', '.join(names) or 'Nothing'}: {conclusion(verdicts, trouble)}"
    wrong = [row for row in verdicts if row.went_wrong]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(counted(verdicts))}</p>",
        *([f'<p class="bad">{escape(trouble)}</p>'] if trouble else []),
        *(["<section>", "<h2>Failures</h2>", *failures(wrong, len(names) > 1), "</section>"] if wrong else []),
        "<h2>Laws</h2>",
        table(verdicts, names),
        "<h2>The run</h2>",
        f"<pre>{escape(chr(10).join(report.summary(verdicts)))}</pre>",
        f'<p class="soft">{"<br>".join(escape(line) for line in about(header))}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def conclusion(verdicts: Sequence[Verdict], trouble: str) -> str:
    """Return the verdicts in a word or two."""
    found = {row.verdict for row in verdicts}
    if "fail" in found:
        return "fails"
    if "error" in found:
        return "not complete"
    if trouble or not any(row.passed for row in verdicts):
        return "says too little"
    return "passes (quick)" if "pass (quick)" in found else "passes"


def counted(verdicts: Sequence[Verdict]) -> str:
    """Return how many verdicts there are of each kind."""
    kinds = ("pass", "pass (quick)", "fail", "error", "not claimed")
    counts = {kind: sum(row.verdict == kind for row in verdicts) for kind in kinds}
    return ", ".join(f"{kind}: {count}" for kind, count in counts.items() if count)


def about(header: Mapping[str, Any]) -> Iterable[str]:
    """Return where the verdicts come from."""
    yield from header.get("about", ())
    yield f"{header.get('date', '')}, {header.get('seconds', 0):g} s, on {header.get('device', '')}"
    yield header.get("command", "")


def failures(wrong: Sequence[Verdict], several: bool) -> Iterable[str]:
    """Return all there is to say of the failures, then the laws without a result, by the reason for it."""
    for row in wrong:
        if row.verdict == "fail":
            yield failure(row, several)
    errors = [row for row in wrong if row.verdict == "error"]
    for message in dict.fromkeys(row.message for row in errors):
        rows = [row for row in errors if row.message == message]
        items = "".join(f'<li>{sentence(row)}<pre class="copy">{escape(row.replay)}</pre></li>' for row in rows)
        title = f'<b class="bad">no result</b> for {len(rows)}: {escape(message.partition(chr(10))[0])}'
        yield f"<details><summary>{title}</summary><pre>{escape(message)}</pre><ul>{items}</ul></details>"


def failure(row: Verdict, several: bool) -> str:
    """Return all there is to say of a failure; whose it is, where there are several implementations."""
    problem = f"<h3>Smallest problem found</h3><pre>{escape(row.failing_problem)}</pre>" if row.failing_problem else ""
    whose = f' <span class="soft">{escape(row.implementation)}</span>' if several else ""
    return (
        f'<details open><summary><b class="bad">fail</b> {sentence(row)}{whose}</summary>{specified(row)}'
        f"<pre>{escape(row.message)}</pre>{problem}"
        f'<h3>See it again</h3><pre class="copy">{escape(row.replay)}</pre></details>'
    )


def sentence(row: Verdict) -> str:
    """Return a law as the sentence that its name is."""
    fixture = report.fixture(row)
    return escape((shown(row.law) + fixture).replace("_", " "))


def specified(row: Verdict) -> str:
    """Return what `SPEC.md` says where a law comes from."""
    said = sentences()
    lines = (f'<p class="soft">SPEC {x}: {escape(said.get(x, ""))}</p>' for x in row.sections)
    return "".join(lines)


def table(verdicts: Sequence[Verdict], names: Sequence[str]) -> str:
    """Return a table with a line for each law and a column for each implementation."""
    single = len(names) == 1
    heads = ["verdict", "error / bound"] if single else names
    lines = [f"<tr><th scope=col>law</th>{''.join(f'<th scope=col>{escape(x)}</th>' for x in heads)}</tr>"]
    for law in dict.fromkeys(row.law for row in verdicts):
        of = [[row for row in verdicts if (row.law, row.implementation) == (law, name)] for name in names]
        first = next(row for rows in of for row in rows)
        cells = [(head, cell(rows), kind(rows)) for head, rows in zip(names, of, strict=True)]
        if single:
            worst = max(of[0], key=lambda row: row.ratio)
            ratio = report.brief(worst.ratio) if worst.examples else ""
            cells = [("verdict", cells[0][1], cells[0][2]), ("error / bound", ratio, "")]
        detail = specified(first)
        text = escape(shown(law).replace("_", " "))
        name = f"<details><summary>{text}</summary>{detail}</details>" if detail else text
        columns = (f'<td class="{k}" data-name="{escape(head)}">{escape(x)}</td>' for head, x, k in cells)
        lines.append(f"<tr><th scope=row>{name}</th>{''.join(columns)}</tr>")
    return f"<table><thead>{lines[0]}</thead><tbody>\n{chr(10).join(lines[1:])}\n</tbody></table>"


def kind(rows: Sequence[Verdict]) -> str:
    """Return the class of some verdicts: whether they are good."""
    if any(row.went_wrong for row in rows):
        return "bad"
    return "good" if any(row.passed for row in rows) else "none"
