"""Signals that ask a training to save and end."""

import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 has come, in the place of ending the process.

    Attributes:
        number: the signal's; 0 until one comes.
    """

    def __init__(self):
        self.number = 0
        self._listening = False

    def listen(self):
        """From now on. Does nothing in other threads than the first, to which no signals come."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number, _):
        self.number = number
        # the processes that load data may have got it, too; torch takes their end for a failure
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
