"""What the server's settings accept."""

import pytest
from pydantic import ValidationError

from modeling.spec import TOKEN_BLOCK
from server.settings import Settings


@pytest.mark.parametrize(
    ("text", "value"),
    [("2GiB", 2**31), ("0.5", 0.5), ("1048576", 2**20), ("1.5GB", 1_500_000_000), ("64 MiB", 2**26)],
)
def test_state_memory_is_a_size_or_a_share(text, value):
    memory = Settings(state_memory=text).state_memory
    assert memory == value and type(memory) is type(value)


@pytest.mark.parametrize("text", ["0", "1", "1.0", "x", "-1", "-0.5", "GiB", "nan"])
def test_other_state_memory_is_refused(text):
    with pytest.raises(ValidationError):
        Settings(state_memory=text)


def test_prompts_are_cut_at_whole_token_blocks():
    """Settings are read where no torch is, and can't take the number from where it stands."""
    rules = {type(rule).__name__: rule for rule in Settings.model_fields["prefill_tokens"].metadata}
    assert rules["Ge"].ge == rules["MultipleOf"].multiple_of == TOKEN_BLOCK
