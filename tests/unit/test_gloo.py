"""The interface that train workers listen on is the one with the node's address."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from raysal.train import gloo


def test_the_interface_of_an_address_is_found_as_the_system_tells_it() -> None:
    assert gloo.interface("127.0.0.1") == "lo"
    assert gloo.interface("203.0.113.77") == "", "an address of documentation, which no machine has"
    if shutil.which("ip"):
        for line in subprocess.run(["ip", "-4", "-o", "address"], capture_output=True, text=True, check=True).stdout.splitlines():
            _, name, _, address, *_ = line.split()
            assert gloo.interface(address.partition("/")[0]) == name


def test_workers_of_one_node_and_who_knows_better_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(gloo.os, "environ", environment)
    monkeypatch.setattr(gloo.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(gloo.ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    gloo._listen()
    assert environment == {}
    monkeypatch.setattr(gloo.ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}])
    gloo._listen()
    assert environment == {gloo.INTERFACE: "lo"}
    environment[gloo.INTERFACE] = "eth7"
    gloo._listen()
    assert environment == {gloo.INTERFACE: "eth7"}
