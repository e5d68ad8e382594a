"""Tests run on the CPU, without the network, and leave nothing behind."""

import gc
import os
import socket

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; read when torch is imported
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

_connect = socket.socket.connect


def _guarded(self, address):
    """Local sockets only (gloo, wandb's own service): anything else is a test that needs the network."""
    host = address[0] if isinstance(address, tuple) else "local"
    if host not in ("local", "127.0.0.1", "localhost", "::1"):
        raise OSError(101, f"tests run without the network, but something connects to {address}")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _guarded)


@pytest.fixture(autouse=True)
def no_fake_tensors_left(request):
    """Graphs of fake tensors hold reference cycles: they are freed here, not by chance amid a later test."""
    yield
    if hasattr(request.module, "FakeTensorMode"):
        gc.collect()


def pytest_configure(config):
    config.addinivalue_line("markers", "smoke: a subset that runs in under two minutes")
