"""Ask a server for recommendations, and watch it think.

reasonrec serve --model runs/demo/published
python examples/serve_client.py http://127.0.0.1:8000 50 181 172
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any


def ask(url: str, **question: Any) -> Any:
    """The open answer to a question."""
    headers = {"content-type": "application/json"}
    if token := os.environ.get("REASONREC_TOKEN"):
        headers["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(f"{url}/v1/recommend", json.dumps(question).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def main() -> None:
    url, *history = sys.argv[1:]
    with ask(url, history=history, k=5) as answer:
        (result,) = json.load(answer)["results"]
    for rank, item in enumerate(result["items"], start=1):
        print(f"{rank:>3}  {item['title']}  ({item['id']}, {item['score']:.2f})")

    print("\nwith a chain of thought:")
    name = ""
    with ask(url, history=history, k=5, mode="reasoning", explain=True, stream=True) as answer:
        for line in answer:  # server-sent events: a line with the name, a line with the data, an empty line
            field, _, value = line.decode().strip().partition(": ")
            if field == "event":
                name = value
            elif field == "data" and name == "thought":
                print(f"  … {json.loads(value)['text'][-60:]}")
            elif field == "data":
                result = json.loads(value)
                print(result.get("detail") or result["note"] or result["thoughts"][0])
                for item in result.get("items", []):
                    print(f"     {item['title']}")


if __name__ == "__main__":
    main()
