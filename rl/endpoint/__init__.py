"""Answers of a language model behind an OpenAI-compatible endpoint or in a local directory.

    client = Client.from_environment("judge", cache="runs/mine/answers")
    answer = client.ask(Ask([{"role": "user", "content": "Is 2 + 2 = 4? Answer yes or no."}], max_tokens=8))

Requests are concurrent, limited in time and retried. Every answer is stored by the content of its request, so that a
repeated request costs nothing, and a cost ceiling stops before it is exceeded.
"""

from rl.endpoint.ask import Answer, Ask, InvalidAnswer
from rl.endpoint.cache import AnswerCache
from rl.endpoint.client import Client, Limits
from rl.endpoint.cost import CostCeiling, Ledger, Price
from rl.endpoint.errors import EndpointError, RefusedRequest
from rl.endpoint.local import LocalModel
from rl.endpoint.remote import RemoteModel

__all__ = [
    "Answer", "AnswerCache", "Ask", "Client", "CostCeiling", "EndpointError", "InvalidAnswer", "Ledger", "Limits",
    "LocalModel", "Price", "RefusedRequest", "RemoteModel",
]  # fmt: skip
