"""Tables of other programs through the commands: a database in, its types out; streams; a comparison."""

import io
import sqlite3
import sys

import numpy as np
import pandas as pd
import pytest
from command_line import ONE_FLOW, TABLE, N, files

RNG = np.random.default_rng(0)
PEOPLE = TABLE[["x", "count"]].assign(
    day=pd.Timestamp("2024-01-01") + pd.to_timedelta(RNG.integers(0, 90, N), "D"), still=1.0
)


@pytest.fixture
def trained(here, tmp_path):
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        PEOPLE.to_sql("people", connection, index=False)
        TABLE.to_sql("more", connection, index=False)
    query = ["--query", "select x, count, date(day) as day, still from people"]
    code, out, err = here("density", "a.sqlite", *query, *ONE_FLOW, "--out", "run")
    assert code == 0, err
    assert "left out columns: 'still' is constant" in err
    assert "samples and test rows are" in out
    return query


def test_a_database_is_scored_sampled_and_compared(trained, here, tmp_path, monkeypatch):
    assert here("sample", "run", "-n", 30, "--out", "drawn.csv")[0] == 0
    drawn = pd.read_csv(tmp_path / "drawn.csv")
    assert list(drawn) == list(PEOPLE) and drawn["count"].dtype == np.int64 and (drawn.still == 1).all()
    assert drawn.day.str.fullmatch(r"20\d\d-\d\d-\d\d").all()
    code, told, _ = here("score", "run", "a.sqlite", *trained, "--out", "scores.parquet")
    assert code == 0 and "120 rows: mean log density" in told
    before = files(tmp_path)
    text = drawn.to_csv(index=False, sep=";", decimal=",").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    sink = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", sink)
    from counterflow.cli import main

    assert main(["score", "run", "-", "--out", "-"]) == 0
    scored = pd.read_csv(io.BytesIO(sink.buffer.getvalue()))
    assert list(scored) == [*PEOPLE, "log_density"] and len(scored) == 30 and files(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    PEOPLE.to_csv(tmp_path / "before.csv", index=False)
    PEOPLE.assign(x=PEOPLE.x + 5).to_csv(tmp_path / "after.csv", index=False)
    code, told, _ = here("compare", "run", "before.csv", "after.csv")
    assert code == 0 and "the distribution has moved" in told and "moved: x\n" in told
    code, _, err = here("compare", "run", "before.csv", "nowhere.csv")
    assert code == 2 and "got nowhere.csv, which does not exist" in err
