"""Machines by name."""

import importlib.util

import jax
import pytest

from lora_jax.planning import chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x3", r"no topology 'v5e:3x3' is known: expected one of v5e:1x1, v5e:2x2, .*16x16\."),
        ("v5e", r"no topology 'v5e' is known"),
        ("v9:2x2", r"no chip 'v9' is known: expected one of v4, v5e, .*h200, cpu\."),
        ("h100:3", r"expected one of h100:1, h100:2"),
    ],
)
def test_a_machine_that_does_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        chips.machine(name)


@pytest.mark.parametrize("name", ["v6e:2x2", "h100:8"])
def test_without_its_compiler_a_machine_says_what_to_install(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match="compiler is not installed: pip install -r requirements"):
        chips.machine(name)


def test_the_cpu_needs_nothing():
    assert len(jax.devices()) == 8
    assert [len(chips.machine(name).devices) for name in ("cpu", "cpu:8")] == [1, 8]
    with pytest.raises(ValueError, match="JAX runs already, with 8 CPU devices"):
        chips.machine("cpu:16")


def test_names_are_of_growing_machines():
    for kind in chips.CHIPS:
        counts = [chips.chip_count(name) for name in chips.shapes_of(kind)]
        assert counts == sorted(set(counts))
