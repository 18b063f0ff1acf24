"""Chat templates, rendered as transformers renders them, in a sandbox that also bounds their work.

A template comes with a model from the internet, so it is an untrusted program.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from lora_jax.data.sandbox import BoundedEnvironment, bounded


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    **special_tokens: str,
) -> str:
    """The conversation as the text that a model reads.

    Args:
      template: Jinja source, such as a tokenizer's `chat_template`.
      messages: a conversation; keys whose value is None count as absent.
      add_generation_prompt: end with the opening of an assistant message.
      **special_tokens: `bos_token`, `eos_token` and the like, by the names that templates use.

    Raises:
      ValueError: the template is not valid Jinja, fails, refuses the conversation (with its own
        message), or does more work than a chat needs.
    """
    plain = [{key: v for key, v in message.items() if v is not None} for message in messages]
    try:
        with bounded():
            return _compiled(template).render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template is not valid Jinja, line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise ValueError("The chat template failed: its macros recurse without end.") from error
    except Exception as error:  # a template may raise anything that Python can
        raise ValueError(
            f"The chat template failed: {str(error) or type(error).__name__}"
        ) from error


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.add_filter("tojson", _tojson)
    return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
    """Tolerates `{% generation %}` blocks, which mark what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block as in transformers, so that the body's variables stay local to it.
        call = self.call_method("_body", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
