"""Writes the data of serve.py: an SQLite database of 100 MB (106 before
it is packed), always the same."""

import math
import random
import sqlite3
import sys

STATIONS, SIZE = 1000, 106_000_000
SKIES = ["clear", "few clouds", "scattered clouds", "broken clouds", "overcast", "light rain", "rain", "snow", "fog"]


def readings(rng, first, n):
    for at in range(first, first + n):
        for station in range(STATIONS):
            day = math.sin(at / 24 * 2 * math.pi) * 6
            yield (
                station,
                1_600_000_000 + at * 3600,
                round(rng.gauss(12 - station / 100 + day, 3), 1),
                round(min(100, max(5, rng.gauss(70, 15))), 1),
                round(rng.gauss(1013, 8), 1),
                rng.choice(SKIES),
            )


db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA journal_mode = OFF")
db.execute("PRAGMA synchronous = OFF")
db.execute(
    "CREATE TABLE reading (id INTEGER PRIMARY KEY, station INTEGER, at INTEGER,"
    " temperature REAL, humidity REAL, pressure REAL, remark TEXT)"
)
db.execute("CREATE INDEX by_station ON reading (station, at)")
rng, hours = random.Random(4), 0
while db.execute("PRAGMA page_count").fetchone()[0] * 4096 < SIZE:
    db.executemany(
        "INSERT INTO reading (station, at, temperature, humidity, pressure, remark) VALUES (?, ?, ?, ?, ?, ?)",
        readings(rng, hours, 50),
    )
    db.commit()
    hours += 50
db.execute("VACUUM")
db.close()
