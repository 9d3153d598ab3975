"""The command line as a user calls it, and what is in a report."""

from html.parser import HTMLParser


def call(*arguments):
    """(exit code, what it printed on stdout and stderr)."""
    from typer.testing import CliRunner

    from moda_ext.cli import app

    wide = {"COLUMNS": "1000"}  # rich breaks lines, and paths, where the terminal ends
    result = CliRunner().invoke(app, list(map(str, arguments)), env=wide)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


class Page(HTMLParser):
    """The images, their descriptions, and everything that a page would load."""

    def __init__(self, text):
        super().__init__()
        self.images, self.loads, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.loads += [value for key, value in attributes.items() if key in ("src", "href", "srcset", "data")]
