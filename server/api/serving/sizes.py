"""What requests and saved states of a variant take, in bytes, from what its engine has said of itself."""

from typing import NamedTuple

from server.wire.messages import PAGE_TOKENS, Ready


class Held(NamedTuple):
    """Bytes that a request holds, by what they are for."""

    recurrent: int
    """The recurrent states, with the scales of those in int8. They are as large after any number of tokens."""
    conv: int
    """The last inputs of the short convolutions, as many after any number of tokens too."""
    kv: int
    """The pages of keys and values of softmax attention, which come with the tokens."""

    @property
    def total(self) -> int:
        return sum(self)


def held(info: Ready, pages: int) -> Held:
    """What a request with so many pages holds."""
    conv = info.conv_bytes_per_request
    return Held(info.state_bytes_per_request - conv, conv, pages * info.bytes_per_page)


def pages_for(info: Ready, tokens: int) -> int:
    """How many pages a state of that many tokens has; 0 for a model without softmax attention."""
    return -(-tokens // PAGE_TOKENS) if info.bytes_per_page else 0


def kv_bytes_per_token(info: Ready) -> int:
    """How much a saved state grows by with each token, and a request on the average; 0 without softmax attention."""
    return info.bytes_per_page // PAGE_TOKENS


def saved_bytes(info: Ready, tokens: int) -> int:
    """Bytes of the tensors of a saved state of that many tokens, whose last page is not padded."""
    return info.state_bytes_per_request + tokens * kv_bytes_per_token(info)
