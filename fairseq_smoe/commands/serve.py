"""Serve translations over HTTP, with LibreTranslate's interface and a page."""

from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.inference.loading import add_loading_options


def add_arguments(parser):
    parser.epilog = "docs/serve.md has examples. Stop it with Ctrl-C or SIGTERM."
    add_loading_options(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for all of this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=5000, help="0: a free one (default: %(default)s)"
    )
    parser.add_argument("--log-requests", action="store_true", help="print a line for each request")
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that translate (default: 1)"
    )
    group.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of a process (default: %(default)s)"
    )
    group.add_argument("--beam", type=int, default=5, help="(default: %(default)s)")
    group.add_argument("--lenpen", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--batch-tokens",
        type=int,
        default=2000,
        metavar="N",
        help="source tokens that are translated together (default: %(default)s)",
    )
    group.add_argument(
        "--wait",
        type=float,
        default=5,
        metavar="MS",
        help="milliseconds for which an idle process waits for more (default: %(default)s)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--keys", type=Path, metavar="FILE", help="API keys, one a line (default: none is needed)"
    )
    group.add_argument(
        "--requests-per-minute",
        type=float,
        default=0,
        metavar="N",
        help="of an address; more get status 429 (default: no limit)",
    )
    group.add_argument(
        "--timeout", type=float, default=30, metavar="SECONDS", help="(default: %(default)s)"
    )
    group.add_argument(
        "--max-body", type=int, default=1_000_000, metavar="BYTES", help="(default: %(default)s)"
    )
    group.add_argument(
        "--max-texts",
        type=int,
        default=500,
        metavar="N",
        help="of a request (default: %(default)s)",
    )
    group.add_argument(
        "--max-characters", type=int, default=20_000, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--queue-tokens",
        type=int,
        default=100_000,
        metavar="N",
        help="that wait; more requests get status 503 (default: %(default)s)",
    )


def run(args):
    try:
        from fairseq_smoe.serving.run import serve
    except ModuleNotFoundError as error:
        raise OptionError(
            f"{error.name} is not installed; pip install 'fairseq-smoe[serve]'"
        ) from error
    serve(args)
