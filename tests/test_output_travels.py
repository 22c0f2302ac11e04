"""Files and answers that go elsewhere: cells of CSV that are no formulas, requests that are no JSON."""

import csv
import io
import json

import pytest

from cratelm.records import Interval
from cratelm.text.table import Column, Table, csv_text

FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "=HYPERLINK(\"http://x\")", "-x", "+cmd|' /C calc'!A0", "＝1", " =1", "  @x", "\t=1", "\r=1"]  # fmt: skip
PLAIN = ["crate-2l", "a=b", "-0.5", "+1e-3", "-1", "", "–", "'=1", "1-2", "x@y"]


@pytest.mark.parametrize("text", FORMULAS)
@pytest.mark.fault(
    "text in a CSV file that a spreadsheet would take for a formula",
    "a `'` before it makes it text",
)
def test_a_formula_becomes_text(text):
    assert csv_text(text) == f"'{text}"


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_and_numbers_stay(text):
    assert csv_text(text) == text


def test_every_cell_of_a_table_is_text_or_a_number():
    cells = [*FORMULAS, *PLAIN]
    columns = (
        Column("name", "name"),
        Column("value", "value", ".2f"),
        Column("mean", "mean", ".2f"),
    )
    rows = tuple((cell, -1.5, Interval(-2.0, -3.0, -1.0)) for cell in cells)
    table = Table("t", "T", columns, rows)
    read = list(csv.reader(io.StringIO(table.to_csv())))[1:]
    assert len(read) == len(cells)
    for (name, *numbers), cell in zip(read, cells, strict=True):
        assert numbers == ["-1.5", "-2.0", "-3.0", "-1.0"]
        begins = name.lstrip(" ")[:1]
        assert begins not in "=+-@\t\r" or not begins or csv_text(cell) == cell
    # JSON keeps the text as it is: no spreadsheet evaluates it
    assert next(r["name"] for r in table.records()) == "=1+1"


@pytest.mark.parametrize("address", ["activations", "strongest", "steer"])
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b"[" * 20_000 + b"]" * 20_000,
        b'{"text": "\xff\xfe"}',
        b"\xff\xfe\x00",
        b"\x00",
        b"{",
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"NaN",
        b'{"model": NaN}',
        b'{"model": 1e999, "text": "a", "layer": 1e400, "neuron": 0}',
        b'{"model": "crate-2l", "text": "\\ud800", "layer": 0, "neuron": 99999999999999999999}',
        b'{"model": "crate-2l", "text": "a", "layer": ' + b"9" * 5000 + b', "neuron": 0}',
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.fault(
    "the live page is sent deep or non-UTF-8 JSON, or something else", "status 400 with the reason"
)
def test_a_body_that_is_no_request_is_a_400_that_says_so(client, address, body):
    headers = {"origin": "http://127.0.0.1", "content-type": "application/json"}
    answer = client.post(f"/api/r/run/live/{address}", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    error = json.loads(answer.text)["error"]
    assert "no such page" not in error
    assert "\n" not in error
    assert len(error) < 300
