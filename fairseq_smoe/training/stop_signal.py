"""Signals that ask a training to save and end."""

import os
import signal
import threading
from multiprocessing import util

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 has come, in the place of ending the process.

    Clusters send them to everything that runs. Processes that load data for this one live on, as
    the training may need a few more batches until all of its processes have agreed to end.

    Attributes:
        number: the signal's; 0 until one comes.
    """

    def __init__(self):
        self.number = 0
        self._listening = False
        util.register_after_fork(self, StopSignal._obey_none_but_the_parent)

    def listen(self):
        """From now on. Does nothing in other threads than the first, to which no signals come."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number, _):
        self.number = number

    def _obey_none_but_the_parent(self):
        # blocked, not ignored: torch gives processes that load data a handler of its own
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent):
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
