"""What memory there is, as the system and the container say."""

import pytest

from lowkey.memory import host_memory


@pytest.mark.parametrize(
    ("limit", "used", "kinds", "none"),
    [
        ("memory.max", "memory.current", "memory.stat", "max"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "9223372036854771712",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_what_a_container_has_free_is_its_limit_less_what_it_can_not_give_up(
    monkeypatch, tmp_path, limit, used, kinds, none
):
    monkeypatch.setattr("lowkey.memory._CGROUP", tmp_path)
    everything = host_memory()
    assert everything > 2**20
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("700000\n")
    assert host_memory() == 300_000
    (tmp_path / kinds).write_text("anon 1\nfile 500000\ninactive_file 300000\nactive_file 100000\n")
    assert host_memory() == 700_000
    (tmp_path / limit).write_text(f"{none}\n")
    assert host_memory() > 2**20
