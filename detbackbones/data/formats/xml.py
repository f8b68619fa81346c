"""Reading XML with the lines of its elements, and without entities, which can fill the memory."""

import re
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from .findings import Findings

Lines = dict[ElementTree.Element, int]


def files_of(root: str, found: Findings) -> list[Path]:
    """The XML files of a folder whose root seems to be an element of that name."""
    return [x for x in found.files if x.suffix == ".xml" and _begins(x, root)]


def _begins(file: Path, root: str) -> bool:
    with file.open("rb") as content:
        return bool(re.search(rf"<{root}[\s>]".encode(), content.read(2000)))


def read_xml(file: Path, found: Findings) -> tuple[ElementTree.Element, Lines] | None:
    """The root of a document and the lines of its elements; None and a fault if it cannot be read.

    It must be XML and declare no entities.
    """
    builder, lines = ElementTree.TreeBuilder(), {}
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        lines[builder.start(name, attributes)] = parser.CurrentLineNumber

    def refuse(*_: object) -> None:
        raise ValueError("it declares an entity, which is not read")

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        found.fault(file, error.lineno, f"it must be XML: {expat.ErrorString(error.code)}")
        return None
    except LookupError as error:  # an encoding that there is not
        found.fault(file, 1, f"it must be XML: {error}")
        return None
    except ValueError as error:
        found.fault(file, parser.CurrentLineNumber, str(error))
        return None
    return builder.close(), lines
