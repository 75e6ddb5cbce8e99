"""Signals that ask a training to save and end."""

import os
import signal
import threading
from multiprocessing import util

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Records SIGTERM or SIGUSR1 instead of ending the process.

    Clusters send these signals to every process of a job. Data-loader processes have to ignore
    them, because training may need a few more batches until all ranks have agreed to stop.

    Attributes:
        number: number of the signal that was received; 0 if none.
    """

    def __init__(self):
        self.number = 0
        self._listening = False
        util.register_after_fork(self, StopSignal._obey_none_but_the_parent)

    def listen(self):
        """Start to record signals. Does nothing outside the main thread, because only the main
        thread gets signals."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number, _):
        self.number = number

    def _obey_none_but_the_parent(self):
        # blocked, not ignored: torch installs a handler of its own in data-loader processes
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent):
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
