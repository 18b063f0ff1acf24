"""OpenAI's API over an engine: models, completions, chats; adapters that are loaded and unloaded.

`app(service)` is an ASGI app. A request's `model` is the base's name or an adapter's. Every error
has OpenAI's format. A field that is not supported and would change an answer is refused
(bodies.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router

from lora_jax.serving.api import bodies, json_body
from lora_jax.serving.api.bodies import Ask
from lora_jax.serving.api.connection import EventStream, read_body, while_connected
from lora_jax.serving.api.driver import FAILED, STOPPED, Ended
from lora_jax.serving.api.errors import ended, invalid
from lora_jax.serving.api.fields import Fields
from lora_jax.serving.api.generation import Generation, Service
from lora_jax.serving.api.guard import HEALTH, Guard
from lora_jax.serving.api.metrics import Metrics


def app(service: Service) -> Guard:
    """The ASGI app."""
    metrics = Metrics(lambda: {**service.driver.stats, "adapters": len(service.catalog)})
    endpoints = _Endpoints(service, metrics)
    routes = [
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model:path}", endpoints.one_model),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/load_lora_adapter", endpoints.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", endpoints.unload, methods=["POST"]),
        Route("/metrics", endpoints.metrics),
        Route(HEALTH, endpoints.health),
    ]
    return Guard(
        Router(routes, redirect_slashes=False),
        api_key=service.api_key,
        requests=service.limits.requests,
        answered=metrics.answered,
    )


class _Endpoints:
    """One method a route."""

    def __init__(self, service: Service, metrics: Metrics):
        self._service, self._metrics = service, metrics

    async def health(self, request: Request) -> Response:
        self._check_available()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": Metrics.content_type})

    async def models(self, request: Request) -> Response:
        catalog = self._service.catalog
        names = [catalog.base, *(known.name for known in catalog)]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._service.catalog.chosen(name)
        return JSONResponse(self._card(name))

    async def load(self, request: Request) -> Response:
        fields = await self._fields(request)
        name, path = fields.text("lora_name"), fields.text("lora_path")
        fields.finish({"load_inplace": (False,)}, ["lora_int_id", "base_model_name"])
        if "\0" in path:
            raise invalid("lora_path", "lora_path has a NUL, which no path has.")
        with _ended_as_error():
            await self._service.catalog.load(name, Path(path), self._service.driver)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        fields = await self._fields(request)
        name = fields.text("lora_name")
        fields.finish({}, ["lora_int_id"])
        with _ended_as_error():
            await self._service.catalog.unload(name, self._service.driver)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, bodies.completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, bodies.chat)

    async def _generate(
        self, request: Request, read: Callable[[Mapping[str, Any]], Ask]
    ) -> Response:
        self._check_available()
        body = await read_body(request, self._service.limits)
        generation = Generation(self._service, self._metrics)
        try:
            ask = await while_connected(request.receive, generation.begin(body, read))
            if ask.stream:
                return EventStream(generation)  # which closes it
            answer = await while_connected(request.receive, generation.whole())
        except BaseException:
            generation.close()
            raise
        generation.close()
        return JSONResponse(answer)

    async def _fields(self, request: Request) -> Fields:
        self._check_available()
        return Fields(json_body.parse(await read_body(request, self._service.limits)))

    def _check_available(self) -> None:
        if self._service.driver.failed:
            raise ended(FAILED)
        if self._service.driver.draining:
            raise ended(STOPPED)

    def _card(self, name: str) -> dict[str, Any]:
        """As OpenAI describes a model, and as vLLM describes an adapter."""
        catalog, model = self._service.catalog, self._service.model
        known = catalog.get(name)
        return {
            "id": name,
            "object": "model",
            "created": catalog.created if known is None else known.created,
            "owned_by": "lora_jax",
            "root": name if known is None else str(known.folder),
            "parent": None if known is None else catalog.base,
            "max_model_len": model.context_length,
        }


@contextlib.contextmanager
def _ended_as_error() -> Iterator[None]:
    try:
        yield
    except Ended as error:
        raise ended(error.reason) from None
