"""Train workers on several nodes find each other by the addresses that the nodes have in the cluster."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"
"""PyTorch's variable; whoever sets it on a node knows better."""

ADDRESS_OF = 0x8915
"""Linux: SIOCGIFADDR."""


class Torch(TorchConfig):
    """Ray Train's own set-up of process groups, but that Gloo listens where other nodes reach it.

    Gloo listens at the address that the host's name stands for, by many an /etc/hosts 127.0.1.1: workers of several nodes then look for
    each other on themselves. NCCL looks for an interface by itself.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_listen)
        super().on_start(worker_group, backend_config)


def _listen() -> None:
    """Runs in each worker. On one node alone Gloo's own choice will do."""
    if sum(node["Alive"] for node in ray.nodes()) > 1 and (name := interface(ray.util.get_node_ip_address())):
        os.environ.setdefault(INTERFACE, name)


def interface(address: str) -> str:
    """Name of this machine's network interface with an IPv4 address; empty where there is none, or no Linux."""
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
            answer = fcntl.ioctl(asks.fileno(), ADDRESS_OF, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
