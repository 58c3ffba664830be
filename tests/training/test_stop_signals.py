"""Who acts on a stop signal, and who does not."""

import os
import signal

import pytest
import torch

from finetuning.training import stop_signals
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


def test_ctrl_c_is_a_stop_signal_its_echo_is_not_a_second_one_and_the_second_one_ends_at_once(monkeypatch):
    child = os.fork()
    if child == 0:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # torchrun's
            if not (request.agree(torch.device("cpu")) and request.reason == "Ctrl-C"):
                os._exit(1)
            monkeypatch.setattr(stop_signals, "SAME_CTRL_C", 0.0)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(2)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_a_closed_terminal_stops_a_training_and_nohup_keeps_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    try:
        assert signal.SIGHUP in StopRequest().signals
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in StopRequest().signals
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_unknown_stop_signal_is_refused(monkeypatch):
    monkeypatch.setenv("STOP_SIGNALS", "TERM,USR3")
    with pytest.raises(ValueError, match="no such signals: USR3"):
        StopRequest()
