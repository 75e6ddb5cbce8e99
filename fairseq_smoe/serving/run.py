"""Running the application with uvicorn."""

import logging
import signal
import socket
import sys

import uvicorn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.serving.app import make_app
from fairseq_smoe.serving.server import make_server


def serve(args):
    """Serve until a signal comes; then answer what was begun.

    Raises:
        OptionError: the address is taken, or see ``make_server``.
    """
    # the workers log to standard error, too
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    listening = _listen(args.host, args.port)
    port = listening.getsockname()[1]
    print("loading the model ...", file=sys.stderr, flush=True)
    server = make_server(args)
    shown = f"[{args.host}]" if ":" in args.host else args.host

    def tell():
        print(f"http://{shown}:{port}/", file=sys.stderr, flush=True)

    config = uvicorn.Config(
        make_app(server, tell),
        log_level="info" if args.log_requests else "warning",
        access_log=args.log_requests,
        server_header=False,
        # a request takes up to --timeout; its client may be slow to read the answer
        timeout_graceful_shutdown=int(args.timeout) + 5,
        lifespan="on",
    )
    # uvicorn raises the signal once more when it has finished
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with listening:
        uvicorn.Server(config).run([listening])


def _listen(host, port):
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"--host {host} --port {port}: {reason}; give another, or stop what listens there"
        ) from error
    return listening
