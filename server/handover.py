"""Settings on their way from the hub to front ends in processes of their own."""

import json

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from server.settings import Settings


def to_json(settings: Settings) -> str:
    """All settings, as `from_json` reads them. Of keys there is only the hash."""
    values = settings.model_dump(mode="json", by_alias=True, exclude={"api_keys_file"})
    for key in values["api_keys"].values():
        key["key"] = [f"sha256:{digest}" for digest in key.pop("sha256")]
    return json.dumps(values)


class _Given(Settings):
    """Settings that are what they were given as, whatever this process's environment says."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def from_json(text: str) -> Settings:
    """The settings that `to_json` has written."""
    return _Given(**json.loads(text))
