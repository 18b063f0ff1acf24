"""The base as the API uses it: its name, its tokenizer and its limits."""

import dataclasses

from lora_jax.data.chat import render
from lora_jax.data.tokenizer import Tokenizer
from lora_jax.serving.api.bodies import Ask, Prompt
from lora_jax.serving.api.errors import ApiError, invalid

_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A base as the API uses it. `context_length` counts prompt and answer."""

    name: str
    tokenizer: Tokenizer
    context_length: int
    vocab_size: int

    def tokens(self, ask: Ask) -> tuple[tuple[int, ...], ...]:
        """The tokens of each prompt.

        Raises:
          ApiError: 400 for a prompt that is empty, too long or has an unknown token; for a chat
            that the template refuses, or without a template.
        """
        if ask.is_chat:
            return (self._fitting(self._chat(ask), "messages"),)
        several = len(ask.prompts) > 1
        names = [f"prompt[{i}]" if several else "prompt" for i in range(len(ask.prompts))]
        return tuple(
            self._fitting(self._prompt(prompt, name), name)
            for prompt, name in zip(ask.prompts, names, strict=True)
        )

    def token_text(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes, None where it is part of a character."""
        text = self.tokenizer.decode([token])
        return text, None if _REPLACEMENT in text else list(text.encode("utf-8"))

    def _chat(self, ask: Ask) -> tuple[int, ...]:
        template = self.tokenizer.chat_template
        if template is None:
            raise ApiError(
                400,
                f"The base {self.name} has no chat template. Use /v1/completions with the text as "
                "the model should read it, or serve a base whose folder has a chat_template.jinja.",
                param="messages",
                code="no_chat_template",
            )
        named = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        special = {name: token for name, token in named.items() if token is not None}
        try:
            text = render(template, ask.messages, add_generation_prompt=True, **special)
            return tuple(self.tokenizer.encode(text))
        except ValueError as error:
            raise invalid("messages", str(error)) from None

    def _prompt(self, prompt: Prompt, param: str) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        try:
            tokens = self.tokenizer.encode(prompt)
        except ValueError as error:
            raise invalid(param, str(error)) from None
        begin = self._begin()
        return (*begin, *tokens) if tuple(tokens[: len(begin)]) != begin else tuple(tokens)

    def _begin(self) -> tuple[int, ...]:
        """The beginning token, where the model's tokenizer adds it to a text by itself."""
        added = self.tokenizer.core.encode("", add_special_tokens=True).ids[:1]
        return tuple(token for token in added if token == self.tokenizer.bos_id)

    def _fitting(self, tokens: tuple[int, ...], param: str) -> tuple[int, ...]:
        if not tokens:
            raise invalid(param, f"{param} is empty, expected at least one token.")
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                message = f"{param} has the token {token}, expected 0 to {self.vocab_size - 1}."
                raise invalid(param, message)
        if len(tokens) >= self.context_length:
            raise invalid(
                param,
                f"{param} has {len(tokens)} tokens, which leaves no room for an answer in a "
                f"context of {self.context_length}.",
                "context_length_exceeded",
            )
        return tokens
