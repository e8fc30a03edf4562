"""Rows of a data file, each with its place for messages: JSON lines, a JSON array or a table; UTF-8 or UTF-16."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from farflung.protocol.errors import ConfigError

MAX_LINE_BYTES = 256 * 1024
MAX_WHOLE_BYTES = 128 * 2**20
"""A JSON array, and a file in UTF-16, is read as a whole."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
HEAD_BYTES = 4

Row = tuple[str, bytes, Any]
"""Where the row stands, the bytes it was read from, and what they say."""


def read_rows(path: str) -> Iterator[Row]:
    """Yield the rows of the file in order, few in memory but for an array; ConfigError names what cannot be read."""
    try:
        with Path(path).open("rb") as file:
            yield from rows_of(file, path)
    except OSError as error:
        raise ConfigError(f"cannot read the questions in {path}: {error.strerror}; check the path") from error


def rows_of(file: BinaryIO, path: str) -> Iterator[Row]:
    """The rows of an open file, of whatever form it is."""
    utf8 = as_utf8(file, path)
    if path.lower().endswith((".csv", ".tsv")):
        return table_rows(utf8, path)
    lines = utf8_lines(utf8, path)
    first = next(lines, None)
    if first is not None and first[1].lstrip().startswith(b"["):
        return array_rows(utf8, path)
    return line_rows(first, lines, path)


def as_utf8(file: BinaryIO, path: str) -> BinaryIO:
    """The file itself, or one in UTF-16 as UTF-8."""
    encoding = encoding_of(file.read(HEAD_BYTES))
    file.seek(0)
    return file if encoding == "utf-8" else io.BytesIO(all_text(file, path, encoding).encode())


def encoding_of(head: bytes) -> str:
    """The encoding that the first bytes of a file tell: UTF-16 by its mark or its zeros, else UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) == HEAD_BYTES and head[1] == 0 and head[0] != 0:
        return "utf-16-le"
    return "utf-16-be" if len(head) == HEAD_BYTES and head[0] == 0 and head[1] != 0 else "utf-8"


def all_text(file: BinaryIO, path: str, encoding: str) -> str:
    """All of a file that is read as a whole."""
    data = file.read(MAX_WHOLE_BYTES + 1)
    if len(data) > MAX_WHOLE_BYTES:
        raise ConfigError(f"{path} is over {MAX_WHOLE_BYTES} bytes; write one JSON object a line, in UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeError as error:
        raise not_text(path, encoding, error) from error


def not_text(place: str, encoding: str, error: UnicodeError) -> ConfigError:
    """The error for bytes that are no text in the encoding they seem to have."""
    what = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
    return ConfigError(f"{place} is not text in {encoding.upper().removesuffix('-SIG')} ({what}); save it as UTF-8")


def utf8_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of the lines that are not blank, never holding more than one."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_LINE_BYTES and not line.lstrip().startswith(b"["):
            raise ConfigError(f"{path} line {number} is longer than {MAX_LINE_BYTES} bytes; shorten or remove it")
        if line.strip():
            yield number, line


def line_rows(first: tuple[int, bytes] | None, lines: Iterator[tuple[int, bytes]], path: str) -> Iterator[Row]:
    """Yield the rows of JSON lines, the first of which was read already."""
    if first is not None:
        yield line_row(first, path)
    for line in lines:
        yield line_row(line, path)


def line_row(line: tuple[int, bytes], path: str) -> Row:
    """The row of one line."""
    place = f"{path} line {line[0]}"
    try:
        return place, line[1], parsed(line[1])
    except UnicodeDecodeError as error:
        raise not_text(place, "utf-8", error) from error
    except (ValueError, RecursionError) as error:
        hint = "" if line[1].lstrip().startswith(b"{") else ", or name a table .csv"
        raise ConfigError(f"{place} is not JSON ({error}); write one object a line{hint}") from error


def parsed(text: str | bytes) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""
    return json.loads(text, parse_constant=refuse_constant)


def refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no number")


def array_rows(file: BinaryIO, path: str) -> Iterator[Row]:
    """Yield the items of a JSON array."""
    file.seek(0)
    text = all_text(file, path, "utf-8-sig")
    try:
        items = parsed(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); write an array of objects, or one object a line") from error
    for number, item in enumerate(items, 1):
        yield f"{path} item {number}", json.dumps(item, sort_keys=True).encode(), item


def table_rows(file: BinaryIO, path: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names its columns."""
    csv.field_size_limit(MAX_LINE_BYTES)
    line = 1
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            header = text.readline(MAX_LINE_BYTES)
            delimiter = delimiter_of(header, path)
            names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
            reader = csv.DictReader(text, names, delimiter=delimiter)
            for row in reader:
                line = reader.line_num + 1
                yield table_row(row, f"{path} line {line}")
    except UnicodeError as error:
        raise not_text(f"{path} line {line + 1}", "utf-8", error) from error
    except csv.Error as error:
        raise ConfigError(f"{path} line {line + 1} is no row of a table ({error}); put quotes around it") from error


def delimiter_of(header: str, path: str) -> str:
    """The separator of the columns: the commonest of tab, semicolon and comma in the header."""
    return "\t" if path.endswith(".tsv") else max(",;\t", key=header.count)


def table_row(row: dict[str | Any, Any], place: str) -> Row:
    """One row of a table without its empty cells; ConfigError if it has more cells than the header has names."""
    if None in row:
        raise ConfigError(f"{place} has more cells than the first line has names; put quotes around cells with commas")
    cells = {name: cell for name, cell in row.items() if cell}
    return place, json.dumps(cells, sort_keys=True).encode(), cells
