"""Reading XML with the lines of its elements, and without entities, which can fill the memory."""

from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat


class Lines(dict):
    """The line of each element of a document."""


def read_xml(file: Path) -> tuple[ElementTree.Element, Lines]:
    """The root of a document, and the lines of its elements.

    Raises:
        ValueError: if it is no XML, or declares entities; one sentence with the line.
    """
    builder, lines = ElementTree.TreeBuilder(), Lines()
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        lines[builder.start(name, attributes)] = parser.CurrentLineNumber

    def refuse(*_: object) -> None:
        raise ValueError(
            f"line {parser.CurrentLineNumber}: it declares an entity, which is not read"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise ValueError(f"line {error.lineno}: it must be XML: {reason}") from error
    return builder.close(), lines
