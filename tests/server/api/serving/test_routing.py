"""Aliases split requests by weight, stick to a client, and change without moving more clients than they must."""

import re

import pytest
from scipy import stats

from server.api.serving.routing import Routing, unit_interval
from server.settings import ConfigurationError, Settings, load_settings

VARIANTS = {"dense": "a/b", "reduced": "c/d", "small": "e/f"}


def routing(**settings):
    return Routing(load_settings(**{"variants": VARIANTS, **settings}))


def test_a_split_of_10000_is_within_the_binomial_interval():
    r = routing(aliases={"gdn": {"dense": 0.9, "reduced": 0.1}})
    low, high = stats.binom.interval(0.99, 10_000, 0.1)
    users = [f"user:{i}" for i in range(10_000)]
    first = [r.choose("gdn", user) for user in users]
    assert low <= first.count("reduced") <= high
    assert first == [r.choose("gdn", user) for user in users], "sticky"
    drawn = sum(r.choose("gdn", None) == "reduced" for _ in range(10_000))
    assert stats.binomtest(drawn, 10_000, 0.1).pvalue > 1e-6


def test_the_hash_is_uniform():
    points = [unit_interval("0", "gdn", f"user:{i}") for i in range(10_000)]
    assert stats.kstest(points, "uniform").pvalue > 0.01
    # Known: sha256 of "a\0b" begins with these. A change of the hash would deal all clients anew.
    assert unit_interval("a", "b") == int("59b271ae1bbcb1d3", 16) // 2**11 / 2**53


def test_seed_and_alias_deal_anew_and_weights_need_no_sum_of_one():
    aliases = {"a": {"dense": 3, "reduced": 1}, "b": {"dense": 3, "reduced": 1}}
    users = [f"user:{i}" for i in range(4000)]
    one, two = routing(aliases=aliases), routing(aliases=aliases, sticky={"seed": 1})
    a, b, c = ([r.choose(name, u) for u in users] for r, name in ((one, "a"), (one, "b"), (two, "a")))
    for other in (b, c):
        both = sum(x == y == "reduced" for x, y in zip(a, other, strict=True))
        assert stats.binomtest(both, 4000, 1 / 16).pvalue > 1e-6, "independent of each other"


def test_a_new_weight_moves_only_the_clients_between_the_boundaries():
    before = routing(aliases={"gdn": {"dense": 0.9, "reduced": 0.1}})
    users = [f"user:{i}" for i in range(3000)]
    old = [before.choose("gdn", u) for u in users]
    before.replace(load_settings(variants=VARIANTS, aliases={"gdn": {"dense": 0.7, "reduced": 0.3}}))
    new = [before.choose("gdn", u) for u in users]
    moves = set(zip(old, new, strict=True))
    assert moves == {("dense", "dense"), ("dense", "reduced"), ("reduced", "reduced")}


def test_a_weight_of_zero_gets_nobody():
    r = routing(aliases={"gdn": {"dense": 0, "reduced": 1, "small": 0}})
    assert {r.choose("gdn", f"{i}") for i in range(500)} == {"reduced"}
    assert {r.choose("gdn", None) for _ in range(500)} == {"reduced"}


def test_shadow_rules_draw_their_fraction():
    rules = [
        {"from": "dense", "to": "reduced", "fraction": 0.25},
        {"from": "dense", "to": "small", "fraction": 1},
    ]
    r = routing(shadow=rules)
    drawn = [target for _ in range(4000) for target in r.shadows("dense")]
    assert drawn.count("small") == 4000 and r.shadows("reduced") == []
    assert stats.binomtest(drawn.count("reduced"), 4000, 0.25).pvalue > 1e-6


def test_a_configuration_that_names_a_stopped_variant_changes_nothing():
    r = routing(aliases={"gdn": {"dense": 1}})
    more = load_settings(variants={**VARIANTS, "new": "x/y"}, aliases={"gdn": {"new": 1}})
    with pytest.raises(ValueError, match=re.escape("aliases.gdn.new: there is no such variant")):
        r.replace(more)
    assert r.aliases == {"gdn": {"dense": 1}}


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({"aliases": {"gdn": {"dnese": 1}}}, ["aliases.gdn.dnese", "dense"]),
        ({"aliases": {"dense": {"reduced": 1}}}, ["aliases.dense", "variant"]),
        ({"aliases": {"gdn": {}}}, ["aliases.gdn"]),
        ({"aliases": {"gdn": {"dense": 0}}}, ["aliases.gdn", "positive"]),
        ({"aliases": {"gdn": {"dense": -1}}}, ["aliases.gdn.dense", "-1"]),
        ({"aliases": {"gdn": {"dense": float("nan")}}}, ["aliases.gdn.dense"]),
        ({"aliases": {"g dn": {"dense": 1}}}, ["aliases.g dn"]),
        ({"shadow": [{"from": "dense", "to": "dense", "fraction": 1}]}, ["shadow.0", "both"]),
        ({"shadow": [{"from": "dense", "to": "x", "fraction": 1}]}, ["shadow.0.to", "'x'"]),
        ({"shadow": [{"from": "dense", "to": "small", "fraction": 0}]}, ["shadow.0.fraction", "0"]),
        ({"shadow": [{"from": "dense", "to": "small"}]}, ["shadow.0.fraction"]),
        ({"sticky": {"by": ["cookie"]}}, ["sticky.by.0", "cookie"]),
        ({"sticky": {"header": "X Y"}}, ["sticky.header"]),
    ],
    ids=str,
)
def test_errors_name_the_key(settings, mentions):
    with pytest.raises(ConfigurationError) as error:
        load_settings(variants=VARIANTS, **settings)
    for mention in mentions:
        assert mention in str(error.value)


def test_settings_alone_check_names_too():
    with pytest.raises(ValueError, match="no such variant"):
        Settings(aliases={"a": {"b": 1}})
