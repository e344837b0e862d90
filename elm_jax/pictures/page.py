"""Pages and other texts out of the templates of the package."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from elm_jax.errors import printable

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1] / "templates"), autoescape=select_autoescape(("html", "svg")),
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.do"],
)  # fmt: skip


def filled(template: str, **values: Any) -> str:
    """The template filled in, printable; what goes into one of HTML is escaped."""
    return printable(_TEMPLATES.get_template(template).render(values).strip(), but="\n\t") + "\n"
