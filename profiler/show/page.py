"""The frame of the HTML report: its style, its few lines of script, and a policy that lets nothing else in."""

from base64 import b64encode
from hashlib import sha256
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #667079; --line: #e4e7ea; --back: #f7f8f9; --card: #fff;
  --good: #1f7a4d; --bad: #b3392f; --warn: #8a6100; --warn-back: #fff7e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --soft: #949ea9; --line: #2b3138; --back: #14171a;
  --card: #1b1f24; --good: #62c08f; --bad: #ef8378; --warn: #e3be63; --warn-back: #2e2816; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 100rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 1.2rem; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .78rem; font-weight: 600; margin: 2rem 0 .5rem; color: var(--soft); text-transform: uppercase;
  letter-spacing: .06em; }
p { margin: .3rem 0; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
  padding: 1.3rem clamp(.9rem, 2vw, 1.6rem) 1.6rem; }
.reports { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  align-items: start; margin-top: 1.2rem; }
.reports > .card { container-type: inline-size; max-width: 62rem; }
.alone { max-width: 62rem; margin: 0 auto; }
.card > .bar { margin-bottom: .7rem; }
.peak { font-size: 2.1rem; font-weight: 600; letter-spacing: -.02em; line-height: 1.2; margin: .5rem 0 .6rem; }
.peak small { font-size: .9rem; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
.compare { max-width: 60rem; }
th { font-weight: 500; color: var(--soft); font-size: .83rem; text-align: left; vertical-align: bottom; }
td, th { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td:last-child, th:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
tbody tr:last-child > * { border-bottom: 0; }
.sum > * { font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.bar { display: flex; height: 14px; border-radius: 4px; overflow: hidden; background: var(--line); }
.bar > i { flex: none; height: 100%; }
.whole { white-space: nowrap; overflow-wrap: normal; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .5em; }
.row { display: grid; grid-template-columns: 7.5rem 1fr 6.2rem; gap: .8rem; align-items: center; padding: .2rem 0; }
.row > :last-child { text-align: right; }
details details { margin-left: 1.1rem; }
summary { display: grid; grid-template-columns: minmax(0, 1fr) 9rem 6.2rem; gap: .8rem;
  align-items: center; padding: .18rem 0; cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary > :first-child { overflow-wrap: anywhere; }
summary > :first-child::before { content: "\\203a"; display: inline-block; width: 1em; color: var(--soft);
  transition: transform .1s; }
details[open] > summary > :first-child::before { transform: rotate(90deg) translateX(.1em); }
.leaf > summary { cursor: default; } .leaf > summary > :first-child::before { content: ""; }
summary > :last-child { text-align: right; }
summary .bar { height: 8px; }
.times { color: var(--soft); margin-left: .5em; }
figure { margin: 0; overflow-x: auto; padding-top: .3rem; }
svg { display: block; width: 100%; min-width: 30rem; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .phase { stroke: var(--soft); stroke-dasharray: 2 3; opacity: .7; }
svg .at { fill: transparent; } svg .at:hover { fill: var(--ink); fill-opacity: .25; }
output { display: block; min-height: 3em; color: var(--soft); font-size: .85rem; margin-top: .4rem; }
ol { padding-left: 1.4rem; margin: .4rem 0; } li { padding: .25rem 0; overflow-wrap: anywhere; }
.note { background: var(--warn-back); color: var(--warn); border-radius: 6px; padding: .45rem .8rem;
  margin: .8rem 0 0; overflow-wrap: anywhere; }
@container (max-width: 34rem) { .wide { display: none; } .row { grid-template-columns: 5rem 1fr 5.6rem; }
  summary { grid-template-columns: minmax(0, 1fr) 4rem 5.6rem; } details details { margin-left: .7rem; } }
"""

SCRIPT = """
document.querySelectorAll("figure").forEach(function (figure) {
  var told = figure.querySelector("output"), first = told.textContent;
  figure.addEventListener("pointerover", function (event) {
    var title = event.target.querySelector && event.target.closest(".at") && event.target.querySelector("title");
    told.textContent = title ? title.textContent : first;
  });
});
"""


def page(title: str, body: str) -> str:
    """A whole document. `body` is HTML, `title` is text."""
    # Only this very script runs, whatever else might be in the page, and nothing is fetched from anywhere.
    allowed = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
