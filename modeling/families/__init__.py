"""Checkpoint families. A family whose blocks exist is one new file here and one line in `FAMILIES`."""

from modeling.families.base import Config, ConfigError, Family, Role, TensorMap, key_rows
from modeling.families.delta_net import DeltaNet
from modeling.families.gated_deltanet import GatedDeltaNet
from modeling.families.olmo_hybrid import OlmoHybrid
from modeling.families.qwen import Qwen

__all__ = ["FAMILIES", "Config", "ConfigError", "Family", "Role", "TensorMap", "family_of", "key_rows"]

_ALL: tuple[Family, ...] = (GatedDeltaNet(), DeltaNet(), Qwen(), OlmoHybrid())

FAMILIES: dict[str, Family] = {model_type: family for family in _ALL for model_type in family.model_types}
"""Families by the `model_type` of a config.json."""


def family_of(config: Config) -> Family:
    """The family of a checkpoint, by its config's `model_type`. Raises ConfigError for one that we don't have."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"config.json: model_type={model_type!r} is not supported; known families: {known}")
    return FAMILIES[model_type]
