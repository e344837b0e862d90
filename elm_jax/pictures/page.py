"""The frame of a report: one HTML page with its style and script inside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from elm_jax.errors import printable

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #16161d; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #e6e6ea }
h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #e6e6ea; text-align: left; vertical-align: top }
th { font-weight: 600; background: #f7f7f9 }
small { color: #6b6b76; white-space: nowrap }
figure { margin: 1rem 0 } figure img { width: 100%; border: 1px solid #e6e6ea } figure[hidden] { display: none }
pre { white-space: pre-wrap; background: #f7f7f9; padding: .6rem } svg { max-width: 100%; height: auto; display: block }
table.counts :is(th, td) { padding: .2rem .25rem }
td > small { display: block } td[style] small { color: inherit }
.right { color: #1f7a4d } .wrong { color: #b3261e } nav a { margin-right: 1rem }
"""

_SCRIPT = """
"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll("figure.card")];
  let place = 0;
  const show = () => {
    const kind = by("kind").value, mark = by("mark").value;
    const fits = cards.filter((c) => (!kind || c.dataset.kind === kind) && (!mark || c.dataset.mark === mark));
    place = fits.length ? (place + fits.length) % fits.length : 0;
    cards.forEach((card) => { card.hidden = card !== fits[place]; });
    by("place").textContent = fits.length ? `${place + 1} of ${fits.length}` : "none";
  };
  if (cards.length) {
    ["kind", "mark"].forEach((id) => by(id).addEventListener("change", () => { place = 0; show(); }));
    by("back").addEventListener("click", () => { place -= 1; show(); });
    by("next").addEventListener("click", () => { place += 1; show(); });
    document.addEventListener("keydown", (event) => {
      if (event.target.tagName === "INPUT" || event.target.tagName === "SELECT") return;
      if (event.key === "ArrowLeft") { place -= 1; show(); }
      if (event.key === "ArrowRight") { place += 1; show(); }
    });
    show();
  }
  if (!by("rows")) return;
  const rows = JSON.parse(by("rows").textContent);
  const row = (cells, name) => {
    const line = document.createElement("tr");
    cells.forEach((text, column) => {
      const cell = document.createElement(name);
      cell.textContent = text;
      if (column === 5) cell.className = text;
      line.append(cell);
    });
    return line;
  };
  const list = () => {
    const words = by("search").value.toLowerCase();
    const fits = rows.filter((cells) => cells.join(" ").toLowerCase().includes(words));
    const head = row(["id", "kind", "question", "answer", "truth", "", "seconds"], "th");
    by("answers").replaceChildren(head, ...fits.slice(0, 100).map((cells) => row(cells, "td")));
    by("hits").textContent = `${fits.length} of ${rows.length}${fits.length > 100 ? ", the first 100 shown" : ""}`;
  };
  by("search").addEventListener("input", list);
  list();
})();
"""


def page(title: str, intro: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of sections (heading, HTML), printable. It loads nothing: its policy forbids it."""
    places = [(f"s{i}", name, body) for i, (name, body) in enumerate(sections)]
    links = "".join(f'<a href="#{place}">{escape(name)}</a>' for place, name, _ in places)
    bodies = "".join(f'<h2 id="{place}">{escape(name)}</h2>{body}' for place, name, body in places)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return printable(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>{intro}<nav>{links}</nav>{bodies}<script>{_SCRIPT}</script></body></html>\n",
        but="\n\t",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first cell of a row and the heads are text, the other cells HTML."""
    names = "".join(f"<th>{breakable(name)}</th>" for name in head)
    body = "".join(
        f"<tr><td>{escape(first)}</td>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f"<table><tr>{names}</tr>{body}</table>"


def breakable(name: str) -> str:
    """A name as HTML, which a narrow column may break behind its dots and underscores."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")
