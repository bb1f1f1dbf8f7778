"""Templates become pages: whatever the data holds is escaped, and images are small copies inside of the page."""

import base64
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dpn_cli.data.samples import Sample
from dpn_cli.notation import nats, percent

THUMBNAIL_PX = 160
THUMBNAILS = 3  # per sample
LONGEST_TEXT = 600  # characters of a question or an answer


def render_page(package: str, template: str, **values: Any) -> str:
    """Return a page.

    Args:
        package: Package that has the template; those of this package are there for it to extend.
        template: File name of the template.
        **values: What the template shows.

    Raises:
        DataError: if an image cannot be read.
    """
    text = _environment(package).get_template(template).render(**values)
    return text.encode("utf-8", "backslashreplace").decode()  # file names may hold lone surrogates


@cache
def _environment(package: str) -> Environment:
    """Return what finds a package's templates, and keeps those that it has compiled."""

    def load(name: str) -> str | None:
        found = (files(each) / name for each in (package, "dpn_cli.pages"))
        return next((path.read_text("utf-8") for path in found if path.is_file()), None)

    environment = Environment(
        loader=FunctionLoader(load), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent, nats=nats, shorten=_shorten, breakable=_breakable, thumbnails=thumbnails
    )
    return environment


def thumbnails(sample: Sample) -> list[str]:
    """Return small copies of a sample's first images, as data URIs."""
    return [_data_uri(image) for image in sample.open_images()[:THUMBNAILS]]


def _data_uri(image: Image.Image) -> str:
    small = image.copy()  # a picture in memory is the caller's own
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = BytesIO()
    small.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _breakable(value: object) -> Markup:
    """Let a line break after the commas of a route, or of a sentence with one."""
    return Markup(",<wbr>").join(str(value).split(","))


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
