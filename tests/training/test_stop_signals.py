"""Who acts on a stop signal, and who does not."""

import os
import signal

import pytest
import torch

from finetuning.training.stop_signals import StopRequest


def test_a_signal_is_remembered_here_and_not_in_a_forked_loader_worker(monkeypatch):
    monkeypatch.setenv("STOP_SIGNALS", "TERM,USR2")
    before = signal.getsignal(signal.SIGUSR2)
    with StopRequest() as request:
        assert not request.agree(torch.device("cpu"))
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(1 if request.received else 0)
        assert os.waitpid(child, 0)[1] == 0 and not request.received
        os.kill(os.getpid(), signal.SIGUSR2)
        assert request.agree(torch.device("cpu")) and request.reason == "SIGUSR2"
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # left to others
    assert signal.getsignal(signal.SIGUSR2) == before


def test_an_unknown_stop_signal_is_refused(monkeypatch):
    monkeypatch.setenv("STOP_SIGNALS", "TERM,USR3")
    with pytest.raises(ValueError, match="no such signals: USR3"):
        StopRequest()
