"""Texts and conversations to token ids and back, in vLLM's form."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from expertmesh.server.body import Body, Integer, Items, Text
from expertmesh.server.errors import ApiError
from expertmesh.server.openai.schema import Conversation
from expertmesh.server.service import Service


class TokenizeText(Body):
    model: str | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def tokens(self, service: Service) -> list[int]:
        return service.tokenizer.encode(self.prompt, special=self.add_special_tokens)


class TokenizeConversation(Conversation):
    model: str | None = None
    return_token_strs: bool | None = None

    def tokens(self, service: Service) -> list[int]:
        return service.open(self.turn()).tokens


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("prompt")] | Annotated[TokenizeConversation, Tag("messages")],
    Discriminator(lambda body: "messages" if isinstance(body, dict) and "messages" in body else "prompt"),
]


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Items[Annotated[Integer, Field(ge=0)]]


def tokens_of(body: TokenizeText | TokenizeConversation, service: Service) -> dict[str, Any]:
    tokens = body.tokens(service)
    texts = [service.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": service.intake.max_context,
        "tokens": tokens,
        "token_strs": texts,
    }


def text_of(body: DetokenizeRequest, service: Service) -> dict[str, Any]:
    size = service.intake.model.vocab_size
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise ApiError(400, f"token id {wrong} is outside the vocabulary of {size}", "tokens")
    return {"prompt": service.tokenizer.decode(body.tokens, special=True)}
