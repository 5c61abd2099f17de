"""A client of the service: `Client`, and `AsyncClient` with the same methods to be awaited.

    from raylway.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answers = client.predict([{"length": 12.5, "width": 2.0, "colour": "red"}])
        print(answers.predictions, answers.probabilities)

It imports neither Ray nor torch, and pandas or Arrow only if it is given their tables.
"""

from raylway.client.answers import Answers, Input, Model, Problem, RequestFailed, Signature
from raylway.client.clients import AsyncClient, Client

__all__ = ["Answers", "AsyncClient", "Client", "Input", "Model", "Problem", "RequestFailed", "Signature"]
